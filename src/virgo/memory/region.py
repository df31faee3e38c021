"""A region as users hold it; `virgo.memory.aregion` has the same for asyncio.

It knows its id and asks the client for everything else, so it may be kept, copied and sent away.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from virgo.members import node_of
from virgo.memory.calls import Data
from virgo.memory.regioncalls import RegionInfo
from virgo.wire import near
from virgo.wire.call import Runner, whole

_WRITABLE = 1  # PyBUF_WRITABLE: `inspect.BufferFlags` came with 3.12

if TYPE_CHECKING:
    from virgo.memory.client import MemoryClient


class Region:
    """An allocation. As a context manager it is freed at the end of the block.

    It may travel, as an argument of a clone for example: it arrives as its id, and reaches the cloud through
    the node that is near there.

    Attributes:
        id: unique in the cloud, and never given again.
        size: declared bytes: the longest value.
    """

    __slots__ = ("_client", "_info", "_size", "id")

    def __init__(self, client: MemoryClient, identifier: int, size: int | None = None) -> None:
        self._client = client
        self._info: RegionInfo | None = None
        self._size = size
        self.id = identifier

    def __repr__(self) -> str:
        return f"<Region {self.id:#x}{'' if self._size is None else f' of {self._size} bytes'}>"

    def __reduce__(self) -> tuple[Any, tuple[int, int | None]]:
        return arrived, (self.id, self._size)

    def __copy__(self) -> Region:
        return Region(self._client, self.id, self._size)

    def __deepcopy__(self, _memo: object) -> Region:
        return self.__copy__()

    def __enter__(self) -> Region:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()

    def __virgo_node__(self) -> int:
        return node_of(self.id)

    @property
    def size(self) -> int:
        """Declared bytes."""
        if self._size is None:
            self._size = self.stats().size
        return self._size

    @property
    def node(self) -> str:
        """Name of its home node."""
        if self._info is None:
            self._info = self.stats()
        return self._info.node

    def stats(self) -> RegionInfo:
        """What its home knows of it now. Raises UnknownId, NodeLost."""
        return self._client.describe(self.id)

    def set(self, data: Data) -> None:
        """Replace the value; readers see the old or the new one, whole.

        Raises:
            TooLarge: longer than the region. UnknownId: freed. NodeLost, PoolFull, DiskFull.
        """
        self._client.set_region(self.id, data)

    def get(self) -> bytes:
        """The value; b"" before the first set. Raises UnknownId, NodeLost."""
        return self._client.get_region(self.id)

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of the value, of one moment; fewer than `size`, or none, where the value ends before.

        Args:
            offset: where to begin, from 0 to the declared size.
            size: how many bytes, within the declared size; None for the rest of the value.

        Raises:
            BadArgument: outside of the region, or no whole numbers. UnknownId, NodeLost.
        """
        return self._client.read_region(self.id, whole(offset, "the offset"), size)

    def write(self, data: Data, offset: int = 0) -> None:
        """Write over a part of the value, which is as atomic as a `set`; a gap before it is zeros.

        Raises:
            TooLarge, BadArgument: outside of the region, or no whole number. UnknownId, NodeLost, PoolFull,
                DiskFull.
        """
        self._client.set_region(self.id, data, whole(offset, "the offset"))

    def view(self, *, write: bool = False, timeout_s: float = 0.0) -> AbstractContextManager[memoryview]:
        """The bytes as a memoryview, for the time of a `with` block.

        Read-only: the value as of now, or of a shared region of this machine its memory itself, which shows
        what others write. With `write` all bytes of such a region, and the right to write them in place.

        Where they are mapped there is no copy. Keep the block short then, fork nothing in it, and keep no
        part of the view: of a region that is not shared the pool keeps the old value until its end.

        Raises:
            Busy: another one has the right to write, for `timeout_s` seconds.
            BadArgument: `write`, and it is not a shared region of this machine.
            BufferError: at the end, if something still refers to what could be written.
        """
        return self._client.view_region(self.id, write=write, timeout_s=timeout_s)

    def descriptor(self, *, write: bool = False) -> int:
        """A descriptor of a shared region's file, to be closed by the caller: to map, or to pass on.

        The region is the first `size` bytes of the file. Raises BadArgument if it is not on this machine.
        """
        return self._client.region_descriptor(self.id, write=write)

    def __buffer__(self, flags: int) -> memoryview:
        """For `memoryview(region)`, from Python 3.12 on: read-only, as `view`."""
        if flags & _WRITABLE:
            raise BufferError("a region is read-only here; `with region.view(write=True)` is not")
        return self._client.hold_region(self.id)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """For `numpy.asarray(region)`, read-only bytes, also before Python 3.12."""
        data = self._client.hold_region(self.id)
        return {"version": 3, "typestr": "|u1", "shape": (len(data),), "data": data}

    def free(self) -> None:
        """Give the memory back. Raises UnknownId if it was freed already."""
        self._client.free_region(self.id)


def arrived(identifier: int, size: int | None) -> Region:
    """A region that came from another process, bound to the connection of this one."""
    return Region(near_client(), identifier, size)


def near_client() -> MemoryClient:
    """The client of this process's connection, for what came by pickle."""
    return _Near()  # type: ignore[return-value]


class _Near:
    """What a region needs of a `MemoryClient`, through the process's connection of the moment."""

    known: tuple[Runner, MemoryClient] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(client_near(), name)


def client_near() -> MemoryClient:
    """The process's client of the moment."""
    from virgo.memory.client import MemoryClient

    runner = near.connection()
    if _Near.known is None or _Near.known[0] is not runner:
        _Near.known = runner, MemoryClient(runner)  # which may map the node's store: once is enough
    return _Near.known[1]
