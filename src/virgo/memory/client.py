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

from typing import Any

from virgo.errors import NotRunning
from virgo.memory import calls
from virgo.memory.calls import Data, Key, RegionInfo, Versioned
from virgo.memory.figures import Pool, SpaceInfo
from virgo.memory.keeping import checked
from virgo.memory.mapped import MISSING
from virgo.memory.mapping import KeyMapping, Namespace
from virgo.memory.reach import Reach
from virgo.memory.region import Region
from virgo.wire.call import Runner, whole

__all__ = ["MemoryClient", "Namespace", "Region", "RegionInfo", "SpaceInfo", "Versioned"]


class MemoryClient(KeyMapping):
    """The cloud's memory, through one node. Safe for use from several threads, and after a fork.

    Args:
        runner: runs the calls.
        mapped: whether to read and write by mapping where that is possible.
    """

    def __init__(self, runner: Runner, *, mapped: bool = True) -> None:
        super().__init__(Reach(runner, mapped=mapped), b"")

    def __repr__(self) -> str:
        return f"<MemoryClient {self._reach!r}>"

    @property
    def mapped(self) -> bool:
        """Whether what the connected node holds is read, and if it is ours written, by mapping."""
        return (self._reach.local or self._reach.attach()) is not None

    # --- regions ------------------------------------------------------------------------------

    def malloc(self, size: int, *, node: str | None = None) -> Region:
        """Allocate a region.

        One larger than a chunk (4 MiB) is spread over the nodes. Otherwise it lies on the connected node
        while that has room, else on another; `node` names the one on which it is to lie whole.

        Raises:
            BadArgument, TooLarge: not 1 byte to 1 GiB. PoolFull: no room. NoNode: no such node is up.
        """
        return Region(self, self._reach.run(calls.malloc(size, node)), size)

    def region(self, identifier: int) -> Region:
        """The region of an id that someone else allocated."""
        return Region(self, whole(identifier, "the id"))

    def get_region(self, identifier: int) -> bytes:
        """A region's value; b"" before the first set. Raises UnknownId, NodeLost."""
        if type(identifier) is not int:
            identifier = whole(identifier, "the id")
        local = self._reach.local or self._reach.attach()
        if local is not None:
            try:
                found = local.region(identifier)
            except NotRunning:
                self._reach.detach()
            else:
                if found is not MISSING:
                    return found  # type: ignore[no-any-return]
        return self._reach.run(calls.get_region(identifier))

    def set_region(self, identifier: int, data: Data) -> None:
        """Replace a region's value."""
        local = self._reach.local or self._reach.attach()
        if local is None or not local.set_region(whole(identifier, "the id"), calls.encode_data(data)):
            self._reach.run(calls.set_region(identifier, data))

    def free_region(self, identifier: int) -> None:
        """Free a region."""
        self._reach.run(calls.free_region(identifier))

    def describe(self, identifier: int) -> RegionInfo:
        """What its home knows of a region."""
        return self._reach.run(calls.describe(identifier))

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
