"""Memory for asyncio: the same surface as `virgo.memory.client`, with `await`.

region = await cloud.memory.malloc(100)
await region.set(b"data")
await cloud.memory.set("greeting", b"hello")
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Any

from virgo.errors import NotRunning, UnknownCommand
from virgo.memory import calls
from virgo.memory.calls import MISSING, Data, Key, Local, RegionInfo
from virgo.wire.call import AsyncRunner

_SCAN_KEYS = 1000
_TABLE_AGE_S_MIN = 0.05  # the slot table is not asked for more often


class AsyncRegion:
    """An allocation; `async with` frees it at the end of the block.

    Attributes:
        id: unique in the cloud, and never given again.
        size: declared bytes, None for a region whose id came from elsewhere; `stats()` has it.
    """

    __slots__ = ("_client", "id", "size")

    def __init__(self, client: AsyncMemoryClient, identifier: int, size: int | None = None) -> None:
        self._client = client
        self.id = identifier
        self.size = size

    def __repr__(self) -> str:
        return f"<AsyncRegion {self.id:#x}{'' if self.size is None else f' of {self.size} bytes'}>"

    async def __aenter__(self) -> AsyncRegion:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.free()

    async def node(self) -> str:
        """Name of its home node."""
        return (await self.stats()).node

    async def stats(self) -> RegionInfo:
        """What its home knows of it now. Raises UnknownId, NodeLost."""
        return await self._client.describe(self.id)

    async def set(self, data: Data) -> None:
        """Replace the value; see `Region.set`."""
        await self._client.set_region(self.id, data)

    async def get(self) -> bytes:
        """The value; b"" before the first set. Raises UnknownId, NodeLost."""
        return await self._client.get_region(self.id)

    async def free(self) -> None:
        """Give the memory back. Raises UnknownId if it was freed already."""
        await self._client.free_region(self.id)


class AsyncMemoryClient:
    """The cloud's memory, through one node, for one event loop; see `MemoryClient`."""

    def __init__(self, runner: AsyncRunner, *, mapped: bool = True) -> None:
        self._runner = runner
        self._local: Local | None = None
        self._seek_local = mapped
        self._table_at = 0.0

    def __repr__(self) -> str:
        return f"<AsyncMemoryClient {self._runner!r}{' mapped' if self._local is not None else ''}>"

    async def _attached(self) -> Local | None:
        if self._seek_local:
            try:
                info, table = await self._runner.run(calls.LOCAL), await self._runner.run(calls.SLOTS)
                self._local = Local(info, table)
            except (NotRunning, UnknownCommand):
                self._local = None
            self._seek_local = False
        return self._local

    # --- regions ------------------------------------------------------------------------------

    async def malloc(self, size: int, *, node: str | None = None) -> AsyncRegion:
        """Allocate a region; see `MemoryClient.malloc`."""
        return AsyncRegion(self, await self._runner.run(calls.malloc(size, node)), size)

    def region(self, identifier: int) -> AsyncRegion:
        """The region of an id that someone else allocated."""
        return AsyncRegion(self, identifier)

    async def get_region(self, identifier: int) -> bytes:
        """A region's value; b"" before the first set. Raises UnknownId, NodeLost."""
        local = self._local or await self._attached()
        if local is not None:
            try:
                found = local.region(identifier)
            except NotRunning:
                self._local = None
            else:
                if found is not MISSING:
                    return found  # type: ignore[no-any-return]
        return await self._runner.run(calls.get_region(identifier))

    async def set_region(self, identifier: int, data: Data) -> None:
        """Replace a region's value."""
        await self._runner.run(calls.set_region(identifier, data))

    async def free_region(self, identifier: int) -> None:
        """Free a region."""
        await self._runner.run(calls.free_region(identifier))

    async def describe(self, identifier: int) -> RegionInfo:
        """What its home knows of a region."""
        return await self._runner.run(calls.describe(identifier))

    # --- keys ---------------------------------------------------------------------------------

    async def get(self, key: Key, default: Any = None) -> Any:
        """The value of a key, or `default`. Raises NodeLost: absence is never guessed."""
        local = self._local or await self._attached()
        raw = calls.encode_key(key)
        found = MISSING
        if local is not None:
            try:
                found = local.key(raw)
            except NotRunning:
                self._local = None
        if found is MISSING:
            found = await self._runner.run(calls.get_key(raw))
            if found is not None and local is not None and local.lacks(raw):
                await self._renew_table(local)
        return default if found is None else found

    async def _renew_table(self, local: Local) -> None:
        if time.monotonic() - self._table_at >= _TABLE_AGE_S_MIN:
            self._table_at = time.monotonic()
            local.learn(await self._runner.run(calls.SLOTS))

    async def set(self, key: Key, value: Data, *, ttl_s: float | None = None, only_if: str = "") -> bool:
        """Set a key; returns whether it was set. See `MemoryClient.set`."""
        return await self._runner.run(calls.set_key(key, value, ttl_s, only_if))

    async def get_many(self, keys: Iterable[Key]) -> dict[Key, bytes]:
        """The values of those keys that are there."""
        wanted = list(keys)
        values = await self._runner.run(calls.get_keys(wanted)) if wanted else []
        return {key: value for key, value in zip(wanted, values, strict=True) if value is not None}

    async def set_many(self, items: Mapping[Key, Data] | Iterable[tuple[Key, Data]]) -> None:
        """Set several keys in one request; each node's part is atomic, the whole is not."""
        pairs = list(items.items() if isinstance(items, Mapping) else items)
        if pairs:
            await self._runner.run(calls.set_keys(pairs))

    async def delete(self, *keys: Key) -> int:
        """Delete keys; returns how many there were."""
        return await self._runner.run(calls.delete_keys(keys)) if keys else 0

    async def pop(self, key: Key, default: Any = MISSING) -> Any:
        """The value of a key, which is deleted, in one step."""
        found = await self._runner.run(calls.take_key(key))
        if found is not None:
            return found
        if default is MISSING:
            raise KeyError(key)
        return default

    async def exists(self, key: Key) -> bool:
        """Whether the key is there."""
        return await self._runner.run(calls.exists(calls.encode_key(key)))

    async def count(self) -> int:
        """How many keys there are, over all nodes."""
        return await self._runner.run(calls.count_keys())

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """All keys, as bytes. One that is there from beginning to end comes once."""
        cursor = 0
        while True:
            cursor, keys = await self._runner.run(calls.scan(cursor, _SCAN_KEYS))
            for key in keys:
                yield key
            if not cursor:
                return

    async def clear(self) -> None:
        """Delete all keys of the cloud; regions stay."""
        await self._runner.run(calls.flush())

    async def stats(self) -> dict[str, Any]:
        """Figures of the connected node's pool."""
        return await self._runner.run(calls.stats())
