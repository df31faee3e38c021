"""Memory by size: values of 64 B to 64 MiB, and a numpy array of 64 MiB; one client, one call at a time.

Every contender gives a value that the caller may keep, except where `promises` says that it is a view. A
further way to hold values or arrays is a subclass of `Sized`; it need not take all sizes.
"""

from __future__ import annotations

import itertools
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from multiprocessing.shared_memory import SharedMemory
from typing import Any, TypeVar

from benchmarks import keepers, servers
from benchmarks.harness import ROUNDS_MIN, Comparison, Contender, Entry, Figures, Hosted, Measure, Need
from benchmarks.peers import ray_session
from benchmarks.timing import one_at_a_time

T = TypeVar("T")
KiB, MiB = 1024, 1024**2
SIZES = {64: "64 B", KiB: "1 KiB", 64 * KiB: "64 KiB", MiB: "1 MiB", 16 * MiB: "16 MiB", 64 * MiB: "64 MiB"}
_HELD_BYTES = 128 * MiB  # of the large sizes: beyond the processor's caches
_KEYS_MIN, _KEYS_MAX = 4, 128
_ARRAY_BYTES = 64 * MiB
_QUICK_BYTES_MAX = MiB // 2  # larger ones are cut to this by a quick run, and fewer are held
_ARRAY = {"array set": "array 64 MiB set", "array get": "array 64 MiB get", "sum": "array 64 MiB get and sum"}
_RAY_BYTES = 2 * 1024**3  # what is overwritten is given back a little later


