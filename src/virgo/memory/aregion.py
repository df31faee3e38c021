"""A region for asyncio: the same surface as `virgo.memory.region`, with `await`."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from virgo.members import node_of
from virgo.memory.calls import Data
from virgo.memory.regioncalls import RegionInfo
from virgo.wire.call import whole

if TYPE_CHECKING:
    from virgo.memory.aclient import AsyncMemoryClient


class AsyncRegion:
    """An allocation; `async with` frees it at the end of the block.

    Attributes:
        id: unique in the cloud, and never given again.
    """

    __slots__ = ("_client", "_info", "_size", "id")

    def __init__(self, client: AsyncMemoryClient, identifier: int, size: int | None = None) -> None:
        self._client = client
        self._info: RegionInfo | None = None
        self._size = size
        self.id = identifier

    def __repr__(self) -> str:
        return f"<AsyncRegion {self.id:#x}{'' if self._size is None else f' of {self._size} bytes'}>"

    def __reduce__(self) -> tuple[Any, tuple[int, int | None]]:
        """Elsewhere it arrives as a `Region`: there may be no event loop."""
        from virgo.memory.region import arrived

        return arrived, (self.id, self._size)

    async def __aenter__(self) -> AsyncRegion:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.free()

    def __virgo_node__(self) -> int:
        return node_of(self.id)

    async def size(self) -> int:
        """Declared bytes: the longest value."""
        if self._size is None:
            self._size = (await self._lasting()).size
        return self._size

    async def node(self) -> str:
        """Name of its home node."""
        return (await self._lasting()).node

    async def _lasting(self) -> RegionInfo:
        """What never changes of it, asked once."""
        if self._info is None:
            self._info = await self.stats()
        return self._info

    async def stats(self) -> RegionInfo:
        """What its home knows of it now. Raises UnknownId, NodeLost."""
        return await self._client.describe(self.id)

    async def set(self, data: Data) -> None:
        """Replace the value; see `Region.set`."""
        await self._client.set_region(self.id, data)

    async def get(self) -> bytes:
        """The value; b"" before the first set. Raises UnknownId, NodeLost."""
        return await self._client.get_region(self.id)

    async def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of the value, of one moment; see `Region.read`."""
        return await self._client.read_region(self.id, whole(offset, "the offset"), size)

    async def write(self, data: Data, offset: int = 0) -> None:
        """Write over a part of the value; see `Region.write`."""
        await self._client.set_region(self.id, data, whole(offset, "the offset"))

    def view(self, *, write: bool = False, timeout_s: float = 0.0) -> AsyncView:
        """The bytes as a memoryview, for the time of an `async with` block; see `Region.view`.

        Only that of a shared region is no copy: who awaits something in the block would hold up the pool.
        """
        return AsyncView(self._client, self.id, write=write, timeout_s=timeout_s)

    async def descriptor(self, *, write: bool = False) -> int:
        """A descriptor of a shared region's file, to be closed by the caller; see `Region.descriptor`."""
        return await self._client.region_descriptor(self.id, write=write)

    async def free(self) -> None:
        """Give the memory back. Raises UnknownId if it was freed already."""
        await self._client.free_region(self.id)


class AsyncView:
    """The bytes of a region for the time of an `async with` block."""

    def __init__(self, client: AsyncMemoryClient, identifier: int, *, write: bool, timeout_s: float) -> None:
        self._client = client
        self._id = identifier
        self._write = write
        self._timeout_s = timeout_s
        self._view: AbstractContextManager[memoryview] | None = None

    def __repr__(self) -> str:
        return f"<AsyncView of region {self._id:#x}>"

    async def __aenter__(self) -> memoryview:
        self._view = await self._client.view_region(self._id, write=self._write, timeout_s=self._timeout_s)
        return await asyncio.to_thread(self._view.__enter__)  # which may wait

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._view is not None:
            self._view.__exit__(kind, error, trace)
