"""Regions larger than a chunk, spread over nodes.

A region's home keeps its manifest: the versions whose chunks are the value, and the plan, which says for
each chunk what node has room reserved for it. A set writes the chunks of a new version beside the old
ones, then flips the manifest in one transaction, then drops the old ones; so a get sees a whole value,
and one that is overtaken begins anew. A write at an offset does the same with the chunks that it touches,
so the others stay of their version. Changes of one region take turns.

If a node of the plan is lost, full or out of disk, a change moves the chunks that it writes to others. A
get needs the nodes of the value: one that is lost is NodeLost. What a change that died midway or a lost node
leaves behind is swept: each node asks the homes of the chunks it holds which are still wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import replace

from virgo import parallel
from virgo.errors import DiskFull, NodeLost, NoNode, PoolFull, UnknownId
from virgo.limits import (
    MEMORY_CHUNK_BYTES,
    MEMORY_CHUNKS_PARALLEL,
    MEMORY_GET_ATTEMPTS_MAX,
    MEMORY_PLACE_ATTEMPTS_MAX,
)
from virgo.members import compose_id
from virgo.memory import core
from virgo.memory.chunks import Chunks
from virgo.memory.core import Region
from virgo.memory.store import Store
from virgo.module import NodeServices
from virgo.wire.resp import OK, Encoded


class _Turn:
    """The turns of one region: a mutex, and how many hold or await it."""

    __slots__ = ("mutex", "users")

    def __init__(self) -> None:
        self.mutex = asyncio.Lock()
        self.users = 0


class Spread:
    """The spread regions whose home is this node."""

    def __init__(self, node: NodeServices, store: Store, chunks: Chunks) -> None:
        self._node = node
        self._number = node.number
        self._store = store
        self._chunks = chunks
        self._turns: dict[int, _Turn] = {}
        chunks.wanted = self.wanted

    def __repr__(self) -> str:
        return f"<Spread of node {self._number}, {len(self._turns)} at work>"

    @contextlib.asynccontextmanager
    async def _turn(self, identifier: int) -> AsyncIterator[None]:
        """One change of a region at a time."""
        turn = self._turns.setdefault(identifier, _Turn())
        turn.users += 1
        try:
            async with turn.mutex:
                yield
        finally:
            turn.users -= 1
            if not turn.users:
                del self._turns[identifier]

    def wanted(self, identifier: int, number: int) -> tuple[int, list[int], list[int]] | None:
        """What a node should hold of a region; None while that changes.

        That is: reserved bytes; versions; if it has only some chunks of these, version and index of each.
        """
        if identifier in self._turns:
            return None
        region = self._region(identifier)
        if region is None:
            return 0, [], []
        held = region.held(number)
        exactly = [value for pair in held for value in pair] if region.versions else []
        return region.reserved().get(number, 0), sorted({version for version, _ in held}), exactly

    def _region(self, identifier: int) -> Region | None:
        with self._store.batching() as batch:
            return batch.region(identifier)

    def _known(self, identifier: int) -> Region:
        region = self._region(identifier)
        if region is None:
            raise UnknownId(f"no region has the id {identifier} ({identifier:#x})")
        return region

    # --- malloc and free ----------------------------------------------------------------------

    async def malloc(self, size: int, *, pinned: bool) -> int:
        """A region of which every chunk has its room reserved. Raises PoolFull."""
        with self._store.batching() as batch:
            identifier = compose_id(self._number, batch.next_serial())
        async with self._turn(identifier):
            rooms = {self._number: self._store.room_bytes()} if pinned else await self._chunks.rooms()
            sizes = [core.chunk_bytes(size, index) for index in range(core.chunk_count(size))]
            asked: set[int] = set()
            try:
                for _ in range(MEMORY_PLACE_ATTEMPTS_MAX):
                    region = Region(size, spread=True, plan=tuple(core.place_chunks(sizes, rooms)))
                    asked |= set(region.plan)
                    full = await self._reserve(identifier, region)
                    if not full:
                        with self._store.batching() as batch:
                            batch.put_region(identifier, region)
                        self._tidy(identifier, asked - set(region.plan))
                        return identifier
                    rooms = {number: room for number, room in rooms.items() if number not in full}
                raise PoolFull(f"no nodes keep room for a region of {size} bytes")
            except BaseException:
                self._tidy(identifier, asked)
                raise

    async def free(self, identifier: int) -> Encoded:
        """Forget the region, then its chunks; those on a lost node go when it is back."""
        async with self._turn(identifier):
            region = self._known(identifier)
            with self._store.batching() as batch:
                batch.delete_region(identifier, region)
            await parallel.settle(
                self._chunks.reserve(number, identifier, 0) for number in sorted(set(region.plan))
            )
        return OK

    async def _reserve(self, identifier: int, region: Region) -> set[int]:
        """Reserve as planned; returns the nodes that could not."""
        totals = region.reserved()
        results = await parallel.settle(
            self._chunks.reserve(number, identifier, total) for number, total in totals.items()
        )
        return _unable(totals, results)

    def _tidy(self, identifier: int, asked: set[int], version: int = 0) -> None:
        """In the background free what nodes got in vain; what cannot be reached now is swept later.

        It takes its turn, for the next set may already count on a node that this one had only asked.
        """

        async def tidy() -> None:
            async with self._turn(identifier):
                region = self._region(identifier)
                kept = set() if region is None else set(region.plan)
                await parallel.settle(self._chunks.reserve(number, identifier, 0) for number in asked - kept)
                if version and (region is None or region.version != version):
                    await parallel.settle(
                        self._chunks.drop(number, identifier, version) for number in asked & kept
                    )

        if asked:
            self._node.spawn(tidy(), name="tidy chunks")

    # --- set and write ------------------------------------------------------------------------

    async def put(self, identifier: int, data: bytes) -> Encoded:
        """Replace the value."""
        async with self._turn(identifier):
            old = self._known(identifier)
            core.check_fits(len(data), old.size, identifier)
            new = replace(old, version=self._next_version(), length=len(data), versions=())
            whole = memoryview(data)
            chunks = {
                index: whole[index * MEMORY_CHUNK_BYTES : (index + 1) * MEMORY_CHUNK_BYTES]
                for index in range(new.used_chunks())
            }
            await self._change(identifier, old, new, chunks)
        return OK

    async def write(self, identifier: int, data: bytes, offset: int) -> Encoded:
        """Write over a part of the value: the chunks that are touched, and no other, are written anew."""
        async with self._turn(identifier):
            old = self._known(identifier)
            core.check_span(len(data), offset, old.size, identifier)
            if not data:
                return OK
            new = core.written(old, self._next_version(), offset, len(data))
            whole, chunks = memoryview(data), {}
            for index in core.touched(offset, len(data)):
                start, stop = core.chunk_part(offset, len(data), index)
                before = index * MEMORY_CHUNK_BYTES + start - offset
                piece = whole[before : before + stop - start]
                present = core.chunk_bytes(old.length, index) if old.chunk_version(index) else 0
                if start or stop < present:
                    kept = await self._parts(identifier, old, index * MEMORY_CHUNK_BYTES, present)
                    if kept is None:
                        raise self._torn(identifier, old)
                    piece = memoryview(core.insert(kept[0] if kept else b"", bytes(piece), start))
                chunks[index] = piece
            await self._change(identifier, old, new, chunks)
        return OK

    def _next_version(self) -> int:
        with self._store.batching() as batch:
            return batch.next_serial()

    async def _change(
        self, identifier: int, old: Region, new: Region, chunks: Mapping[int, memoryview]
    ) -> None:
        """Write chunks of the new version beside the old ones, flip, drop those that they replace."""
        asked: set[int] = set()
        try:
            new = await self._write_chunks(identifier, new, chunks, asked)
            with self._store.batching() as batch:
                batch.put_region(identifier, new)
        except BaseException:
            self._tidy(identifier, asked, new.version)
            raise
        gone = (set(old.plan) | asked) - set(new.plan)
        stale: dict[tuple[int, int], list[int]] = {}
        for index in range(old.used_chunks()):
            version = old.chunk_version(index)
            if version and version != new.chunk_version(index) and old.plan[index] not in gone:
                stale.setdefault((old.plan[index], version), []).append(index)
        await parallel.settle(
            self._chunks.drop(number, identifier, version, indices if new.versions else None)
            for (number, version), indices in stale.items()
        )
        before, now = old.reserved(), new.reserved()
        await parallel.settle(
            self._chunks.reserve(number, identifier, total)
            for number, total in now.items()
            if total < before.get(number, 0)
        )
        self._tidy(identifier, gone)

    async def _write_chunks(
        self, identifier: int, region: Region, chunks: Mapping[int, memoryview], asked: set[int]
    ) -> Region:
        """Write chunks, moving those whose node cannot take them; returns the region as planned now.

        `asked` gathers the nodes that may have got something.
        """
        todo = set(chunks)
        movable = todo | {index for index in range(len(region.plan)) if not region.chunk_version(index)}
        bad = {region.plan[index] for index in chunks} - {member.number for member in self._node.members()}
        failure: Exception = NodeLost(f"nodes {sorted(bad)} hold room for region {identifier:#x}")
        for _ in range(MEMORY_PLACE_ATTEMPTS_MAX):
            while bad & {region.plan[index] for index in chunks}:
                moved = core.replace_chunks(region, bad, await self._chunks.rooms(), movable)
                todo |= {index for index in chunks if moved[index] != region.plan[index]}
                region = replace(region, plan=moved)
                asked |= set(moved)
                bad |= await self._reserve(identifier, region)
            totals, order = region.reserved(), sorted(todo)
            numbers = [region.plan[index] for index in order]
            asked |= set(numbers)
            results = await parallel.settle(
                (
                    self._chunks.put(number, identifier, region.version, index, totals[number], chunks[index])
                    for number, index in zip(numbers, order, strict=True)
                ),
                at_once=MEMORY_CHUNKS_PARALLEL,
            )
            bad |= _unable(numbers, results)
            todo = {index for index, result in zip(order, results, strict=True) if result is not None}
            if not todo:
                return region
            failure = next(result for result in results if isinstance(result, Exception))
        raise failure

    # --- get and read -------------------------------------------------------------------------

    async def read(self, identifier: int, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of the value of one moment. Raises NodeLost, UnknownId, BadArgument."""
        for _ in range(MEMORY_GET_ATTEMPTS_MAX):
            value = await self._read_once(identifier, offset, size)
            if value is not None:
                return value
        async with self._turn(identifier):
            value = await self._read_once(identifier, offset, size)
        if value is None:
            raise self._torn(identifier, self._known(identifier))
        return value

    async def _read_once(self, identifier: int, offset: int, size: int | None) -> bytes | None:
        """The bytes, or None if a chunk was gone: a change has replaced it meanwhile."""
        region = self._known(identifier)
        core.check_part(offset, size, region.size, identifier)
        there = max(0, region.length - offset)
        parts = await self._parts(identifier, region, offset, there if size is None else min(size, there))
        return None if parts is None else b"".join(parts)

    async def _parts(self, identifier: int, region: Region, offset: int, count: int) -> list[bytes] | None:
        """Bytes of the value, by chunk; None if one is gone."""

        async def part(index: int) -> bytes | None:
            start, stop = core.chunk_part(offset, count, index)
            version = region.chunk_version(index)
            if not version:
                return bytes(stop - start)
            return await self._chunks.get(region.plan[index], identifier, version, index, start, stop)

        found = await parallel.gather(
            (part(index) for index in core.touched(offset, count)), at_once=MEMORY_CHUNKS_PARALLEL
        )
        parts = [piece for piece in found if piece is not None]
        return parts if len(parts) == len(found) else None

    def _torn(self, identifier: int, region: Region) -> NodeLost:
        nodes = sorted(set(region.plan))
        return NodeLost(f"a part of region {identifier:#x} is gone from one of the nodes {nodes}")


def _unable(numbers: Iterable[int], results: Iterable[object]) -> set[int]:
    """Nodes that are lost or full; any other failure is raised."""
    unable = set()
    for number, result in zip(numbers, results, strict=True):
        if isinstance(result, (NodeLost, NoNode, PoolFull, DiskFull)):
            unable.add(number)
        elif isinstance(result, Exception):
            raise result
    return unable
