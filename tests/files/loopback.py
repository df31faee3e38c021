"""Nodes of one process, joined by direct calls: the files module without sockets and engine.

What they share with a real cloud: real directories, real threads, real forwarding by `FILES.HERE` with
replies as the wire would give them. The registers are a dictionary with the engine's contract.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from virgo import context as contexts
from virgo.config import Config
from virgo.context import Context, Identity
from virgo.engine.base import Register
from virgo.errors import Conflict, Denied, NodeLost, NoNode, VirgoError
from virgo.files.aclient import AsyncFilesClient
from virgo.files.astream import AsyncFile
from virgo.files.client import FilesClient
from virgo.files.service import FilesModule
from virgo.members import Load, Member
from virgo.wire.call import Call
from virgo.wire.commands import CommandTable
from virgo.wire.resp import OK

ADMIN = Identity("tester", frozenset({"admin"}))


class Registers:
    """Compare-and-set registers in a dictionary."""

    def __init__(self) -> None:
        self.kept: dict[str, Register] = {}
        self._version = 0

    async def get(self, name: str) -> Register | None:
        assert 1 <= len(name.encode()) <= 512
        return self.kept.get(name)

    async def compare_and_set(self, name: str, value: bytes, *, version: int) -> int:
        assert 1 <= len(name.encode()) <= 512
        self._check(name, version)
        self._version += 1
        self.kept[name] = Register(name, value, self._version)
        return self._version

    async def delete(self, name: str, *, version: int) -> None:
        self._check(name, version)
        self.kept.pop(name, None)

    async def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.kept if name.startswith(prefix))

    def _check(self, name: str, version: int) -> None:
        found = self.kept.get(name)
        if (found.version if found else 0) != version:
            raise Conflict(f"{name} changed")


class Node:
    """One node as its files module sees it."""

    def __init__(self, cloud: Cloud, number: int, directory: Path, config: Config) -> None:
        self.cloud = cloud
        self.name, self.number, self.directory, self.config = f"n{number}", number, directory, config
        self.index = number
        self.engine: Any = SimpleNamespace(registers=cloud.registers)
        self.up = True
        self.free_bytes = 1 << 40
        self.files: Any = None
        self._tasks: list[asyncio.Task[None]] = []
        self.module = FilesModule(self)
        self.table = CommandTable(self.module.commands())

    def members(self) -> Sequence[Member]:
        return [node._member() for node in self.cloud.nodes if node.up]

    def known(self) -> Sequence[Member]:
        return [node._member() for node in self.cloud.nodes]

    def member(self, number: int) -> Member:
        for node in self.cloud.nodes:
            if node.number == number:
                return node._member()
        raise NoNode(f"no node has the number {number}")

    def _member(self) -> Member:
        load = Load(disk_free_bytes=self.free_bytes)
        return Member(name=self.name, number=self.number, id=self.name, load=load)

    async def call(self, number: int, *request: Any, timeout_s: float | None = None) -> Any:
        self.member(number)
        node = next(node for node in self.cloud.nodes if node.number == number)
        if not node.up:
            raise NodeLost(f"node {node.name} is lost")
        reply = await node.send(*request)
        return b"OK" if reply is OK else reply

    def spawn(self, work: Any, *, name: str) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work, name=name))

    async def stop(self) -> None:
        """End the module, its tasks first, as a node does."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.module.stop()

    async def send(self, *request: Any) -> Any:
        """Run a command as a connection of this node would; raises its errors."""
        words = [_encode(word) for word in request]
        command = self.table.find(words[0])
        context = contexts.current() or Context(identity=ADMIN)
        if not context.identity.may(command.role):
            raise VirgoError("the session refuses this role")
        command.check_arity(words)
        with contexts.using(context):
            result = command.handler(_Caller(context.identity), words)  # type: ignore[arg-type]
            return await result if inspect.isawaitable(result) else result


class _Caller:
    """What a handler sees of a session: who asks, and a way to insist on a role."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity

    def require(self, role: str, what: str) -> None:
        if not self.identity.may(role):
            raise Denied(f"{what} needs the role {role!r}")


def _encode(word: Any) -> bytes:
    if isinstance(word, bytes):
        return word
    return word.encode("utf-8", "surrogateescape") if isinstance(word, str) else str(word).encode()


class Cloud:
    """Some nodes that share registers; `async with` starts and stops their modules."""

    def __init__(self, directory: Path, count: int = 3, config: Config | None = None) -> None:
        self.registers = Registers()
        self.nodes = [
            Node(self, number, directory / f"n{number}", config or Config()) for number in range(1, count + 1)
        ]

    async def __aenter__(self) -> list[Node]:
        for node in self.nodes:
            await node.module.start()
        return self.nodes

    async def __aexit__(self, *_exc: object) -> None:
        for node in self.nodes:
            await node.stop()


class BlockingRunner:
    """A `Runner` over one node, for the blocking client: its event loop runs while a call does."""

    def __init__(self, node: Node, loop: asyncio.AbstractEventLoop) -> None:
        self._node, self._loop = node, loop

    def run(self, call: Call[Any]) -> Any:
        reply = self._loop.run_until_complete(self._node.send(*call.request))
        return call.decode(b"OK" if reply is OK else reply)

    def run_many(self, calls: list[Call[Any]]) -> list[Any]:
        results: list[Any] = []
        for call in calls:
            try:
                results.append(self.run(call))
            except VirgoError as error:
                results.append(error)
        return results


class AsyncioRunner:
    """An `AsyncRunner` over one node; `before` is awaited with each call first: a test can hold it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.before: Callable[[Call[Any]], Awaitable[None]] | None = None

    async def run(self, call: Call[Any]) -> Any:
        if self.before is not None:
            await self.before(call)
        reply = await self._node.send(*call.request)
        return call.decode(b"OK" if reply is OK else reply)

    async def run_many(self, calls: list[Call[Any]]) -> list[Any]:
        results: list[Any] = []
        for call in calls:
            try:
                results.append(await self.run(call))
            except VirgoError as error:
                results.append(error)
        return results


class Awaited:
    """An asyncio client or file object as if it were blocking: an operation runs the loop to its end."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._target, self._loop = target, loop

    def __repr__(self) -> str:
        return repr(self._target)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not callable(found):
            return found

        def work(*arguments: Any, **options: Any) -> Any:
            given = (one._target if isinstance(one, Awaited) else one for one in arguments)
            result = found(*given, **options)
            if inspect.isawaitable(result):
                result = self._loop.run_until_complete(result)
            return Awaited(result, self._loop) if isinstance(result, AsyncFile) else result

        return work

    def __enter__(self) -> Awaited:
        return self.__getattr__("__aenter__")()  # type: ignore[no-any-return]

    def __exit__(self, *exc: object) -> None:
        self.__getattr__("__aexit__")(*exc)

    def __iter__(self) -> Iterator[Any]:
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield self.__getattr__("__anext__")()


@contextlib.contextmanager
def blocking_cloud(
    directory: Path, count: int = 3, config: Config | None = None, *, face: str = "blocking"
) -> Iterator[list[Node]]:
    """Started nodes for tests that are not coroutines; `node.files` is a client of each, of either face."""
    loop = asyncio.new_event_loop()
    cloud = Cloud(directory, count, config)
    try:
        nodes = loop.run_until_complete(cloud.__aenter__())
        for node in nodes:
            if face == "blocking":
                node.files = FilesClient(BlockingRunner(node, loop))
            else:
                node.files = Awaited(AsyncFilesClient(AsyncioRunner(node)), loop)
        yield nodes
    finally:
        loop.run_until_complete(cloud.__aexit__())
        loop.close()
