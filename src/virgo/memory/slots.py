"""Which node holds a key: the table of slots, shared by all nodes in one register of the engine.

A slot is assigned when a key of it is first written, and then stays where it is, so an assignment that
was read once is true for ever and costs a list lookup; but for the slots of keys that are kept twice, which
their mirrors take over when a node is lost. Otherwise only an unassigned slot needs the register: it may
have been assigned elsewhere a moment ago, so nobody answers "no such key" without having read it since
the question came. Questions that wait at the same time share one read, and writers one change.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping

from virgo.engine.base import Engine
from virgo.errors import Busy, Conflict
from virgo.limits import MEMORY_SLOTS_ALL, MEMORY_TABLE_FRESH_S
from virgo.memory import keyspace

REGISTER = "memory/slots"
_ATTEMPTS_MAX = 100  # each lost race means that another node assigned slots


class Slots:
    """The table as this node knows it.

    Args:
        engine: has the register.
        local: this node's number.
        rooms: gives the free bytes of the nodes that are up.

    Attributes:
        table: number of the node per slot, 0 where this node knows of none; then the mirrors. Read it, never
            write it.
    """

    def __init__(self, engine: Engine, local: int, rooms: Callable[[], Mapping[int, int]]) -> None:
        self._registers = engine.registers
        self._local = local
        self._rooms = rooms
        self._mutex = asyncio.Lock()
        self._reads = 0  # begun so far
        self._read = 0  # the latest begun one that has finished
        self._read_at = -MEMORY_TABLE_FRESH_S
        self._wanted: set[int] = set()  # by those who wait
        self.table = keyspace.decode_table(b"")

    def __repr__(self) -> str:
        return f"<Slots {self.assigned()} of {MEMORY_SLOTS_ALL} assigned>"

    def assigned(self) -> int:
        """How many slots are known to have a node."""
        return sum(1 for number in self.table[:MEMORY_SLOTS_ALL] if number)

    def owned(self) -> int:
        """How many slots are this node's."""
        return self.table[:MEMORY_SLOTS_ALL].count(self._local)

    def owners(self) -> set[int]:
        """Nodes that hold slots."""
        return set(self.table[:MEMORY_SLOTS_ALL]) - {0}

    def mirrors(self) -> set[int]:
        """Nodes that have second copies."""
        return set(self.table[MEMORY_SLOTS_ALL:]) - {0}

    async def refresh(self) -> None:
        """Know all that was assigned before this call."""
        asked = self._reads
        async with self._mutex:
            if self._read > asked:
                return
            await self._load()

    async def freshen(self) -> None:
        """Know all that was changed up to a moment ago."""
        if time.monotonic() - self._read_at > MEMORY_TABLE_FRESH_S:
            await self.refresh()

    async def look_up(self, slots: Iterable[int]) -> None:
        """Know of these slots whether they are assigned."""
        if not all(self.table[slot] for slot in slots):
            await self.refresh()

    async def assign(self, slots: Iterable[int]) -> None:
        """Have these slots assigned. Raises PoolFull, EngineUnavailable."""
        mine = [slot for slot in slots if not self.table[slot]]
        if not mine:
            return
        self._wanted.update(mine)
        try:
            async with self._mutex:
                for _ in range(_ATTEMPTS_MAX):
                    if all(self.table[slot] for slot in mine):
                        return
                    wanted = [slot for slot in self._wanted.union(mine) if not self.table[slot]]
                    if await self._try_assign(wanted):
                        return
        finally:
            self._wanted.difference_update(mine)
        raise Busy("many nodes assign slots of keys at once")

    async def change(self, decide: Callable[[list[int]], list[int]]) -> None:
        """Change the table as it is now. Raises Busy, EngineUnavailable."""
        async with self._mutex:
            for _ in range(_ATTEMPTS_MAX):
                version = await self._load()
                table = decide(list(self.table))
                if table == self.table:
                    return
                try:
                    await self._registers.compare_and_set(
                        REGISTER, keyspace.encode_table(table), version=version
                    )
                except Conflict:
                    continue
                self._adopt(table)
                return
        raise Busy("many nodes change the slots of keys at once")

    async def _load(self) -> int:
        """Read the register; returns its version. The mutex is held."""
        self._reads += 1
        mine = self._reads
        register = await self._registers.get(REGISTER)
        self._adopt(keyspace.decode_table(register.value if register else b""))
        self._read_at = time.monotonic()
        self._read = mine
        return register.version if register else 0

    async def _try_assign(self, wanted: list[int]) -> bool:
        version = await self._load()
        if all(self.table[slot] for slot in wanted):
            return True
        table = keyspace.assign_slots(
            self.table, wanted, local=self._local, rooms=self._rooms(), draw=random.randrange
        )
        try:
            await self._registers.compare_and_set(REGISTER, keyspace.encode_table(table), version=version)
        except Conflict:
            return False
        self._adopt(table)
        return True

    def _adopt(self, table: list[int]) -> None:
        """In place, since the handlers of the fast path hold the list itself."""
        self.table[:] = table
