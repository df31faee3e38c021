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
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from virgo.errors import Conflict, NotRunning, UnknownCommand
from virgo.memory import calls
from virgo.memory.aregion import AsyncRegion
from virgo.memory.calls import Data, Key, Local, RegionInfo, Versioned
from virgo.memory.leases import Nearby, View, descriptor_of, load_arrays, not_near
from virgo.memory.mapped import MISSING
from virgo.memory.segments import Segment
from virgo.wire.call import AsyncRunner, Call

__all__ = ["AsyncMemoryClient", "AsyncRegion"]

if TYPE_CHECKING:
    from virgo.memory.arrays import SharedArray

T = TypeVar("T")
_SCAN_KEYS = 1000
_SCAN_ITEMS = 64  # fewer, since their values come with them
_TABLE_AGE_S_MIN = 0.05  # the slot table is not asked for more often


class AsyncMemoryClient:
    """The cloud's memory, through one node, for one event loop; see `MemoryClient`."""

    def __init__(self, runner: AsyncRunner, *, mapped: bool = True) -> None:
        self._runner = runner
        self._local: Local | None = None
        self._seek_local = mapped
        self._table_at = 0.0
        self._near = Nearby()

    def __repr__(self) -> str:
        return f"<AsyncMemoryClient {self._runner!r}{' mapped' if self._local is not None else ''}>"

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self.keys()

    async def mapped(self) -> bool:
        """Whether the connected node's store is read by mapping."""
        return (self._local or await self._attached()) is not None

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

    async def malloc(self, size: int, *, node: str | None = None, shared: bool = False) -> AsyncRegion:
        """Allocate a region; see `MemoryClient.malloc`."""
        identifier = await self._runner.run(calls.malloc(size, node, shared=shared))
        if shared:
            await self.segment(identifier)
        return AsyncRegion(self, identifier, size)

    async def segment(self, identifier: int) -> Segment | None:
        """The file of a shared region, None if it is not shared or not on this machine. Raises UnknownId."""
        info = await self._runner.run(calls.segment(identifier))
        return None if info is None else self._near.learn(info)

    async def view_region(self, identifier: int, *, write: bool = False, timeout_s: float = 0.0) -> View:
        """A region's bytes, without a copy where that is possible; see `Region.view`."""
        segment = await self.segment(identifier)
        if segment is None and write:
            raise not_near(identifier, "writing in place")
        found = await self.get_region(identifier) if segment is None else segment
        return View(found, write=write, timeout_s=timeout_s)

    async def array(self, shape: Any, dtype: Any = float, *, node: str | None = None) -> SharedArray:
        """A NumPy array of zeros in shared memory; see `MemoryClient.array`.

        Its own `free`, `refresh` and `write` are awaited, as are those of its region; what concerns the lease
        is done at once, so with a timeout do it in a thread.
        """
        arrays = load_arrays()
        size, note = arrays.describe(shape, dtype)
        call = calls.malloc(size, node or calls.HERE, shared=True, note=note)
        found: SharedArray = arrays.creator(await self.attach(await self._runner.run(call)))
        return found

    async def attach(self, identifier: int) -> SharedArray:
        """The array of an id; see `MemoryClient.attach`."""
        arrays = load_arrays()
        info = await self._runner.run(calls.segment(identifier))
        if info is None:
            raise arrays.no_array(identifier)
        array: SharedArray = arrays.build(
            info, self._near.learn(info), AsyncRegion(self, info.id, info.size), self._refresh
        )
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
        return descriptor_of(segment, write=write)

    async def _on_file(self, identifier: int, work: Callable[[Segment], T], call: Call[T]) -> T:
        """On the file of a shared region that is known to be near, in a thread; else by the node."""
        found = MISSING
        if self._near:
            found = await asyncio.to_thread(self._near.do, identifier, work, MISSING)
        return await self._runner.run(call) if found is MISSING else found

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
        return await self._on_file(identifier, Segment.read, calls.get_region(identifier))

    async def read_region(self, identifier: int, offset: int = 0, size: int | None = None) -> bytes:
        """A part of a region's value; see `Region.read`."""
        call = calls.get_region(identifier, offset, size)
        local = self._local or await self._attached()
        if local is not None:
            try:
                found = local.read_region(identifier, offset, size)
            except NotRunning:
                self._local = None
            else:
                if found is not MISSING:
                    return found  # type: ignore[no-any-return]
        return await self._on_file(identifier, lambda segment: segment.read(offset, size), call)

    async def set_region(self, identifier: int, data: Data, offset: int | None = None) -> None:
        """Replace a region's value, or write over a part of it."""
        raw = calls.encode_data(data)
        call = calls.set_region(identifier, raw, offset)
        await self._on_file(identifier, lambda segment: segment.write(raw, offset), call)

    async def free_region(self, identifier: int) -> None:
        """Free a region."""
        self._near.forget(identifier)
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

    async def set(
        self,
        key: Key,
        value: Data,
        *,
        ttl_s: float | None = None,
        sliding: bool = False,
        only_if: str = "",
    ) -> bool:
        """Set a key; returns whether it was set. See `MemoryClient.set`."""
        call = calls.set_with(key, value, ttl_s, sliding=sliding, only_if=only_if)
        return await self._runner.run(call)

    async def read(self, key: Key) -> Versioned | None:
        """The value of a key with its version and time, None if it is absent. Raises NodeLost."""
        return await self._runner.run(calls.read_key(key))

    async def compare_and_set(
        self, key: Key, value: Data, *, version: int, ttl_s: float | None = None
    ) -> int:
        """Set a key if it still has the version that `read` told, 0 for absent; returns the new version.

        Raises:
            Conflict: it has another one by now, and is left as it is.
        """
        found = await self._runner.run(calls.write_key(key, value, ttl_s, version=max(0, version)))
        if found is None:
            raise Conflict(f"the key {calls.encode_key(key)!r:.60} has another version than {version}")
        return found

    async def increment(self, key: Key, step: int = 1) -> int:
        """Add to the number under a key, 0 if absent; returns the sum. Raises BadArgument if it is none."""
        return await self._runner.run(calls.increment_key(key, step))

    async def append(self, key: Key, data: Data) -> int:
        """Add to the end of a value, b"" if it is absent; returns its length."""
        return await self._runner.run(calls.append_key(key, data))

    async def expire(self, key: Key, ttl_s: float | None) -> bool:
        """Let a key expire after so many seconds, or with None no longer; whether that changed something."""
        return await self._runner.run(calls.expire_key(key, ttl_s))

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

    async def popitem(self) -> tuple[bytes, bytes]:
        """Some key with its value, which is deleted, in one step. Raises KeyError if there is none."""
        async with aclosing(self.keys()) as keys:
            async for key in keys:
                found = await self._runner.run(calls.take_key(key))
                if found is not None:  # nobody was faster
                    return key, found
        raise KeyError("popitem(): the cloud has no keys")

    async def setdefault(self, key: Key, default: Data) -> bytes:
        """The value of a key, which is set to `default` if it is absent; never over another's value."""
        while True:
            found = await self.get(key)
            if found is not None:
                return found  # type: ignore[no-any-return]
            if await self.set(key, default, only_if="absent"):
                return calls.encode_data(default)

    async def update(
        self, other: Mapping[Key, Data] | Iterable[tuple[Key, Data]] = (), /, **more: Data
    ) -> None:
        """Set several keys; see `set_many`."""
        await self.set_many([*(other.items() if isinstance(other, Mapping) else other), *more.items()])

    async def exists(self, key: Key) -> bool:
        """Whether the key is there."""
        return await self._runner.run(calls.exists(calls.encode_key(key)))

    async def count(self) -> int:
        """How many keys there are, over all nodes."""
        return await self._runner.run(calls.count_keys())

    async def keys(self) -> AsyncGenerator[bytes, None]:
        """All keys, as bytes. One that is there from beginning to end comes once."""
        cursor = 0
        while True:
            cursor, keys = await self._runner.run(calls.scan(cursor, _SCAN_KEYS))
            for key in keys:
                yield key
            if not cursor:
                return

    async def values(self) -> AsyncGenerator[bytes, None]:
        """The values of all keys, as `items`."""
        async with aclosing(self.items()) as items:
            async for _key, value in items:
                yield value

    async def items(self) -> AsyncGenerator[tuple[bytes, bytes], None]:
        """All keys with their values; what is deleted meanwhile may be left out."""
        cursor = 0
        while True:
            cursor, keys = await self._runner.run(calls.scan(cursor, _SCAN_ITEMS))
            values = await self._runner.run(calls.get_keys(keys)) if keys else []
            for key, value in zip(keys, values, strict=True):
                if value is not None:
                    yield key, value
            if not cursor:
                return

    async def clear(self) -> None:
        """Delete all keys of the cloud; regions stay."""
        await self._runner.run(calls.flush())

    async def stats(self) -> dict[str, Any]:
        """Figures of the connected node's pool."""
        return await self._runner.run(calls.stats())

    async def close(self) -> None:
        """Let go of the map; the runner is the caller's."""
        self._local = None
