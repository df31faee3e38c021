"""Keys for asyncio: the same surface as `virgo.memory.mapping`, with `await`."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from virgo.errors import Conflict, NotRunning, UnknownCommand, VirgoError
from virgo.memory import calls
from virgo.memory.calls import Data, Key, Local, Versioned
from virgo.memory.fills import ANOTHERS, FRESH
from virgo.memory.mapped import MISSING
from virgo.memory.mapping import WAIT_S_MAX, WAIT_S_MIN, Namespace, arrived
from virgo.memory.recall import Recall
from virgo.memory.spaces import SEPARATOR
from virgo.wire.call import AsyncRunner, Call

T = TypeVar("T")
_SCAN_KEYS = 1000
_SCAN_ITEMS = 64  # fewer, since their values come with them
_TABLE_AGE_S_MIN = 0.05  # the slot table is not asked for more often


class AsyncReach:
    """One node and, if it is near, its store to read from; see `reach.Reach`.

    Attributes:
        local: the store as mapped; None if it is not, or was not looked for yet (see `attach`).
        recall, regions: values that were read by mapping, by key and by id.
    """

    __slots__ = ("_runner", "_seek", "_table_at", "local", "recall", "regions")

    def __init__(self, runner: AsyncRunner, *, mapped: bool) -> None:
        self._runner = runner
        self._seek = mapped
        self._table_at = 0.0
        self.local: Local | None = None
        self.recall, self.regions = Recall(), Recall()

    def __repr__(self) -> str:
        return f"{self._runner!r}{' mapped' if self.local is not None else ''}"

    async def attach(self) -> Local | None:
        """The store as mapped; looked for once."""
        if self._seek:
            try:
                info, table = await self.run(calls.LOCAL), await self.run(calls.SLOTS)
                self.local = Local(info, table)
            except (NotRunning, UnknownCommand):
                self.local = None
            self._seek = False
        return self.local

    def detach(self) -> None:
        """Map it no longer."""
        self.local = None
        self.recall.forget()
        self.regions.forget()

    async def run(self, call: Call[T]) -> T:
        """Have the node do it."""
        return await self._runner.run(call)

    async def find(self, raw: bytes, name: Any) -> bytes | None:
        """The value of a key, None if it is absent; as `Reach.find`. Raises NodeLost."""
        local = self.local or await self.attach()
        found = MISSING
        if local is not None:
            try:
                found = local.key(raw, self.recall, name)
            except NotRunning:
                self.local = None
        if found is MISSING:
            found = await self.run(calls.get_key(raw))
            if found is not None and local is not None and local.lacks(raw):
                await self._renew_table(local)
        return found  # type: ignore[no-any-return]

    async def _renew_table(self, local: Local) -> None:
        if time.monotonic() - self._table_at >= _TABLE_AGE_S_MIN:
            self._table_at = time.monotonic()
            local.learn(await self.run(calls.SLOTS))


class AsyncKeyMapping:
    """The keys that begin with a prefix, which is left out of them here; see `mapping.KeyMapping`."""

    def __init__(self, reach: AsyncReach, prefix: bytes) -> None:
        self._reach = reach
        self._prefix = prefix
        self._recall = reach.recall

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self.keys()

    def _raw(self, key: Key) -> bytes:
        """The key as the cloud knows it."""
        return self._prefix + calls.encode_key(key) if self._prefix else calls.encode_key(key)

    async def get(self, key: Key, default: Any = None) -> Any:
        """The value of a key, or `default`. Raises NodeLost: absence is never guessed."""
        found = self._recall.get(self._raw(key) if self._prefix else key)
        if found is None:
            raw = self._raw(key)
            found = await self._reach.find(raw, key if type(key) is str and not self._prefix else raw)
        return default if found is None else found

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
        call = calls.set_with(self._raw(key), value, ttl_s, sliding=sliding, only_if=only_if)
        return await self._reach.run(call)

    async def read(self, key: Key) -> Versioned | None:
        """The value of a key with its version and time, None if it is absent. Raises NodeLost."""
        return await self._reach.run(calls.read_key(self._raw(key)))

    async def compare_and_set(
        self, key: Key, value: Data, *, version: int, ttl_s: float | None = None
    ) -> int:
        """Set a key if it still has the version that `read` told, 0 for absent; returns the new version.

        Raises:
            Conflict: it has another one by now, and is left as it is.
        """
        found = await self._reach.run(calls.compare_key(self._raw(key), value, ttl_s, version))
        if found is None:
            raise Conflict(f"the key {calls.encode_key(key)!r:.60} has another version than {version}")
        return found

    async def increment(self, key: Key, step: int = 1) -> int:
        """Add to the number under a key, 0 if absent; returns the sum. Raises BadArgument if it is none."""
        return await self._reach.run(calls.increment_key(self._raw(key), step))

    async def append(self, key: Key, data: Data) -> int:
        """Add to the end of a value, b"" if it is absent; returns its length."""
        return await self._reach.run(calls.append_key(self._raw(key), data))

    async def expire(self, key: Key, ttl_s: float | None) -> bool:
        """Let a key expire after so many seconds, or with None no longer; whether that changed something."""
        return await self._reach.run(calls.expire_key(self._raw(key), ttl_s))

    async def get_or_set(
        self,
        key: Key,
        make: Callable[[], Data | Awaitable[Data]],
        *,
        ttl_s: float | None = None,
        stale_s: float = 0.0,
        fill_s: float = 30.0,
    ) -> bytes:
        """The value of a key; if it is absent or stale, one caller makes it and the others do not.

        As `KeyMapping.get_or_set`; `make` may be a coroutine function.
        """
        calls.check_fill(ttl_s, stale_s)
        raw, token = self._raw(key), os.urandom(8).hex()
        wait_s = WAIT_S_MIN
        while True:
            value, state = await self._reach.run(calls.fetch_key(raw, token, fill_s))
            if state == FRESH or (state == ANOTHERS and value is not None):
                return value  # type: ignore[return-value]
            if state != ANOTHERS:
                break
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, WAIT_S_MAX)
        try:
            found = make()
            made = calls.encode_data(await found if inspect.isawaitable(found) else found)
        except BaseException:
            with contextlib.suppress(VirgoError):  # which is no more than what went wrong first
                await self._reach.run(calls.release_key(raw, token))
            raise
        await self._reach.run(calls.fill_key(raw, token, made, ttl_s, stale_s))
        return made

    async def get_many(self, keys: Iterable[Key]) -> dict[Key, bytes]:
        """The values of those keys that are there."""
        wanted = list(keys)
        values = await self._reach.run(calls.get_keys(map(self._raw, wanted))) if wanted else []
        return {key: value for key, value in zip(wanted, values, strict=True) if value is not None}

    async def set_many(self, items: Mapping[Key, Data] | Iterable[tuple[Key, Data]]) -> None:
        """Set several keys in one request; each node's part is atomic, the whole is not."""
        pairs = list(items.items() if isinstance(items, Mapping) else items)
        if pairs:
            await self._reach.run(calls.set_keys((self._raw(key), value) for key, value in pairs))

    async def delete(self, *keys: Key) -> int:
        """Delete keys; returns how many there were."""
        return await self._reach.run(calls.delete_keys(map(self._raw, keys))) if keys else 0

    async def pop(self, key: Key, default: Any = MISSING) -> Any:
        """The value of a key, which is deleted, in one step."""
        found = await self._reach.run(calls.take_key(self._raw(key)))
        if found is not None:
            return found
        if default is MISSING:
            raise KeyError(key)
        return default

    async def popitem(self) -> tuple[bytes, bytes]:
        """Some key with its value, which is deleted, in one step. Raises KeyError if there is none."""
        async with aclosing(self.keys()) as keys:
            async for key in keys:
                found = await self._reach.run(calls.take_key(self._raw(key)))
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
        return await self._reach.run(calls.exists(self._raw(key)))

    async def count(self) -> int:
        """How many keys there are, over all nodes."""
        found = 0
        async with aclosing(self.scan()) as keys:
            async for _key in keys:
                found += 1
        return found

    async def scan(self, prefix: Key = b"") -> AsyncGenerator[bytes, None]:
        """The keys that begin so, as bytes. One that is there from beginning to end comes once."""
        raw, cursor = self._raw(prefix), 0
        while True:
            cursor, keys = await self._reach.run(calls.scan(cursor, _SCAN_KEYS, raw))
            for key in keys:
                yield key[len(self._prefix) :]
            if not cursor:
                return

    async def keys(self) -> AsyncGenerator[bytes, None]:
        """All keys, as `scan`."""
        async with aclosing(self.scan()) as keys:
            async for key in keys:
                yield key

    async def values(self) -> AsyncGenerator[bytes, None]:
        """The values of all keys, as `items`."""
        async with aclosing(self.items()) as items:
            async for _key, value in items:
                yield value

    async def items(self) -> AsyncGenerator[tuple[bytes, bytes], None]:
        """All keys with their values; what is deleted meanwhile may be left out."""
        cursor = 0
        while True:
            cursor, keys = await self._reach.run(calls.scan(cursor, _SCAN_ITEMS, self._prefix))
            values = await self._reach.run(calls.get_keys(keys)) if keys else []
            for key, value in zip(keys, values, strict=True):
                if value is not None:
                    yield key[len(self._prefix) :], value
            if not cursor:
                return


class AsyncNamespace(AsyncKeyMapping):
    """The keys that begin with a name and a colon; see `mapping.Namespace`.

    Attributes:
        name: without the colon.
    """

    def __init__(self, reach: AsyncReach, name: bytes) -> None:
        super().__init__(reach, name + SEPARATOR)
        self.name = name

    def __repr__(self) -> str:
        return f"<AsyncNamespace {self.name.decode('utf-8', 'backslashreplace')!r}>"

    def __reduce__(self) -> tuple[Callable[[bytes], Namespace], tuple[bytes]]:
        """Elsewhere it arrives as a `Namespace`: there may be no event loop."""
        return arrived, (self.name,)

    async def drop(self) -> None:
        """Delete all its keys at once, however many they are. Raises NodeLost; see `MemoryClient.drop`."""
        await self._reach.run(calls.drop_space(self.name))

    async def clear(self) -> None:
        """As `drop`."""
        await self.drop()
