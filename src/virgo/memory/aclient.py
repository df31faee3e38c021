"""Memory for asyncio: the same surface as `virgo.memory.client`, with `await`.

    region = await cloud.memory.malloc(100)
    await region.set(b"data")
    await cloud.memory.set("greeting", b"hello")
    async for key, value in cloud.memory.items():
        ...

What asks the node is a method that is awaited, also where the blocking face has a property (`size`, `node`,
`mapped`) or an operator: `get`, `set`, `delete`, `exists` and `count` stand for `[]`, `in`, `del` and `len`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from virgo.errors import NotRunning, VirgoError
from virgo.memory import calls, regioncalls
from virgo.memory.amapping import AsyncKeyMapping, AsyncNamespace, AsyncReach
from virgo.memory.aregion import AsyncRegion
from virgo.memory.calls import Data, Key
from virgo.memory.figures import Pool, SpaceInfo
from virgo.memory.keeping import checked
from virgo.memory.leases import Nearby, View, descriptor_of, load_arrays, not_near
from virgo.memory.mapped import MISSING
from virgo.memory.regioncalls import RegionInfo
from virgo.memory.segments import Segment
from virgo.wire.call import AsyncRunner, Call

__all__ = ["AsyncMemoryClient", "AsyncNamespace", "AsyncRegion"]

if TYPE_CHECKING:
    from virgo.memory.arrays import SharedArray

T = TypeVar("T")


class AsyncMemoryClient(AsyncKeyMapping):
    """The cloud's memory, through one node, for one event loop; see `MemoryClient`."""

    def __init__(self, runner: AsyncRunner, *, mapped: bool = True) -> None:
        super().__init__(AsyncReach(runner, mapped=mapped), b"")
        self._near = Nearby()

    def __repr__(self) -> str:
        return f"<AsyncMemoryClient {self._reach!r}>"

    async def mapped(self) -> bool:
        """Whether the connected node's store is read by mapping."""
        return (self._reach.local or await self._reach.attach()) is not None

    # --- regions ------------------------------------------------------------------------------

    async def malloc(
        self,
        size: int,
        *,
        node: str | None = None,
        shared: bool = False,
        copies: int = 1,
        durable: bool = False,
    ) -> AsyncRegion:
        """Allocate a region; see `MemoryClient.malloc`."""
        identifier = await self._reach.run(
            regioncalls.malloc_kept(size, node, checked(copies, durable), shared=shared)
        )
        if shared:
            await self.segment(identifier)
        return AsyncRegion(self, identifier, size)

    async def segment(self, identifier: int) -> Segment | None:
        """The file of a shared region, None if it is not shared or not on this machine. Raises UnknownId."""
        info = await self._reach.run(regioncalls.segment(identifier))
        return None if info is None else self._near.learn(info)

    async def view_region(
        self, identifier: int, *, write: bool = False, timeout_s: float = 0.0
    ) -> AbstractContextManager[memoryview]:
        """A region's bytes, of a shared one without a copy; see `Region.view`."""
        segment = await self.segment(identifier)
        if segment is None and write:
            raise not_near(identifier, "writing in place")
        found = await self.get_region(identifier) if segment is None else segment
        return View(found, write=write, timeout_s=timeout_s)

    async def array(self, shape: Any, dtype: Any = float, *, node: str | None = None) -> SharedArray:
        """A NumPy array of zeros in shared memory; see `MemoryClient.array`.

        Its own `free`, `refresh` and `write` are awaited, as are those of its region; to wait for the
        lease there is `writing_async`. The loop's thread has it at first, until `release`.
        """
        arrays = load_arrays()
        size, note = arrays.describe(shape, dtype)
        call = regioncalls.malloc(size, node or regioncalls.HERE, shared=True, note=note)
        identifier = await self._reach.run(call)
        try:
            found: SharedArray = arrays.creator(await self.attach(identifier))
        except BaseException:
            with contextlib.suppress(VirgoError):  # which is no more than what went wrong first
                await self.free_region(identifier)
            raise
        return found

    async def attach(self, identifier: int) -> SharedArray:
        """The array of an id; see `MemoryClient.attach`."""
        arrays = load_arrays()
        info = await self._reach.run(regioncalls.segment(identifier))
        if info is None:
            raise arrays.no_array(identifier)
        segment = self._near.learn(info)
        if segment is not None:
            await asyncio.to_thread(segment.settle)  # which may wait
        array: SharedArray = arrays.build(info, segment, AsyncRegion(self, info.id, info.size), self._refresh)
        await array.refresh()
        return array

    async def _refresh(self, array: SharedArray) -> None:
        arrays = load_arrays()
        for offset, count in arrays.pieces(array):
            arrays.fill(array, offset, await self.read_region(array.region.id, offset, count))

    async def region_descriptor(self, identifier: int, *, write: bool = False) -> int:
        """A descriptor of a shared region's file; see `Region.descriptor`."""
        segment = await self.segment(identifier)
        if segment is None:
            raise not_near(identifier, "a descriptor")
        return await asyncio.to_thread(descriptor_of, segment, write=write)

    async def _on_file(self, identifier: int, work: Callable[[Segment], T], call: Call[T]) -> T:
        """On the file of a shared region that is known to be near, in a thread; else by the node."""
        found = MISSING
        if self._near:
            found = await asyncio.to_thread(self._near.do, identifier, work, MISSING)
        return await self._reach.run(call) if found is MISSING else found

    def region(self, identifier: int) -> AsyncRegion:
        """The region of an id that someone else allocated."""
        return AsyncRegion(self, identifier)

    async def get_region(self, identifier: int) -> bytes:
        """A region's value; b"" before the first set. Raises UnknownId, NodeLost."""
        known = self._reach.regions.get(identifier)
        if known is not None:
            return known
        local = self._reach.local or await self._reach.attach()
        if local is not None:
            try:
                found = local.region(identifier, self._reach.regions)
            except NotRunning:
                self._reach.detach()
            else:
                if found is not MISSING:
                    return found  # type: ignore[no-any-return]
        return await self._on_file(identifier, Segment.read, regioncalls.get_region(identifier))

    async def read_region(self, identifier: int, offset: int = 0, size: int | None = None) -> bytes:
        """A part of a region's value; see `Region.read`."""
        call = regioncalls.get_region(identifier, offset, size)
        local = self._reach.local or await self._reach.attach()
        if local is not None:
            try:
                found = local.read_region(identifier, offset, size)
            except NotRunning:
                self._reach.detach()
            else:
                if found is not MISSING:
                    return found  # type: ignore[no-any-return]
        return await self._on_file(identifier, lambda segment: segment.read(offset, size), call)

    async def set_region(self, identifier: int, data: Data, offset: int | None = None) -> None:
        """Replace a region's value, or write over a part of it."""
        raw = calls.encode_data(data)
        call = regioncalls.set_region(identifier, raw, offset)
        await self._on_file(identifier, lambda segment: segment.write(raw, offset), call)

    async def free_region(self, identifier: int) -> None:
        """Free a region."""
        self._near.forget(identifier)
        await self._reach.run(regioncalls.free_region(identifier))

    async def describe(self, identifier: int) -> RegionInfo:
        """What its home knows of a region."""
        return await self._reach.run(regioncalls.describe(identifier))

    # --- keys ---------------------------------------------------------------------------------

    async def namespace(
        self, name: Key, *, cache: bool | None = None, copies: int = 1, durable: bool = False
    ) -> AsyncNamespace:
        """Declare a namespace, and get its keys as a mapping; see `MemoryClient.namespace`."""
        raw = checked(copies, durable).mark + calls.encode_key(name)
        await self._reach.run(calls.declare_space(raw, cache))
        return AsyncNamespace(self._reach, raw)

    async def drop(self, name: Key) -> None:
        """Delete all keys of a namespace at once; see `MemoryClient.drop`."""
        await self._reach.run(calls.drop_space(calls.encode_key(name)))

    async def namespaces(self) -> list[SpaceInfo]:
        """The declared namespaces, with what the connected node holds of each."""
        return await self._reach.run(calls.SPACES)

    async def count(self) -> int:
        """How many keys there are, over all nodes."""
        return await self._reach.run(calls.count_keys())

    async def pool(self) -> Pool:
        """All nodes' parts of the pool; see `MemoryClient.pool`."""
        return await self._reach.run(calls.POOL)

    async def clear(self) -> None:
        """Delete all keys of the cloud; regions stay."""
        await self._reach.run(calls.flush())

    async def stats(self) -> dict[str, Any]:
        """Figures of the connected node's pool."""
        return await self._reach.run(calls.stats())

    async def close(self) -> None:
        """Let go of the map; the runner is the caller's."""
        self._reach.detach()
