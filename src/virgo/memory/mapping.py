"""Keys as users hold them: a mapping of bytes, or text as UTF-8, to bytes.

`KeyMapping` has all that can be done with keys; `cloud.memory` is one with all keys of the cloud, and a
`Namespace` one with those that begin with its name and a colon, without that beginning. `amapping` has the
same for asyncio.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any

from virgo.errors import Conflict, VirgoError
from virgo.memory import calls
from virgo.memory.calls import Data, Key, Versioned
from virgo.memory.fills import ANOTHERS, FRESH
from virgo.memory.keeping import keep_of
from virgo.memory.mapped import MISSING
from virgo.memory.reach import Reach
from virgo.memory.spaces import SEPARATOR

_SCAN_KEYS = 1000
WAIT_S_MIN, WAIT_S_MAX = 0.001, 0.05  # between looks whether another has filled a key


class KeyMapping(MutableMapping[Key, bytes]):
    """The keys that begin with a prefix, which is left out of them here.

    Args:
        reach: the node.
        prefix: b"" for all keys.
    """

    def __init__(self, reach: Reach, prefix: bytes) -> None:
        self._reach = reach
        self._prefix = prefix
        self._recall = reach.recall

    def _raw(self, key: Key) -> bytes:
        """The key as the cloud knows it."""
        if type(key) is str:
            try:
                return self._prefix + key.encode()
            except UnicodeEncodeError:
                pass  # a name of a file that is no text
        return self._prefix + calls.encode_key(key)

    # --- one key ------------------------------------------------------------------------------

    def get(self, key: Key, default: Any = None) -> Any:
        """The value of a key, or `default`. Raises NodeLost: absence is never guessed."""
        clock, place, number, values = self._recall.last
        if clock.words[place] == number and monotonic() < clock.until:  # as `Recall.get`
            try:
                found = values.get(self._raw(key) if self._prefix else key)
            except (TypeError, ValueError):  # a bytearray, which has no hash
                found = None
            if found is not None:
                return found
        raw = self._raw(key)
        found = self._reach.find(raw, key if type(key) is str and not self._prefix else raw)
        return default if found is None else found

    def view(self, key: Key) -> AbstractContextManager[memoryview]:
        """The value of a key as a memoryview for the time of a `with` block. Raises KeyError, NodeLost.

        Where the key is mapped it is not copied: it lies in the pool, as of now, until the end of the block.
        Do not hold it for long, since meanwhile the pool cannot use anew what is replaced. Nothing made of
        it, no slice and no array, may be used after the block: it would show whatever is there by then.
        """
        found = self._reach.view(self._raw(key))
        if found is None:
            raise KeyError(key)
        return found

    def set(
        self,
        key: Key,
        value: Data,
        *,
        ttl_s: float | None = None,
        sliding: bool = False,
        only_if: str = "",
    ) -> bool:
        """Set a key; returns whether it was set.

        Args:
            key: bytes or text, at most 500 bytes.
            value: bytes.
            ttl_s: it expires after so many seconds.
            sliding: each use gives it that time anew, and up to an eighth more.
            only_if: `absent` or `present`: set it only then.
        """
        if ttl_s is None and not (sliding or only_if):
            self[key] = value
            return True
        return self._reach.do(calls.set_with(self._raw(key), value, ttl_s, sliding=sliding, only_if=only_if))

    def read(self, key: Key) -> Versioned | None:
        """The value of a key with its version and time, None if it is absent. Raises NodeLost."""
        return self._reach.do(calls.read_key(self._raw(key)))

    def compare_and_set(self, key: Key, value: Data, *, version: int, ttl_s: float | None = None) -> int:
        """Set a key if it still has the version that `read` told, 0 for absent; returns the new version.

        Raises:
            Conflict: it has another one by now, and is left as it is.
        """
        found = self._reach.do(calls.compare_key(self._raw(key), value, ttl_s, version))
        if found is None:
            raise Conflict(f"the key {calls.encode_key(key)!r:.60} has another version than {version}")
        return found

    def increment(self, key: Key, step: int = 1) -> int:
        """Add to the number under a key, 0 if absent; returns the sum. Raises BadArgument if it is none."""
        return self._reach.do(calls.increment_key(self._raw(key), step))

    def append(self, key: Key, data: Data) -> int:
        """Add to the end of a value, b"" if it is absent; returns its length."""
        return self._reach.do(calls.append_key(self._raw(key), data))

    def expire(self, key: Key, ttl_s: float | None) -> bool:
        """Let a key expire after so many seconds, or with None no longer; whether that changed something."""
        return self._reach.do(calls.expire_key(self._raw(key), ttl_s))

    def setdefault(self, key: Key, default: Any = None) -> bytes:
        """The value of a key, which is set to `default` if it is absent; never over another's value."""
        while True:
            found = self._reach.find(self._raw(key))
            if found is not None:
                return found
            if self.set(key, default, only_if="absent"):
                return calls.encode_data(default)

    def get_or_set(
        self,
        key: Key,
        make: Callable[[], Data],
        *,
        ttl_s: float | None = None,
        stale_s: float = 0.0,
        fill_s: float = 30.0,
    ) -> bytes:
        """The value of a key; if it is absent or stale, one caller makes it and the others do not.

        Others meanwhile get the stale value if there is one, else they wait. If the key is set, deleted or
        dropped while `make` runs, what it returned is given to its caller and not kept.

        Args:
            key: bytes or text.
            make: returns the value. What it raises is raised here, and the next caller tries.
            ttl_s: for so many seconds the value is fresh; None for ever.
            stale_s: for so many more it is stale: given to others while one makes it anew.
            fill_s: how long `make` may take before another caller tries too.
        """
        calls.check_fill(ttl_s, stale_s)
        raw, token = self._raw(key), os.urandom(8).hex()
        wait_s = WAIT_S_MIN
        while True:
            value, state = self._reach.do(calls.fetch_key(raw, token, fill_s))
            if state == FRESH or (state == ANOTHERS and value is not None):
                return value  # type: ignore[return-value]
            if state != ANOTHERS:
                break
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, WAIT_S_MAX)
        try:
            made = calls.encode_data(make())
        except BaseException:
            with contextlib.suppress(VirgoError):  # which is no more than what went wrong first
                self._reach.do(calls.release_key(raw, token))
            raise
        self._reach.do(calls.fill_key(raw, token, made, ttl_s, stale_s))
        return made

    def pop(self, key: Key, default: Any = MISSING) -> Any:
        """The value of a key, which is deleted, in one step."""
        found = self._reach.do(calls.take_key(self._raw(key)))
        if found is not None:
            return found
        if default is MISSING:
            raise KeyError(key)
        return default

    def __getitem__(self, key: Key) -> bytes:
        found: bytes | None = self.get(key)
        if found is None:
            raise KeyError(key)
        return found

    def __setitem__(self, key: Key, value: Data) -> None:
        self._reach.put(self._raw(key), calls.encode_data(value))

    def __delitem__(self, key: Key) -> None:
        if not self._reach.do(calls.delete_keys([self._raw(key)])):
            raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, (bytes, str, bytearray, memoryview)) and self._reach.there(self._raw(key))  # type: ignore[arg-type]

    # --- several keys -------------------------------------------------------------------------

    def get_many(self, keys: Iterable[Key]) -> dict[Key, bytes]:
        """The values of those keys that are there."""
        wanted = list(keys)
        values = self._reach.find_many([self._raw(key) for key in wanted])
        return {key: value for key, value in zip(wanted, values, strict=True) if value is not None}

    def set_many(self, items: Mapping[Key, Data] | Iterable[tuple[Key, Data]]) -> None:
        """Set several keys at once; each node's part is atomic, the whole is not."""
        pairs = items.items() if isinstance(items, Mapping) else items
        self._reach.put_many([(self._raw(key), calls.encode_data(value)) for key, value in pairs])

    def delete(self, *keys: Key) -> int:
        """Delete keys; returns how many there were."""
        return self._reach.drop_many([self._raw(key) for key in keys])

    def scan(self, prefix: Key = b"") -> Iterator[bytes]:
        """The keys that begin so, as bytes. One that is there from beginning to end comes once."""
        raw, cursor = self._raw(prefix), 0
        while True:
            cursor, keys = self._reach.run(calls.scan(cursor, _SCAN_KEYS, raw))
            for key in keys:
                yield key[len(self._prefix) :]
            if not cursor:
                return

    def __iter__(self) -> Iterator[bytes]:
        """All keys, as `scan`."""
        return self.scan()

    def __len__(self) -> int:
        return sum(1 for _ in self.scan())


class Namespace(KeyMapping):
    """The keys that begin with a name and a colon: `namespace["42"]` is the key `name:42`.

    It may travel, as an argument of a clone for example, and reaches the cloud there through the node that
    is near.

    Attributes:
        name: without the colon, with the mark that says how its keys are kept, if any.
    """

    def __init__(self, reach: Reach, name: bytes) -> None:
        super().__init__(reach, name + SEPARATOR)
        self.name = name

    def __repr__(self) -> str:
        return f"<Namespace {self.name.decode('utf-8', 'backslashreplace')!r}>"

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        return arrived, (self.name,)

    def drop(self) -> None:
        """Delete all its keys at once, however many they are. Raises NodeLost; see `MemoryClient.drop`."""
        self._reach.run(calls.drop_space(self.name))

    def clear(self) -> None:
        """As `drop`."""
        self.drop()


def arrived(name: bytes) -> Namespace:
    """A namespace that came from another process, bound to the connection of this one."""
    from virgo.memory.region import client_near

    keep = keep_of(name)
    plain = name[len(keep.mark) :]
    return client_near().namespace(plain, copies=keep.copies, durable=keep.durable)
