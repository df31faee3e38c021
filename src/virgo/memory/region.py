"""A region as users hold it; `virgo.memory.aregion` has the same for asyncio.

It knows its id and asks the client for everything else, so it may be kept, copied and sent away.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from virgo.memory.calls import Data, RegionInfo
from virgo.wire import near
from virgo.wire.call import Runner

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

    def free(self) -> None:
        """Give the memory back. Raises UnknownId if it was freed already."""
        self._client.free_region(self.id)


def arrived(identifier: int, size: int | None) -> Region:
    """A region that came from another process, bound to the connection of this one."""
    return Region(_Near(), identifier, size)  # type: ignore[arg-type]


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
