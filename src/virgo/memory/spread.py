"""Regions larger than a chunk, spread over nodes.

A region's home keeps its manifest: the version whose chunks are the value, and the plan, which says for
each chunk what node has room reserved for it. A set writes the chunks of a new version beside the old
ones, then flips the manifest in one transaction, then drops the old ones; so a get sees a whole value,
and one that is overtaken begins anew. Sets of one region take turns.

If a node of the plan is lost, full or out of disk, a set moves its chunks to others. A get needs the
nodes of the value: one that is lost is NodeLost. What a set that died midway or a lost node leaves behind
is swept: each node asks the homes of the chunks it holds which are still wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace

from virgo.errors import DiskFull, NodeLost, NoNode, PoolFull, UnknownId
from virgo.limits import (
    MEMORY_CHUNK_BYTES,
    MEMORY_CHUNKS_PARALLEL,
    MEMORY_GET_ATTEMPTS_MAX,
    MEMORY_PLACE_ATTEMPTS_MAX,
)
from virgo.members import compose_id
from virgo.memory import core, parallel
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

    def wanted(self, identifier: int, number: int) -> tuple[int, list[int]] | None:
        """What a node should hold of a region: reserved bytes and versions; None while that changes."""
        if identifier in self._turns:
            return None
        region = self._region(identifier)
        if region is None:
            return 0, []
        return region.reserved().get(number, 0), [region.version] if number in region.plan else []

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

    # --- set ----------------------------------------------------------------------------------

    async def write(self, identifier: int, data: bytes) -> Encoded:
        """Write the new version beside the old one, flip, drop the old one."""
        async with self._turn(identifier):
            with self._store.batching() as batch:
                version = batch.next_serial()
            old = self._known(identifier)
            core.check_fits(len(data), old.size, identifier)
            new = replace(old, version=version, length=len(data))
            asked: set[int] = set()
            try:
                new = await self._write_chunks(identifier, new, memoryview(data), asked)
                with self._store.batching() as batch:
                    batch.put_region(identifier, new)
            except BaseException:
                self._tidy(identifier, asked, version)
                raise
            gone = (set(old.plan) | asked) - set(new.plan)
            holders = set(old.plan[: old.used_chunks()]) - gone
            await parallel.settle(self._chunks.drop(number, identifier, old.version) for number in holders)
            self._tidy(identifier, gone)
        return OK

    async def _write_chunks(
        self, identifier: int, region: Region, data: memoryview, asked: set[int]
    ) -> Region:
        """Write all chunks, moving those whose node cannot take them; returns the region as planned now.

        `asked` gathers the nodes that may have got something.
        """
        count = region.used_chunks()
        todo = set(range(count))
        bad = set(region.plan[:count]) - {member.number for member in self._node.members()}
        failure: Exception = NodeLost(f"nodes {sorted(bad)} hold room for region {identifier:#x}")
        for _ in range(MEMORY_PLACE_ATTEMPTS_MAX):
            while bad & set(region.plan[:count]):
                moved = core.replace_chunks(region, bad, await self._chunks.rooms())
                todo |= {index for index in range(count) if moved[index] != region.plan[index]}
                region = replace(region, plan=moved)
                asked |= set(moved)
                bad |= await self._reserve(identifier, region)
            totals, order = region.reserved(), sorted(todo)
            asked |= {region.plan[index] for index in order}
            results = await parallel.settle(
                (
                    self._chunks.put(
                        region.plan[index],
                        identifier,
                        region.version,
                        index,
                        totals[region.plan[index]],
                        data[index * MEMORY_CHUNK_BYTES : (index + 1) * MEMORY_CHUNK_BYTES],
                    )
                    for index in order
                ),
                at_once=MEMORY_CHUNKS_PARALLEL,
            )
            numbers = [region.plan[index] for index in order]
            bad |= _unable(numbers, results)
            todo = {index for index, result in zip(order, results, strict=True) if result is not None}
            if not todo:
                return region
            failure = next(result for result in results if isinstance(result, Exception))
        raise failure

    # --- get ----------------------------------------------------------------------------------

    async def read(self, identifier: int) -> bytes:
        """The value of one version, whole. Raises NodeLost, UnknownId."""
        for _ in range(MEMORY_GET_ATTEMPTS_MAX):
            value = await self._read_once(identifier)
            if value is not None:
                return value
        async with self._turn(identifier):
            value = await self._read_once(identifier)
        if value is None:
            plan = self._known(identifier).plan
            raise NodeLost(
                f"a part of region {identifier:#x} is gone from one of the nodes {sorted(set(plan))}"
            )
        return value

    async def _read_once(self, identifier: int) -> bytes | None:
        """The value, or None if a chunk was gone: a set has replaced it meanwhile."""
        region = self._known(identifier)
        parts = await parallel.gather(
            (
                self._chunks.get(region.plan[index], identifier, region.version, index)
                for index in range(region.used_chunks())
            ),
            at_once=MEMORY_CHUNKS_PARALLEL,
        )
        return None if None in parts else b"".join(part for part in parts if part is not None)


def _unable(numbers: Iterable[int], results: Iterable[object]) -> set[int]:
    """Nodes that are lost or full; any other failure is raised."""
    unable = set()
    for number, result in zip(numbers, results, strict=True):
        if isinstance(result, (NodeLost, NoNode, PoolFull, DiskFull)):
            unable.add(number)
        elif isinstance(result, Exception):
            raise result
    return unable
