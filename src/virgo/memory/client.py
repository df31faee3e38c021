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

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, TypeVar

from virgo.errors import Conflict, NotRunning, UnknownCommand
from virgo.memory import calls
from virgo.memory.calls import Data, Key, Local, RegionInfo, Versioned
from virgo.memory.leases import Nearby, View, descriptor_of, load_arrays, not_near
from virgo.memory.mapped import MISSING, step_aside
from virgo.memory.region import Region
from virgo.memory.segments import Segment
from virgo.memory.verbs import BY_NAME
from virgo.wire.call import Call, Runner, whole

__all__ = ["MemoryClient", "Region", "RegionInfo", "Versioned"]

if TYPE_CHECKING:
    from virgo.memory.arrays import SharedArray

T = TypeVar("T")
_SCAN_KEYS = 1000
_TABLE_AGE_S_MIN = 0.05  # the slot table is not asked for more often


class MemoryClient(MutableMapping[Key, bytes]):
    """The cloud's memory, through one node. Safe for use from several threads, and after a fork.

    Args:
        runner: runs the calls.
        mapped: whether to read and write by mapping where that is possible.
    """

    def __init__(self, runner: Runner, *, mapped: bool = True) -> None:
        self._runner = runner
        self._local: Local | None = None
        self._seek_local = mapped
        self._table_at = 0.0
        self._near = Nearby()

    def __repr__(self) -> str:
        return f"<MemoryClient {self._runner!r}{' mapped' if self._local is not None else ''}>"

    @property
    def mapped(self) -> bool:
        """Whether what the connected node holds is read, and if it is ours written, by mapping."""
        return (self._local or self._attach()) is not None

    def _run(self, call: Call[T]) -> T:
        """Have the node do it."""
        step_aside()
        return self._runner.run(call)

    def _attach(self) -> Local | None:
        if self._seek_local:
            try:
                self._local = Local(self._run(calls.LOCAL), self._run(calls.SLOTS))
            except (NotRunning, UnknownCommand):
                self._local = None
            self._seek_local = False
        return self._local

    # --- regions ------------------------------------------------------------------------------

    def malloc(self, size: int, *, node: str | None = None, shared: bool = False) -> Region:
        """Allocate a region.

        One larger than a chunk (4 MiB) is spread over the nodes. Otherwise it lies on the connected node
        while that has room, else on another; `node` names the one on which it is to lie whole. A shared one
        always lies whole on a node, as a file in shared memory, which processes of its machine map.

        Raises:
            BadArgument, TooLarge: not 1 byte to 1 GiB, or if shared to 1 TiB. PoolFull: no room. DiskFull:
                none where shared regions lie. NoNode: no such node is up.
        """
        region = Region(self, self._run(calls.malloc(size, node, shared=shared)), size)
        if shared:
            self.segment(region.id)
        return region

    def segment(self, identifier: int) -> Segment | None:
        """The file of a shared region, None if it is not shared or not on this machine. Raises UnknownId."""
        info = self._run(calls.segment(identifier))
        return None if info is None else self._near.learn(info)

    def view_region(self, identifier: int, *, write: bool = False, timeout_s: float = 0.0) -> View:
        """A region's bytes, without a copy where that is possible; see `Region.view`."""
        segment = self.segment(identifier)
        if segment is None and write:
            raise not_near(identifier, "writing in place")
        found = self.get_region(identifier) if segment is None else segment
        return View(found, write=write, timeout_s=timeout_s)

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
        identifier = self._run(calls.malloc(size, node or calls.HERE, shared=True, note=note))
        array: SharedArray = arrays.creator(self.attach(identifier))
        return array

    def attach(self, identifier: int) -> SharedArray:
        """The array of an id, to read, and after `acquire` to write. Raises UnknownId, BadArgument."""
        arrays = load_arrays()
        info = self._run(calls.segment(identifier))
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
        local = self._local or self._attach()
        if local is not None:
            try:
                found = local.region(identifier)
            except NotRunning:
                self._local = None
            else:
                if found is not MISSING:
                    return found  # type: ignore[no-any-return]
        return self._on_file(identifier, Segment.read, calls.get_region(identifier))

    def _on_file(self, identifier: int, work: Callable[[Segment], T], call: Call[T]) -> T:
        """On the file of a shared region that is known to be near, else by the node."""
        found = self._near.do(identifier, work, MISSING) if self._near else MISSING
        return self._run(call) if found is MISSING else found

    def read_region(self, identifier: int, offset: int = 0, size: int | None = None) -> bytes:
        """A part of a region's value; see `Region.read`."""
        call = calls.get_region(identifier, offset, size)
        local = self._local or self._attach()
        if local is not None:
            try:
                found = local.read_region(identifier, offset, size)
            except NotRunning:
                self._local = None
            else:
                if found is not MISSING:
                    return found  # type: ignore[no-any-return]
        return self._on_file(identifier, lambda segment: segment.read(offset, size), call)

    def set_region(self, identifier: int, data: Data, offset: int | None = None) -> None:
        """Replace a region's value, or write over a part of it."""
        raw = calls.encode_data(data)
        call = calls.set_region(identifier, raw, offset)
        local = self._local or self._attach()
        if local is None or not local.set_region(identifier, raw, offset):
            self._on_file(identifier, lambda segment: segment.write(raw, offset), call)

    def free_region(self, identifier: int) -> None:
        """Free a region."""
        self._near.forget(identifier)
        self._run(calls.free_region(identifier))

    def describe(self, identifier: int) -> RegionInfo:
        """What its home knows of a region."""
        return self._run(calls.describe(identifier))

    # --- keys ---------------------------------------------------------------------------------

    def _do(self, call: Call[T]) -> T:
        """A command on one key: here if the key is, else by the node."""
        local = self._local or self._attach()
        if local is not None:
            found = local.run(BY_NAME[str(call.request[0])], call.request)
            if found is not MISSING:
                return call.decode(found)
        result = self._run(call)
        self._learn(calls.encode_key(call.request[1]))  # type: ignore[arg-type]
        return result

    def _ask(self, key: Key) -> bytes | None:
        """A key's value from the node, for those that are not mapped or not here."""
        raw = calls.encode_key(key)
        found = self._run(calls.get_key(raw))
        if found is not None:
            self._learn(raw)
        return found

    def _learn(self, raw: bytes) -> None:
        """Know where a key is that the node has just found or made."""
        local = self._local
        if local is not None and local.lacks(raw) and time.monotonic() - self._table_at >= _TABLE_AGE_S_MIN:
            self._table_at = time.monotonic()
            local.learn(self._run(calls.SLOTS))

    def _find(self, key: Key) -> bytes | None:
        local = self._local or self._attach()
        if local is None:
            return self._ask(key)
        try:
            found = local.key(key if type(key) is bytes else calls.encode_key(key))
        except NotRunning:
            self._local = None
            return self._ask(key)
        return self._ask(key) if found is MISSING else found

    def get(self, key: Key, default: Any = None) -> Any:
        """The value of a key, or `default`. Raises NodeLost: absence is never guessed."""
        found = self._find(key)
        return default if found is None else found

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
        return self._do(calls.set_with(key, value, ttl_s, sliding=sliding, only_if=only_if))

    def read(self, key: Key) -> Versioned | None:
        """The value of a key with its version and time, None if it is absent. Raises NodeLost."""
        return self._do(calls.read_key(key))

    def compare_and_set(self, key: Key, value: Data, *, version: int, ttl_s: float | None = None) -> int:
        """Set a key if it still has the version that `read` told, 0 for absent; returns the new version.

        Raises:
            Conflict: it has another one by now, and is left as it is.
        """
        found = self._do(calls.write_key(key, value, ttl_s, version=max(0, version)))
        if found is None:
            raise Conflict(f"the key {calls.encode_key(key)!r:.60} has another version than {version}")
        return found

    def increment(self, key: Key, step: int = 1) -> int:
        """Add to the number under a key, 0 if absent; returns the sum. Raises BadArgument if it is none."""
        return self._do(calls.increment_key(key, step))

    def append(self, key: Key, data: Data) -> int:
        """Add to the end of a value, b"" if it is absent; returns its length."""
        return self._do(calls.append_key(key, data))

    def expire(self, key: Key, ttl_s: float | None) -> bool:
        """Let a key expire after so many seconds, or with None no longer; whether that changed something."""
        return self._do(calls.expire_key(key, ttl_s))

    def setdefault(self, key: Key, default: Any = None) -> bytes:
        """The value of a key, which is set to `default` if it is absent; never over another's value."""
        while True:
            found = self._find(key)
            if found is not None:
                return found
            if self.set(key, default, only_if="absent"):
                return calls.encode_data(default)

    def get_many(self, keys: Iterable[Key]) -> dict[Key, bytes]:
        """The values of those keys that are there."""
        wanted = list(keys)
        values = self._run(calls.get_keys(wanted)) if wanted else []
        return {key: value for key, value in zip(wanted, values, strict=True) if value is not None}

    def set_many(self, items: Mapping[Key, Data] | Iterable[tuple[Key, Data]]) -> None:
        """Set several keys in one request; each node's part is atomic, the whole is not."""
        pairs = list(items.items() if isinstance(items, Mapping) else items)
        if pairs:
            self._run(calls.set_keys(pairs))

    def delete(self, *keys: Key) -> int:
        """Delete keys; returns how many there were."""
        return self._run(calls.delete_keys(keys)) if keys else 0

    def pop(self, key: Key, default: Any = MISSING) -> Any:
        """The value of a key, which is deleted, in one step."""
        found = self._do(calls.take_key(key))
        if found is not None:
            return found
        if default is MISSING:
            raise KeyError(key)
        return default

    def clear(self) -> None:
        """Delete all keys of the cloud; regions stay."""
        self._run(calls.flush())

    def stats(self) -> dict[str, Any]:
        """Figures of the connected node's pool."""
        return self._run(calls.stats())

    def __getitem__(self, key: Key) -> bytes:
        found = self._find(key)
        if found is None:
            raise KeyError(key)
        return found

    def __setitem__(self, key: Key, value: Data) -> None:
        local = self._local or self._attach()
        raw, data = calls.encode_key(key), calls.encode_data(value)
        if local is None or not local.put(raw, data):
            self._run(calls.set_key(raw, data, None, ""))
            self._learn(raw)

    def __delitem__(self, key: Key) -> None:
        if not self._do(calls.delete_keys([key])):
            raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, (bytes, str)):
            return False
        raw = calls.encode_key(key)
        local = self._local or self._attach()
        if local is not None:
            try:
                found = local.key(raw)
            except NotRunning:
                self._local = None
            else:
                if found is not MISSING:
                    return found is not None
        return self._run(calls.exists(raw))

    def __iter__(self) -> Iterator[bytes]:
        """All keys, as bytes. One that is there from beginning to end comes once."""
        cursor = 0
        while True:
            cursor, keys = self._run(calls.scan(cursor, _SCAN_KEYS))
            yield from keys
            if not cursor:
                return

    def __len__(self) -> int:
        return self._run(calls.count_keys())

    def close(self) -> None:
        """Let go of the map; the runner is the caller's."""
        self._local = None
