"""Namespaces on a node: declared and dropped from any node, known to all.

The table of all of them is one register of the engine. Whoever changes it tells the nodes that are up, each
of which reads it, keeps it in its store, where clients that map that look too, and answers. So when a drop is
answered, no key of before is seen on any node that is up; one that did not answer makes it NodeLost, and
hears of it when it starts, or within seconds of being back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from virgo import parallel
from virgo.engine.base import Engine
from virgo.errors import BadArgument, Busy, Conflict, VirgoError
from virgo.limits import (
    MEMORY_SLOTS_ALL,
    MEMORY_SPACES_REFRESH_S,
    MEMORY_SWEEP_KEYS_MAX,
)
from virgo.memory import spaces
from virgo.memory.figures import SpaceInfo
from virgo.memory.spaces import Declared, Table
from virgo.memory.store import Store
from virgo.module import NodeServices
from virgo.wire.commands import Command
from virgo.wire.resp import OK, Encoded
from virgo.wire.session import Session

REGISTER = "memory/spaces"
_ATTEMPTS_MAX = 100  # each lost race means that another node changed the table
_USAGE = "name [CACHE yes|no]"


class Namespaces:
    """The namespaces as one node knows and serves them."""

    def __init__(self, node: NodeServices, store: Store) -> None:
        self._node = node
        self._store = store
        self._engine: Engine = node.engine
        self._mutex = asyncio.Lock()
        self._version = -1  # of the register, as last heard
        self._table: Table = {}
        self._sweeping = asyncio.Event()
        self.swept = 0

    def __repr__(self) -> str:
        return f"<Namespaces {len(self._table)} declared>"

    def commands(self) -> list[Command]:
        """What is served."""
        name = "MEMORY.NAMESPACE"
        return [
            Command(name, self._declare, "write", 1, 3, usage=_USAGE, summary="Declare a namespace."),
            Command(name + "S", self._list, "read", summary="This node's part of all namespaces, as JSON."),
            Command("MEMORY.DROP", self._drop, "write", 1, 1, usage="name", summary="Drop all its keys."),
            Command(name + ".LEARN", self._learn, "write", summary="Between nodes."),
        ]

    # --- served -------------------------------------------------------------------------------

    async def _declare(self, _session: Session, request: list[bytes]) -> bytes:
        """MEMORY.NAMESPACE name [CACHE yes|no]: as JSON; an option that is left out stays as it is."""
        name, cache = request[1], _cache(request[2:])
        spaces.check_name(name)
        known = self._table.get(name)
        if known is None or cache not in (None, known.cache):
            await self._change(lambda table: spaces.declare(table, name, cache))
        return msgspec.json.encode(_info(name, self._table[name]))

    async def _drop(self, _session: Session, request: list[bytes]) -> Encoded:
        """MEMORY.DROP name: none of its present keys is seen any more."""
        name = request[1]
        spaces.check_name(name)
        await self._change(lambda table: spaces.drop(table, name))
        return OK

    async def _learn(self, _session: Session, _request: list[bytes]) -> Encoded:
        """MEMORY.NAMESPACE.LEARN: another node has changed the table."""
        await self._refresh(fresh=True)
        return OK

    async def _list(self, _session: Session, _request: list[bytes]) -> bytes:
        """MEMORY.NAMESPACES: with the figures of this node."""
        return msgspec.json.encode(await self.measure())

    async def measure(self) -> list[SpaceInfo]:
        """All namespaces, with what this node has of each."""
        found = []
        for name, declared in sorted(self._table.items()):
            keys, size = await self._measure(name, declared.generation)
            found.append(_info(name, declared, keys, size))
        return found

    async def _measure(self, name: bytes, generation: int) -> tuple[int, int]:
        """Count and bytes of the keys here; others have their turn in between."""
        count = size = slot = 0
        while slot < MEMORY_SLOTS_ALL:
            with self._store.batching() as batch:
                slot, here, bytes_here = batch.measure(name, generation, slot, MEMORY_SWEEP_KEYS_MAX)
            count, size = count + here, size + bytes_here
            await asyncio.sleep(0)
        return count, size

    # --- the table ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Know all that was declared and dropped before; nothing is served until then."""
        await self._refresh(fresh=True)

    async def _refresh(self, *, fresh: bool) -> None:
        register = await self._engine.registers.get(REGISTER, fresh=fresh)
        if register is not None:
            await self._adopt(register.version, spaces.decode_table(register.value))

    async def _change(self, change: Callable[[Table], Table]) -> None:
        """Change the table and tell everybody. Raises NodeLost if not all that are up were told."""
        for _ in range(_ATTEMPTS_MAX):
            register = await self._engine.registers.get(REGISTER)
            old = spaces.decode_table(register.value if register else b"")
            table = change(old)
            if table == old and register is not None:
                version = register.version
                break
            try:
                version = await self._engine.registers.compare_and_set(
                    REGISTER, spaces.encode_table(table), version=register.version if register else 0
                )
                break
            except Conflict:
                continue
        else:
            raise Busy("many programs declare or drop namespaces at once")
        await self._adopt(version, table)
        others = [each.number for each in self._node.members() if each.number != self._node.number]
        answers = await parallel.settle(self._node.call(each, b"MEMORY.NAMESPACE.LEARN") for each in others)
        for answer in answers:
            if isinstance(answer, VirgoError):
                raise answer

    async def _adopt(self, version: int, table: Table) -> None:
        """Keep a table that is newer than ours; on return none of the keys that were dropped is seen."""
        async with self._mutex:
            if version <= self._version:
                return
            self._store.count_uses()
            with self._store.batching() as batch:
                known = {name: batch.learn(name, declared) for name, declared in table.items()}
            self._table, self._version = table, version
            for name, space in known.items():
                if space.unswept:
                    self._store.unswept.add(name)
                    if space.mixed:  # keys that have no generation are seen until they are removed
                        await self._sweep(name, space.generation)
            self._sweeping.set()

    # --- in the background --------------------------------------------------------------------

    async def follow(self) -> None:
        """Hear of what was missed; runs until cancelled."""
        while True:
            await asyncio.sleep(MEMORY_SPACES_REFRESH_S)
            try:
                await self._refresh(fresh=False)
            except VirgoError:
                continue  # the engine is away: asked again, and it says so itself

    async def sweep(self) -> None:
        """Remove the keys of dropped namespaces; runs until cancelled."""
        while True:
            await self._sweeping.wait()
            self._sweeping.clear()
            for name in list(self._store.unswept):
                try:
                    await self._sweep(name, self._table[name].generation)
                except VirgoError:  # a full disk, for one; what is left is not seen meanwhile
                    await asyncio.sleep(MEMORY_SPACES_REFRESH_S)
            if self._store.unswept:
                self._sweeping.set()

    async def _sweep(self, name: bytes, generation: int) -> None:
        slot = 0
        while slot < MEMORY_SLOTS_ALL:
            with self._store.batching() as batch:
                slot, removed = batch.sweep(name, slot, MEMORY_SWEEP_KEYS_MAX)
            self.swept += removed
            await asyncio.sleep(0)
        with self._store.batching() as batch:
            space = batch.writing().space(name)
            if space is None or space.generation != generation:
                return  # it was dropped once more meanwhile
            batch.put_space(name, space._replace(mixed=False, unswept=False))
        self._store.unswept.discard(name)


def _cache(words: list[bytes]) -> bool | None:
    """The option, None if it is left out. Raises BadArgument."""
    if not words:
        return None
    answer = {b"YES": True, b"NO": False}.get(words[1].upper()) if len(words) == 2 else None
    if words[0].upper() != b"CACHE" or answer is None:
        raise BadArgument("a namespace has one option, CACHE", hint=f"Usage: MEMORY.NAMESPACE {_USAGE}")
    return answer


def _info(name: bytes, declared: Declared, keys: int | None = None, size: int | None = None) -> SpaceInfo:
    shown = name.decode("utf-8", "backslashreplace")
    return SpaceInfo(shown, declared.generation, declared.cache, keys, size)