class Sized(Hosted):
    """Keeps values, of each size under some keys, and arrays.

    Attributes:
        sizes: those that it is measured with.
        get, set, delete: of values.
        sets: whether sets are measured too.
    """

    needs: tuple[Need, ...] = (servers.module("numpy"),)
    sizes: Sequence[int] = tuple(SIZES)
    sets = True

    def __init__(self, quick: bool) -> None:
        super().__init__(quick)
        self._time_s = 0.01 if quick else 0.5
        self._bytes_max = _QUICK_BYTES_MAX if quick else _ARRAY_BYTES
        self.get: Callable[[str], Any]
        self.set: Callable[[str, bytes], Any]
        self.delete: Callable[[str], Any]

    @abstractmethod
    def start(self) -> None:
        """Start the server; set `get`, `set` and `delete`."""

    def use(self, values: keepers.Values) -> None:
        """Take these from a client."""
        self.get, self.set, self.delete = values.get, values.set, values.delete

    def touch(self, key: str) -> None:
        """Get a value: what is timed."""
        self.get(key)

    def put_array(self, key: str, array: Any) -> None:
        """Keep an array; by default as a copy of its bytes."""
        self.set(key, array.tobytes())

    def read_array(self, key: str, read: Callable[[Any], T]) -> T:
        """What `read` makes of the array, which may be read-only and last no longer."""
        import numpy

        return read(numpy.frombuffer(self.get(key)))

    def measure(self) -> Figures:
        figures: Figures = {}
        for size in self.sizes:
            figures |= self._measure_values(size)
        return figures | self._measure_arrays()

    def _measure_values(self, size: int) -> Figures:
        value = os.urandom(min(size, self._bytes_max))
        count = 2 if self.quick else max(_KEYS_MIN, min(_KEYS_MAX, _HELD_BYTES // size))
        keys = [f"{size}:{number}" for number in range(count)]
        for key in keys:
            self.set(key, value)
        if any(self.get(key) != value for key in keys):
            raise RuntimeError(f"{self.name} gives wrong values of {SIZES[size]}")
        following = itertools.cycle(keys).__next__
        figures = self._time(f"get {SIZES[size]}", lambda: self.touch(following()), size)
        if self.sets:
            figures |= self._time(f"set {SIZES[size]}", lambda: self.set(following(), value), size)
        for key in keys:
            self.delete(key)
        return figures

    def _measure_arrays(self) -> Figures:
        import numpy

        array = numpy.random.default_rng(1).random(min(_ARRAY_BYTES, self._bytes_max) // 8)
        keys = [f"array:{number}" for number in range(2)]
        for key in keys:
            self.put_array(key, array)
        if not all(self.read_array(key, lambda found: numpy.array_equal(found, array)) for key in keys):
            raise RuntimeError(f"{self.name} gives wrong arrays")
        following = itertools.cycle(keys).__next__
        figures = self._time(_ARRAY["array get"], lambda: self.read_array(following(), _edges), _ARRAY_BYTES)
        figures |= self._time(_ARRAY["sum"], lambda: self.read_array(following(), numpy.sum), _ARRAY_BYTES)
        if self.sets:
            figures |= self._time(
                _ARRAY["array set"], lambda: self.put_array(following(), array), _ARRAY_BYTES
            )
        for key in keys:
            self.delete(key)
        return figures

    def _time(self, measure: str, call: Callable[[], object], size: int) -> Figures:
        """Large values get twice the time, and still few calls: their p99 is then the longest one."""
        timed = one_at_a_time(call, time_s=self._time_s * (2 if size > MiB else 1))
        return {measure: timed.rate, f"{measure}, p50": timed.p50_s, f"{measure}, p99": timed.p99_s}


def _edges(array: Any) -> float:
    """Reads the first and the last number, so that the array is there."""
    return float(array[0] + array[-1])


class OurMapped(Sized):
    """Our client on the node's machine."""

    name = "virgo mapped"
    promises = (
        "one copy out, no daemon; a set outlasts node and client, not a power loss; an array is its bytes"
    )

    def start(self) -> None:
        place = self.running.enter_context(servers.virgo_cloud())
        self.use(keepers.virgo_mapped(self.running, place.home))


class OurViews(Sized):
    """The same client, which looks at values where they lie."""

    name = "virgo view"
    promises = "no copy: a whole value as of one moment, read-only, for the time of a `with` block"
    sets = False

    def start(self) -> None:
        place = self.running.enter_context(servers.virgo_cloud())
        memory = keepers.mapped_memory(self.running, place.home)
        self.set, self.delete, self._view = memory.set, memory.__delitem__, memory.view
        self.get = self._get

    def _get(self, key: str) -> bytes:
        with self._view(key) as found:
            return bytes(found)

    def touch(self, key: str) -> None:
        with self._view(key) as found:
            found[-1]

    def read_array(self, key: str, read: Callable[[Any], T]) -> T:
        import numpy

        with self._view(key) as found:
            return read(numpy.frombuffer(found))


class OurArrays(Sized):
    """The same client's arrays in shared memory."""

    name = "virgo array"
    promises = (
        "attached by id at each get, no copy, follows its one writer, who has a lease; set writes in place"
    )
    sizes = ()

    def start(self) -> None:
        place = self.running.enter_context(servers.virgo_cloud())
        self._memory = keepers.mapped_memory(self.running, place.home)
        self._held: dict[str, Any] = {}
        self.delete = lambda key: self._held.pop(key).region.free()

    def put_array(self, key: str, array: Any) -> None:
        if key not in self._held:
            self._held[key] = self._memory.array(array.shape, array.dtype)
        self._held[key][:] = array

    def read_array(self, key: str, read: Callable[[Any], T]) -> T:
        return read(self._memory.attach(self._held[key].region.id))


class Redis(Sized):
    """redis-py with hiredis on redis-server."""

    name = "redis-py"
    promises = "TCP; no persistence: gone with the process; an array is its bytes"
    needs = (*Sized.needs, *keepers.REDIS_NEEDS)

    def start(self) -> None:
        port = self.running.enter_context(servers.redis_server())
        self.use(keepers.redis_py(self.running, port))


class Memcached(Sized):
    """pymemcache on memcached."""

    name = "pymemcache"
    promises = "TCP; volatile; -m 2048 -I 128m, errors rather than evictions (-M); an array is its bytes"
    needs = (*Sized.needs, *keepers.MEMCACHED_NEEDS)

    def start(self) -> None:
        port = self.running.enter_context(servers.memcached(2048, "-I", "128m", "-M"))
        self.use(keepers.pymemcache(self.running, port))


class RayObjects(Sized):
    """Ray's object store: immutable objects, by reference."""

    name = "Ray"
    promises = (
        "shared-memory object store of 2 GiB; set makes a new object; bytes are copied out, arrays are views"
    )
    needs = (*Sized.needs, servers.module("ray"))

    def start(self) -> None:
        ray = self.running.enter_context(ray_session(_RAY_BYTES))
        held: dict[str, Any] = {}

        def put(key: str, value: Any) -> None:
            held[key] = ray.put(value)

        self.get, self.set, self.delete = lambda key: ray.get(held[key]), put, held.pop

    def put_array(self, key: str, array: Any) -> None:
        self.set(key, array)

    def read_array(self, key: str, read: Callable[[Any], T]) -> T:
        return read(self.get(key))


class Segments(Sized):
    """The floor: a named shared memory segment for each key, mapped once."""

    name = "shared_memory"
    promises = (
        "a copy into and out of a mapped segment, no sharing rules: readers see torn values; arrays are views"
    )

    def start(self) -> None:
        self._held: dict[str, SharedMemory] = {}
        self.running.callback(lambda: [self._remove(key) for key in list(self._held)])
        self.get, self.set, self.delete = self._get, self._set, self._remove

    def _get(self, key: str) -> bytes:
        return bytes(self._held[key].buf)

    def _set(self, key: str, value: bytes) -> None:
        segment = self._held.get(key)
        if segment is None:
            segment = self._held[key] = SharedMemory(create=True, size=len(value))
        segment.buf[:] = value

    def _remove(self, key: str) -> None:
        segment = self._held.pop(key)
        segment.close()
        segment.unlink()

    def put_array(self, key: str, array: Any) -> None:
        self._set(key, memoryview(array).cast("B"))  # type: ignore[arg-type]

    def read_array(self, key: str, read: Callable[[Any], T]) -> T:
        import numpy

        return read(numpy.frombuffer(self._held[key].buf))


def contenders(quick: bool) -> Sequence[Contender]:
    """Ours in three ways, the peers, and the floor."""
    return (
        OurMapped(quick),
        Redis(quick),
        OurViews(quick),
        Memcached(quick),
        OurArrays(quick),
        RayObjects(quick),
        Segments(quick),
    )


_PEERS = ("redis-py", "pymemcache", "Ray", "shared_memory")
_READS = [*(f"get {label}" for label in SIZES.values()), _ARRAY["array get"], _ARRAY["sum"]]
_OPERATIONS = [f"{operation} {label}" for label in SIZES.values() for operation in ("get", "set")]

ENTRY = Entry(
    name="memory_sizes",
    title="get and set of 64 B to 64 MiB from Python on the same machine, one client",
    measures=tuple(
        measure
        for operation in (*_OPERATIONS, *_ARRAY.values())
        for measure in (
            Measure(operation, "1/s"),
            Measure(f"{operation}, p50", "s"),
            Measure(f"{operation}, p99", "s"),
        )
    ),
    comparisons=(
        *(Comparison("virgo mapped", peer, (*_OPERATIONS, *_ARRAY.values())) for peer in _PEERS),
        *(Comparison("virgo view", peer, tuple(_READS)) for peer in _PEERS),
        *(Comparison("virgo array", peer, tuple(_ARRAY.values())) for peer in _PEERS),
    ),
    contenders=contenders,
    rounds=ROUNDS_MIN,
)
