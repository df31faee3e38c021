"""The memory module of a node: its store, its commands, and what goes on in the background.

Serves regions and keys of the whole cloud: what lies here from its store, what lies elsewhere by asking
there. Promises: see the package's parts; what was acknowledged outlasts the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import msgspec
import psutil

from virgo.errors import Denied, InternalFault, VirgoError
from virgo.limits import (
    MEMORY_CLAIMS_TIDIED_MAX,
    MEMORY_EXPIRE_KEYS_MAX,
    MEMORY_EXPIRE_S,
    MEMORY_READERS_CHECK_S,
    MEMORY_SWEEP_S,
)
from virgo.members import Load
from virgo.memory import core, keyspace
from virgo.memory.chunks import Chunks
from virgo.memory.durable import Disk, directory_of
from virgo.memory.entries import now_ms
from virgo.memory.guard import Guard
from virgo.memory.keeper import Keeper
from virgo.memory.kept import KeptRegions
from virgo.memory.keys import Keys
from virgo.memory.listing import Listing
from virgo.memory.memcached import place as memcached
from virgo.memory.memcached.front import Front
from virgo.memory.memcached.lines import Lines
from virgo.memory.mirrors import Mirrors
from virgo.memory.namespaces import Namespaces
from virgo.memory.overview import Overview
from virgo.memory.regions import Regions
from virgo.memory.shared import Shared
from virgo.memory.slots import Slots
from virgo.memory.spread import Spread
from virgo.memory.store import Store
from virgo.memory.transactions import Transactions
from virgo.module import NodeServices
from virgo.wire.commands import Command
from virgo.wire.session import Session

log = logging.getLogger("virgo.memory")


class MemoryModule:
    """The memory pool's part on one node."""

    name = "memory"
    requires: tuple[str, ...] = ()
    summary = "Pooled memory: regions by id and keys by name, on any node."

    def __init__(self, node: NodeServices) -> None:
        self._node = node
        self._place = memcached.place(node.config, node.name, node.index)
        if self._place.open:
            self.summary += f" Speaks memcached's protocol at {self._place.address}."
        self._machine_bytes = int(psutil.virtual_memory().total)
        self._store: Store | None = None
        self._shared: Shared | None = None
        self._room = 0  # as of the last beat

    def __repr__(self) -> str:
        return f"<MemoryModule of {self._node.name} {self._store!r}>"

    @property
    def store(self) -> Store:
        """The open store."""
        assert self._store is not None, "the module is not started"
        return self._store

    @property
    def shared(self) -> Shared:
        """The shared regions."""
        assert self._shared is not None, "the module is not started"
        return self._shared

    async def start(self) -> None:
        """Open the store."""
        configured = self._node.config.memory.capacity_bytes
        self._store = Store(
            self._node.directory / self.name,
            capacity_bytes=self._capacity(),
            map_bytes=core.map_bytes(core.capacity_bytes(configured, self._machine_bytes, 1)),
            evicts=self._node.config.memory.evict,
        )
        self._guard = Guard(self._store)
        self._guard.start()
        self._room = self._store.room_bytes()
        self._slots = Slots(self._node.engine, self._node.number, self._rooms)
        self._chunks = Chunks(self._node, self._store)
        self._spread = Spread(self._node, self._store, self._chunks)
        self._shared = shared = Shared(self._node, self._store, self._capacity())
        self._mirrors = Mirrors(self._node, self._store, self._slots)
        self._keep(self._store)
        self._keys = Keys(self._node, self._store, self._slots)
        self._kept = KeptRegions(self._node, self._store, self._keys)
        self._regions = Regions(self._node, self._store, self._spread, shared, self._kept)
        self._transactions = Transactions(self._node, self._store, self._keys)
        self._listing = Listing(self._node, self._store, self._slots)
        self._front = Front(
            self._node.number, self._store, self._slots, self._keys, self._place.item_bytes_max
        )
        self._lines = Lines(self._front, self._store, self._keys, self._listing, self._place)
        self._node.spawn(self._lines.run(), name="flush_all with a delay")
        self._namespaces = Namespaces(self._node, self._store)
        self._overview = Overview(self._node, self.stats, self._namespaces)
        await self._namespaces.start()
        await self._mirrors.start()
        self._node.spawn(self._mirrors.follow(), name="follow mirrors")
        self._node.spawn(self._namespaces.follow(), name="follow namespaces")
        self._node.spawn(self._namespaces.sweep(), name="sweep namespaces")
        self._node.spawn(self._expire(), name="expire keys")
        self._node.spawn(self._tidy(), name="tidy the store")

    def _keep(self, store: Store) -> None:
        """Know where keys are kept that are kept more safely, and put back those of a disk that are lost."""

        def disk() -> Disk:
            made = Disk(store)
            self._node.spawn(made.run(), name="write durable keys")
            return made

        store.keeper = Keeper(disk, self._mirrors.sinks)
        if directory_of(store.directory).exists():
            found = disk()
            store.keeper.disk = found
            lacking = found.restore()
            if lacking:
                log.warning("%d durable keys that the pool had lost are back", lacking)

    async def stop(self) -> None:
        """Write everything to disk and close."""
        store, self._store = self._store, None
        if store is not None:
            if isinstance(store.keeper.disk, Disk):
                await asyncio.to_thread(store.keeper.disk.close)
            await asyncio.to_thread(store.flush)
            if self._shared is not None:
                self._shared.close()
            self._guard.stop()
            store.close()

    def commands(self) -> Sequence[Command]:
        """What it serves."""
        return [
            *self._regions.commands(),
            *self._keys.commands(),
            *self._kept.commands(),
            *self._listing.commands(),
            *self._namespaces.commands(),
            *self._mirrors.commands(),
            *self._overview.commands(),
            *self._transactions.commands(),
            *self._chunks.commands(),
            *self._front.commands(),
            *self._lines.commands(),
            Command(
                "MEMORY.STATS", self._serve_stats, "read", summary="Figures of this node's pool, as JSON."
            ),
            Command(
                "MEMORY.LOCAL", self._serve_local, "read", summary="How to map this node's pool, as JSON."
            ),
            Command(
                "MEMORY.SLOTS", self._serve_slots, "read", summary="The node of each slot, 16 bits each."
            ),
        ]

    def stats(self) -> dict[str, Any]:
        """Figures of this node's pool."""
        return {
            **self.store.stats(),
            **self.shared.stats(),
            "slots_known": self._slots.assigned(),
            "slots_here": self._slots.owned(),
            "chunks_swept": self._chunks.swept,
            "keys_swept": self._namespaces.swept,
            **self._mirrors.stats(),
            "remote_hits": self._keys.remote.hits,
            "remote_bytes": self._keys.remote.held_bytes,
            "keys_evicted": self.store.evictor.evicted,
            "condensed": self.store.condenser.done,
            "writers_helped": self._guard.helped,
            "writers_killed": self._guard.killed,
            "memcached": str(self._place.address) if self._place.open else "",
            "memcached_requests": self._front.figures.counts.total(),
        }

    def load(self, load: Load) -> Load:
        """With the room in the pool; the capacity follows the number of nodes that share the machine."""
        self.store.attend()
        self.store.resize(self._lines.capacity_bytes_max or self._capacity())
        self._room = self.store.room_bytes()
        return msgspec.structs.replace(load, pool_free_bytes=self._room)

    def _capacity(self) -> int:
        members = self._node.members()
        machine = next((member.machine for member in members if member.number == self._node.number), "")
        sharing = sum(1 for member in members if member.machine == machine)
        return core.capacity_bytes(self._node.config.memory.capacity_bytes, self._machine_bytes, sharing)

    def _rooms(self) -> dict[int, int]:
        """Free bytes by node: of others as they last said, of this one as it is."""
        rooms = {member.number: member.load.pool_free_bytes for member in self._node.members()}
        rooms[self._node.number] = self.store.room_bytes()
        return rooms

    # --- served -------------------------------------------------------------------------------

    def _serve_stats(self, _session: Session, _request: list[bytes]) -> bytes:
        return msgspec.json.encode(self.stats())

    def _serve_local(self, session: Session, _request: list[bytes]) -> bytes:
        local = {
            "number": self._node.number,
            "directory": str(self.store.directory),
            "identity": self.store.identity,
            "map_bytes": self.store.map_bytes,
            "writable": _may_write(session),
        }
        return msgspec.json.encode(local)

    def _serve_slots(self, _session: Session, _request: list[bytes]) -> bytes:
        return keyspace.encode_table(self._slots.table)

    # --- in the background --------------------------------------------------------------------

    async def _expire(self) -> None:
        """Remove keys whose time has passed; runs until cancelled."""
        delay_s = MEMORY_EXPIRE_S
        while True:
            await asyncio.sleep(delay_s)
            delay_s = MEMORY_EXPIRE_S
            # A full disk is told to those who write; here it is only tried again.
            with contextlib.suppress(VirgoError):
                if self._expire_some():
                    delay_s = 0  # others have their turn between rounds

    def _expire_some(self) -> bool:
        """One round; True if there may be more."""
        with self.store.batching() as batch:
            batch.writing()  # so a client that keeps the right to write is noticed, whoever waits for it
            return batch.expire_keys(now_ms(), MEMORY_EXPIRE_KEYS_MAX) == MEMORY_EXPIRE_KEYS_MAX

    async def _tidy(self) -> None:
        """Free what dead readers and dead sets left behind; runs until cancelled."""
        loop = asyncio.get_running_loop()
        next_sweep = loop.time() + MEMORY_READERS_CHECK_S
        while True:
            await asyncio.sleep(MEMORY_READERS_CHECK_S)
            if self.store.broken:
                raise InternalFault(f"{self.store!r} must be opened anew: {self.store.broken}")
            self.store.env.reader_check()
            with contextlib.suppress(VirgoError), self.store.batching() as batch:
                batch.drop_claims(now_ms(), MEMORY_CLAIMS_TIDIED_MAX)
            if loop.time() >= next_sweep:
                next_sweep = loop.time() + MEMORY_SWEEP_S
                with contextlib.suppress(VirgoError):  # what is left over is found by the next sweep
                    await self._chunks.sweep()
                with contextlib.suppress(VirgoError):  # likewise
                    await self.shared.tidy()


def _may_write(session: Session) -> bool:
    try:
        session.require("write", "MEMORY.LOCAL")
    except Denied:
        return False
    return True
