"""Memory as users hold it: `cloud.memory`. `virgo.memory.aclient` has the same for asyncio.

    cloud.memory["greeting"] = b"hello"
    with cloud.memory.malloc(100) as region:
        region.set(b"data")

`cloud.memory` is a mapping of keys (bytes, or text as UTF-8) to bytes, over all nodes; a region is memory
of a declared size with a cloud-unique id. When the connected node is on this machine and its files are ours,
what it holds is read and written by mapping, with nobody in between; such reads are not in its figures of
hits and misses. Everything else goes through the node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from virgo.errors import NotRunning, VirgoError
from virgo.memory import calls, regioncalls
from virgo.memory.calls import Data, Key, Versioned
from virgo.memory.figures import Pool, SpaceInfo
from virgo.memory.keeping import checked
from virgo.memory.leases import Nearby, View, descriptor_of, load_arrays, not_near
from virgo.memory.mapped import MISSING
from virgo.memory.mapping import KeyMapping, Namespace
from virgo.memory.reach import Reach
from virgo.memory.region import Region
from virgo.memory.regioncalls import RegionInfo
from virgo.memory.segments import Segment
from virgo.wire.call import Call, Runner, whole

__all__ = ["MemoryClient", "Namespace", "Region", "RegionInfo", "SpaceInfo", "Versioned"]

if TYPE_CHECKING:
    from virgo.memory.arrays import SharedArray

T = TypeVar("T")


class MemoryClient(KeyMapping):
    """The cloud's memory, through one node. Safe for use from several threads, and after a fork.

    Args:
        runner: runs the calls.
        mapped: whether to read and write by mapping where that is possible.
    """

    def __init__(self, runner: Runner, *, mapped: bool = True) -> None:
        super().__init__(Reach(runner, mapped=mapped), b"")
        self._near = Nearby()

    def __repr__(self) -> str:
        return f"<MemoryClient {self._reach!r}>"

    @property
    def mapped(self) -> bool:
        """Whether what the connected node holds is read, and if it is ours written, by mapping."""
        return (self._reach.local or self._reach.attach()) is not None

    # --- regions ------------------------------------------------------------------------------

    def malloc(
        self,
        size: int,
        *,
        node: str | None = None,
        shared: bool = False,
        copies: int = 1,
        durable: bool = False,
    ) -> Region:
        """Allocate a region.

        One larger than a chunk (4 MiB) is spread over the nodes. Otherwise it lies on the connected node
        while that has room, else on another; `node` names the one on which it is to lie whole. A shared one
        always lies whole on a node, as a file in shared memory, which processes of its machine map. With
        `copies=2` or `durable` each change is on two nodes, or on disk, before it is acknowledged; the cloud
        says where, and no room is reserved.

        Raises:
            BadArgument, TooLarge: not 1 byte to 1 GiB, if shared to 1 TiB, if kept so to 256 MiB.
            PoolFull: no room. DiskFull: none where shared regions lie. NoNode: no such node is up.
        """
        region = Region(
            self,
            self._reach.run(regioncalls.malloc_kept(size, node, checked(copies, durable), shared=shared)),
            size,
        )
        if shared:
            self.segment(region.id)
        return region

    def segment(self, identifier: int) -> Segment | None:
        """The file of a shared region, None if it is not shared or not on this machine. Raises UnknownId."""
        info = self._reach.run(regioncalls.segment(identifier))
        return None if info is None else self._near.learn(info)

    def view_region(
        self, identifier: int, *, write: bool = False, timeout_s: float = 0.0
    ) -> AbstractContextManager[memoryview]:
        """A region's bytes, without a copy where that is possible; see `Region.view`."""
        local = self._reach.local or self._reach.attach()
        held = None if local is None or write else local.view_region(whole(identifier, "the id"))
        return held or self._view(identifier, write=write, timeout_s=timeout_s)

    def _view(self, identifier: int, *, write: bool = False, timeout_s: float = 0.0) -> View:
        segment = self.segment(identifier)
        if segment is None and write:
            raise not_near(identifier, "writing in place")
        found = self.get_region(identifier) if segment is None else segment
        return View(found, write=write, timeout_s=timeout_s)

    def hold_region(self, identifier: int) -> memoryview:
        """A region's bytes to read, for as long as somebody refers to them: of a shared one no copy."""
        return self._view(identifier).hold()

    def array(self, shape: Any, dtype: Any = float, *, node: str | None = None) -> SharedArray:
        """A NumPy array of zeros in shared memory, which all processes of its node's machine map.

        It is writable in place for us, who have the lease, until `release`; see `SharedArray`. It lies on the
        connected node, or on `node`: if that is another machine, what we get is a copy.

        Raises:
            NotLoaded: NumPy is not installed. BadArgument: of objects, or no shape. PoolFull, DiskFull,
                NoNode.
        """
        arrays = load_arrays()
        size, note = arrays.describe(shape, dtype)
        identifier = self._reach.run(
            regioncalls.malloc(size, node or regioncalls.HERE, shared=True, note=note)
        )
        try:
            array: SharedArray = arrays.creator(self.attach(identifier))
        except BaseException:
            with contextlib.suppress(VirgoError):  # which is no more than what went wrong first
                self.free_region(identifier)
            raise
        return array

    def attach(self, identifier: int) -> SharedArray:
        """The array of an id, to read, and after `acquire` to write. Raises UnknownId, BadArgument."""
        arrays = load_arrays()
        info = self._reach.run(regioncalls.segment(identifier))
        if info is None:
            raise arrays.no_array(identifier)
        array: SharedArray = arrays.build(
            info, self._near.learn(info), Region(self, info.id, info.size), self._refresh
        )
        array.refresh()
        return array

    def _refresh(self, array: SharedArray) -> None:
        arrays = load_arrays()
        for offset, count in arrays.pieces(array):
            arrays.fill(array, offset, self.read_region(array.region.id, offset, count))

    def region_descriptor(self, identifier: int, *, write: bool = False) -> int:
        """A descriptor of a shared region's file; see `Region.descriptor`."""
        segment = self.segment(identifier)
        if segment is None:
            raise not_near(identifier, "a descriptor")
        return descriptor_of(segment, write=write)

    def region(self, identifier: int) -> Region:
        """The region of an id that someone else allocated."""
        return Region(self, whole(identifier, "the id"))

    def get_region(self, identifier: int) -> bytes:
        """A region's value; b"" before the first set. Raises UnknownId, NodeLost."""
        if type(identifier) is not int:
            identifier = whole(identifier, "the id")
        known = self._reach.regions.get(identifier)
        if known is not None:
            return known
        local = self._reach.local or self._reach.attach()
        if local is not None:
            try:
                found = local.region(identifier, self._reach.regions)
            except NotRunning:
                self._reach.detach()
            else:
                if found is not MISSING:
                    return found  # type: ignore[no-any-return]
        return self._on_file(identifier, Segment.read, regioncalls.get_region(identifier))

    def _on_file(self, identifier: int, work: Callable[[Segment], T], call: Call[T]) -> T:
        """On the file of a shared region that is known to be near, else by the node."""
        found = self._near.do(identifier, work, MISSING) if self._near else MISSING
        return self._reach.run(call) if found is MISSING else found

    def read_region(self, identifier: int, offset: int = 0, size: int | None = None) -> bytes:
        """A part of a region's value; see `Region.read`."""
        call = regioncalls.get_region(identifier, offset, size)
        local = self._reach.local or self._reach.attach()
        if local is not None:
            try:
                found = local.read_region(identifier, offset, size)
            except NotRunning:
                self._reach.detach()
            else:
                if found is not MISSING:
                    return found  # type: ignore[no-any-return]
        return self._on_file(identifier, lambda segment: segment.read(offset, size), call)

    def set_region(self, identifier: int, data: Data, offset: int | None = None) -> None:
        """Replace a region's value, or write over a part of it."""
        raw = calls.encode_data(data)
        call = regioncalls.set_region(identifier, raw, offset)
        local = self._reach.local or self._reach.attach()
        if local is None or not local.set_region(identifier, raw, offset):
            self._on_file(identifier, lambda segment: segment.write(raw, offset), call)

    def free_region(self, identifier: int) -> None:
        """Free a region."""
        self._near.forget(identifier)
        self._reach.run(regioncalls.free_region(identifier))

    def describe(self, identifier: int) -> RegionInfo:
        """What its home knows of a region."""
        return self._reach.run(regioncalls.describe(identifier))

    # --- keys ---------------------------------------------------------------------------------

    def namespace(
        self, name: Key, *, cache: bool | None = None, copies: int = 1, durable: bool = False
    ) -> Namespace:
        """The keys that begin with a name and a colon, as a mapping of their own that can be dropped at once.

        It is declared in the cloud, which keeps a generation with each of its keys. Other clients reach the
        same keys as `name:key`, behind a mark if they are kept more safely: `{*2}name:key` on two nodes,
        `{*d}` durable, `{*2d}` both.

        Args:
            name: 1 to 100 bytes without a colon.
            cache: whether its least used keys are forgotten when room is needed; None leaves it as it is.
            copies: 2 to have each change on two nodes before it is acknowledged.
            durable: to have each change on disk before it is acknowledged.

        Raises:
            BadArgument: no such name, or a cache that is kept so. Busy: there are too many. NodeLost: a node
                could not be told.
        """
        raw = checked(copies, durable).mark + calls.encode_key(name)
        self._reach.run(calls.declare_space(raw, cache))
        return Namespace(self._reach, raw)

    def drop(self, name: Key) -> None:
        """Delete all keys of a namespace at once, however many they are.

        Their room is given back in the background. Keys that were set before the namespace was declared
        are removed one by one, once.

        Raises:
            NodeLost: a node did not answer; its keys go when it is back.
        """
        self._reach.run(calls.drop_space(calls.encode_key(name)))

    def namespaces(self) -> list[SpaceInfo]:
        """The declared namespaces, with what the connected node holds of each."""
        return self._reach.run(calls.SPACES)

    def pool(self) -> Pool:
        """All nodes' parts of the pool, and all namespaces with their keys on these. No node is left out."""
        return self._reach.run(calls.POOL)

    def clear(self) -> None:
        """Delete all keys of the cloud; regions stay."""
        self._reach.run(calls.flush())

    def stats(self) -> dict[str, Any]:
        """Figures of the connected node's pool."""
        return self._reach.run(calls.stats())

    def __len__(self) -> int:
        return self._reach.run(calls.count_keys())

    def close(self) -> None:
        """Let go of the map; the runner is the caller's."""
        self._reach.detach()
