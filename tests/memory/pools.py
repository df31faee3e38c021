"""Memory modules of several nodes in one process, with real stores, joined by direct calls.

What stands in for the node and the engine is as small as the contracts allow, so that a test can lose a
node, delay a call or fail one at an exact point. tests/memory/test_memory_cloud.py has real nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hiredis

from virgo.config import Config, MemoryConfig
from virgo.engine.base import Register
from virgo.errors import Conflict, NodeLost, NoNode, NotRunning
from virgo.members import Load, Member
from virgo.memory.life import LifeFile
from virgo.memory.service import MemoryModule
from virgo.wire import resp
from virgo.wire.commands import CommandTable


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test that is a coroutine in an event loop of its own."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))

    return run


class Registers:
    """Registers in a dictionary; every access yields once, so that others come between."""

    def __init__(self) -> None:
        self.values: dict[str, Register] = {}
        self.reads = self.writes = 0

    async def get(self, name: str, *, fresh: bool = True) -> Register | None:
        self.reads += 1
        await asyncio.sleep(0)
        found = self.values.get(name)
        await asyncio.sleep(0)
        return found

    async def compare_and_set(self, name: str, value: bytes, *, version: int) -> int:
        await asyncio.sleep(0)
        found = self.values.get(name)
        if (found.version if found else 0) != version:
            raise Conflict(f"{name} has another version")
        self.writes += 1
        self.values[name] = Register(name, value, version + 1)
        return version + 1


class Chunk:
    """What a handler sees of a session: the batch of the chunk."""

    def __init__(self) -> None:
        self._batches: dict[bytes, Any] = {}

    def batch(self, key: bytes, factory: Callable[[], Any]) -> Any:
        if key not in self._batches:
            self._batches[key] = factory()
        return self._batches[key]

    def require(self, role: str, what: str) -> None:
        """Whoever asks here has every role."""

    def close(self) -> list[Any]:
        """What to await before the chunk is answered."""
        batches, self._batches = self._batches, {}
        return [pending for batch in batches.values() if (pending := batch.close()) is not None]


class PoolNode:
    """One node: the services for its module, and the module."""

    def __init__(self, pools: Pools, number: int, directory: Path, memory: MemoryConfig) -> None:
        self.pools = pools
        self.name = f"n{number}"
        self.number = self.index = number
        self.directory = directory
        self.config = Config(home=directory, memory=memory)
        self.engine = SimpleNamespace(registers=pools.registers)
        self.up = True
        self.tasks: set[asyncio.Task[None]] = set()
        self.module = MemoryModule(self)  # type: ignore[arg-type]

    def member(self, number: int) -> Member:
        if number not in self.pools.nodes:
            raise NoNode(f"no node has the number {number}")
        return Member(f"n{number}", number, str(number))

    def known(self) -> list[Member]:
        return [self.member(number) for number in self.pools.nodes]

    def members(self) -> list[Member]:
        return [
            Member(node.name, node.number, str(node.number), load=Load(pool_free_bytes=node.room_bytes()))
            for node in self.pools.nodes.values()
            if node.up
        ]

    def room_bytes(self) -> int:
        """What it would say of its room in a beat."""
        return self.module.store.room_bytes() if self.module._store is not None else 0

    async def call(self, number: int, *request: bytes | str | int, timeout_s: float | None = None) -> Any:
        await asyncio.sleep(0)
        node = self.pools.nodes.get(number)
        if node is None:
            raise NoNode(f"no node has the number {number}")
        if not node.up:
            raise NodeLost(f"node n{number} is lost") from NotRunning("no connection could be made")
        encoded = [part if isinstance(part, bytes) else str(part).encode() for part in request]
        await self.pools.before_call(number, encoded)
        reply = await node.run(*encoded)
        await asyncio.sleep(0)
        reader = hiredis.Reader()
        reader.feed(resp.encode(reply))
        return reader.gets()

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def start(self) -> None:
        await self.module.start()
        self.table = CommandTable(self.module.commands())
        self.up = True

    async def stop(self) -> None:
        self.up = False
        for task in self.tasks:
            task.cancel()
        await self.module.stop()

    def module_life(self) -> LifeFile:
        """What is known of its store between two lives."""
        return LifeFile(self.directory / "memory")

    async def run(self, *request: bytes | str | int) -> Any:
        """One request in a chunk of its own; replies as they are before encoding."""
        encoded = [part if isinstance(part, bytes) else str(part).encode() for part in request]
        command = self.table.find(encoded[0])
        command.check_arity(encoded)
        chunk = Chunk()
        try:
            result = command.handler(chunk, encoded)  # type: ignore[arg-type]
        finally:
            pending = chunk.close()
        for each in pending:
            await each
        return await result if asyncio.iscoroutine(result) else result

    async def settle(self) -> None:
        """Wait until spawned work that ends has ended."""
        while pending := [task for task in self.tasks if task.get_name() == "tidy chunks"]:
            await asyncio.wait(pending)

    def stats(self) -> dict[str, Any]:
        return self.module.stats()


class Pools:
    """Nodes 1 to `count`."""

    def __init__(self, directory: Path, count: int, memory: MemoryConfig) -> None:
        self.registers = Registers()
        self.nodes: dict[int, PoolNode] = {}
        for number in range(1, count + 1):
            self.nodes[number] = PoolNode(self, number, directory / f"n{number}", memory)
        self.on_call: Callable[[int, list[bytes]], Coroutine[Any, Any, None] | None] | None = None

    def __getitem__(self, number: int) -> PoolNode:
        return self.nodes[number]

    async def before_call(self, number: int, request: list[bytes]) -> None:
        """Runs `on_call(number, request)` before each call between nodes."""
        if self.on_call is not None:
            wait = self.on_call(number, request)
            if wait is not None:
                await wait

    def total(self, figure: str) -> int:
        """The sum of a figure over the nodes."""
        return sum(node.stats()[figure] for node in self.nodes.values())


@contextlib.asynccontextmanager
async def pools(
    directory: Path, count: int = 3, *, capacity_bytes: int = 64 << 20, **settings: Any
) -> AsyncIterator[Pools]:
    """Nodes that serve; `settings` are further ones of the memory pool."""
    settings = {"shared_directory": str(directory), **settings}
    made = Pools(directory, count, MemoryConfig(capacity_bytes=capacity_bytes, **settings))
    try:
        for node in made.nodes.values():
            await node.start()
        yield made
    finally:
        for node in made.nodes.values():
            await node.stop()


__all__ = ["Chunk", "PoolNode", "Pools", "Registers", "in_loop", "pools"]
