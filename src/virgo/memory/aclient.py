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

from typing import Any

from virgo.errors import NotRunning
from virgo.memory import calls
from virgo.memory.amapping import AsyncKeyMapping, AsyncNamespace, AsyncReach
from virgo.memory.aregion import AsyncRegion
from virgo.memory.calls import Data, Key, RegionInfo
from virgo.memory.figures import Pool, SpaceInfo
from virgo.memory.keeping import checked
from virgo.memory.mapped import MISSING
from virgo.wire.call import AsyncRunner

__all__ = ["AsyncMemoryClient", "AsyncNamespace", "AsyncRegion"]


class AsyncMemoryClient(AsyncKeyMapping):
    """The cloud's memory, through one node, for one event loop; see `MemoryClient`."""

    def __init__(self, runner: AsyncRunner, *, mapped: bool = True) -> None:
        super().__init__(AsyncReach(runner, mapped=mapped), b"")

    def __repr__(self) -> str:
        return f"<AsyncMemoryClient {self._reach!r}>"

    async def mapped(self) -> bool:
        """Whether the connected node's store is read by mapping."""
        return (self._reach.local or await self._reach.attach()) is not None

    # --- regions ------------------------------------------------------------------------------

    async def malloc(self, size: int, *, node: str | None = None) -> AsyncRegion:
        """Allocate a region; see `MemoryClient.malloc`."""
        return AsyncRegion(self, await self._reach.run(calls.malloc(size, node)), size)

    def region(self, identifier: int) -> AsyncRegion:
        """The region of an id that someone else allocated."""
        return AsyncRegion(self, identifier)

    async def get_region(self, identifier: int) -> bytes:
        """A region's value; b"" before the first set. Raises UnknownId, NodeLost."""
        local = self._reach.local or await self._reach.attach()
        if local is not None:
            try:
                found = local.region(identifier)
            except NotRunning:
                self._reach.detach()
            else:
                if found is not MISSING:
                    return found  # type: ignore[no-any-return]
        return await self._reach.run(calls.get_region(identifier))

    async def set_region(self, identifier: int, data: Data) -> None:
        """Replace a region's value."""
        await self._reach.run(calls.set_region(identifier, data))

    async def free_region(self, identifier: int) -> None:
        """Free a region."""
        await self._reach.run(calls.free_region(identifier))

    async def describe(self, identifier: int) -> RegionInfo:
        """What its home knows of a region."""
        return await self._reach.run(calls.describe(identifier))

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
