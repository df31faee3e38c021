"""Shared regions of this node: each a segment that processes of the machine map, and a record that says so.

The record is what counts. A region is made file first and freed record first, so that a node that is killed
in between leaves a file that nobody knows, never a record without its bytes; such files are swept at the
start and now and then. A region whose file is gone with the machine's memory, after a reboot for one, is
forgotten, and the log tells; while a disk is only out of reach its regions are kept.

Reads and writes of other machines, and over the wire, are done here on the file, in threads; see `turns`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import psutil

from virgo.errors import Busy, NotRunning, PoolFull, TooLarge, UnknownId, VirgoError
from virgo.limits import MEMORY_NOTE_BYTES_MAX, MEMORY_REPLY_BYTES_MAX
from virgo.members import compose_id
from virgo.memory.core import Region
from virgo.memory.segments import Segment, total_bytes
from virgo.memory.shelf import Shelf
from virgo.memory.store import Store
from virgo.memory.turns import Turns
from virgo.module import NodeServices
from virgo.wire.resp import OK, Encoded

log = logging.getLogger("virgo.memory")
T = TypeVar("T")
_REDO = ".redo"


class Shared:
    """The shared regions whose home is this node.

    Attributes:
        swept: files that no region wanted, since the start.
        lost: regions whose file was gone, since the start.
    """

    def __init__(self, node: NodeServices, store: Store, capacity_bytes: int) -> None:
        self._node = node
        self._store = store
        self._turns = Turns()
        self._making: set[int] = set()
        self._known: dict[int, int] = {}  # bytes of their files
        self.swept = self.lost = 0
        configured = node.config.memory.shared_directory
        self._shelf = Shelf(store.directory, store.identity, configured, capacity_bytes)
        if self._shelf.emptied:
            self._forget_lost()
        if self._shelf.names():
            self._shelf.make()  # its links, if the store was moved
        for identifier, size, name in self._sweep(self._shelf.names()):
            self._known[identifier] = total_bytes(size)
            if name.endswith(_REDO):
                self._finish(self._segment(identifier, size))
        self._count()

    def __repr__(self) -> str:
        return f"<Shared {len(self._known)} regions in {self._shelf.path}>"

    def stats(self) -> dict[str, Any]:
        """Figures."""
        return {
            "segments": len(self._known),
            "segments_bytes": self._store.apart_bytes,
            "segments_directory": str(self._shelf.path),
            "segments_swept": self.swept,
            "segments_lost": self.lost,
        }

    def _segment(self, identifier: int, size: int) -> Segment:
        return Segment(str(self._shelf.path), self._store.identity, identifier, size)

    def _count(self) -> None:
        self._store.apart_bytes = sum(self._known.values())

    def _region(self, identifier: int) -> Region | None:
        with self._store.batching() as batch:
            found = batch.region(identifier)
        return found if found is not None and found.shared else None

    # --- life of a region ---------------------------------------------------------------------

    async def malloc(self, size: int, note: bytes) -> int:
        """A shared region on this node; one with a note is full of zeros. Raises PoolFull, DiskFull."""
        if len(note) > MEMORY_NOTE_BYTES_MAX:
            raise TooLarge(
                f"a note of {len(note)} bytes exceeds the limit of {MEMORY_NOTE_BYTES_MAX}",
                hint="Keep what is longer under a key, and note that.",
            )
        total = total_bytes(size)
        with self._store.batching() as batch:
            room = batch.room_bytes()
            if total > room:
                raise PoolFull(f"{total} bytes are asked for, {room} are free on this node")
            identifier = compose_id(self._node.number, batch.next_serial())
        self._check_memory(total)
        segment = self._segment(identifier, size)
        self._making.add(identifier)
        made = asyncio.ensure_future(asyncio.to_thread(self._make, segment, bool(note)))
        try:
            await asyncio.shield(made)
            with self._store.batching() as batch:
                batch.declare(total)
                batch.put_region(identifier, Region(size, shared=True, note=note))
        except BaseException:
            made.add_done_callback(lambda _made: self._unmake(segment))
            raise
        self._making.discard(identifier)
        self._known[identifier] = total
        self._count()
        return identifier

    def _check_memory(self, total: int) -> None:
        """The kernel would kill somebody for memory that it has promised and does not have."""
        if self._shelf.in_memory and total > psutil.virtual_memory().available:
            raise PoolFull(f"{total} bytes are asked for, and the machine has not so much memory to spare")

    def _make(self, segment: Segment, full: bool) -> None:
        self._shelf.make()
        segment.create(full=full)

    def _unmake(self, segment: Segment) -> None:
        """After a failure, once nobody makes it any more."""
        self._making.discard(segment.identifier)
        try:
            segment.remove()
        except VirgoError as error:  # it is swept later
            log.warning("%r is left over: %s", segment, error)

    async def free(self, identifier: int) -> Encoded:
        """Forget the region, then remove its file; those who have it mapped keep the pages."""
        region = self._region(identifier)
        if region is None:
            raise UnknownId(f"no region has the id {identifier} ({identifier:#x})")
        with self._store.batching() as batch:
            batch.delete_region(identifier, region)
        self._known.pop(identifier, None)
        self._count()
        await asyncio.shield(asyncio.to_thread(self._segment(identifier, region.size).remove))
        return OK

    # --- its bytes ----------------------------------------------------------------------------

    async def read(self, identifier: int, region: Region, offset: int = 0, count: int | None = None) -> bytes:
        """Bytes of the value. Raises BadArgument, TooLarge, Busy, UnknownId."""

        def work(segment: Segment, wait_s: float) -> bytes:
            return segment.read(offset, count, wait_s=wait_s, bytes_max=MEMORY_REPLY_BYTES_MAX)

        return await self._do(identifier, region, work)

    async def write(self, identifier: int, region: Region, data: bytes, offset: int | None = None) -> Encoded:
        """Replace the value, or write over a part of it. Raises as `Segment.write`, and UnknownId."""

        def work(segment: Segment, wait_s: float) -> None:
            segment.write(data, offset, wait_s=wait_s)

        await self._do(identifier, region, work)
        return OK

    def length(self, identifier: int, region: Region) -> int:
        """Of the value."""
        try:
            return self._segment(identifier, region.size).length()
        except NotRunning:
            raise self._gone(identifier) from None

    async def _do(self, identifier: int, region: Region, work: Callable[[Segment, float], T]) -> T:
        segment = self._segment(identifier, region.size)
        try:
            return await self._turns.do(identifier, functools.partial(work, segment))
        except NotRunning:
            raise self._gone(identifier) from None

    def _gone(self, identifier: int) -> UnknownId:
        if self._region(identifier) is None:
            return UnknownId(f"no region has the id {identifier} ({identifier:#x})")
        return UnknownId(
            f"the file of shared region {identifier:#x} is gone from {self._shelf.path}",
            hint="Somebody removed it; systemd does at the end of a session, unless logind has RemoveIPC=no.",
        )

    def describe(self, identifier: int, region: Region) -> bytes:
        """How to map a region, as JSON."""
        figures = {
            "id": identifier,
            "size": region.size,
            "node": self._node.name,
            "directory": str(self._shelf.path),
            "identity": self._store.identity,
            "note": region.note.decode("utf-8", "replace"),
        }
        return msgspec.json.encode(figures)

    # --- order --------------------------------------------------------------------------------

    async def tidy(self) -> None:
        """Remove files that no region wants, finish what killed writers had begun, forget what is lost."""
        names = await asyncio.to_thread(self._shelf.names)
        found = self._sweep(names)
        for identifier, size, name in found:
            if name.endswith(_REDO):
                await asyncio.to_thread(self._finish, self._segment(identifier, size))
        for identifier in self._known.keys() - {identifier for identifier, _size, _name in found}:
            region = self._region(identifier) if self._shelf.in_memory else None
            if region is not None and not self._segment(identifier, region.size).exists():
                self._forget(identifier, region)
        self._count()

    def _sweep(self, names: list[str]) -> list[tuple[int, int, str]]:
        """Remove what no region wants; of all other files returns id and size of the region, and name."""
        found = []
        for name in names:
            try:
                identifier = int(name.removesuffix(_REDO), 16)
            except ValueError:
                continue  # not made by us
            region = self._region(identifier)
            if region is not None:
                found.append((identifier, region.size, name))
            elif identifier not in self._making:
                self.swept += 1
                self._segment(identifier, 1).remove()
        return found

    def _finish(self, segment: Segment) -> None:
        try:
            segment.finish()
        except (Busy, NotRunning) as error:  # somebody is at it, or it is gone: the next round will see
            log.debug("%r is left as it is: %s", segment, error)

    def _forget_lost(self) -> None:
        """At the start: regions whose files the machine's reboot has taken."""
        with self._store.batching() as batch:
            lost = list(batch.shared_regions())
        for identifier, region in lost:
            self._forget(identifier, region)

    def _forget(self, identifier: int, region: Region) -> None:
        log.warning("shared region %#x of %d bytes is lost: its file is gone", identifier, region.size)
        with self._store.batching() as batch:
            batch.delete_region(identifier, region)
        self.lost += 1
        self._known.pop(identifier, None)

    def close(self) -> None:
        """Have all of it on disk, if it lies on one: takes as long as the disk does."""
        self._turns.close()
        self._shelf.leave()
        if not self._shelf.in_memory:
            for identifier in list(self._known):
                region = self._region(identifier)
                if region is not None and self._segment(identifier, region.size).exists():
                    self._segment(identifier, region.size).sync()
