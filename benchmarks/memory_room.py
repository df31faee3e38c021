"""Memory's room: bytes held for small values, and after millions of set/delete cycles.

The cycles keep a fixed number of values of 16 B to 8 KiB alive, evenly spread over the powers of two: each
deletes one at random and sets a new one of another size. VIRGO_BENCH_CYCLES says how many there are; 10
million take from three to fifteen minutes for each contender and round.
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks import keepers, servers
from benchmarks.harness import ROUNDS_MIN, Comparison, Contender, Entry, Figures, Hosted, Measure
from benchmarks.held import held_bytes, with_descendants
from benchmarks.timing import one_at_a_time

CYCLES = int(os.environ.get("VIRGO_BENCH_CYCLES", "300000"))
_CYCLES_QUICK = 4_000
_MAPPED_SHARE = 10  # one of so many cycles is done where each is a transaction of its own
_BATCH = 1_000
_VALUE_BYTES, _VALUES, _VALUES_QUICK = 100, 1_000_000, 20_000
_LIVE, _LIVE_QUICK = 100_000, 2_000
_SIZE_BITS = (4.0, 13.0)
_PROBES = 1_000  # keys that are read and set before and after the cycles

EMPTY, PER_VALUE, OVERHEAD = "held when empty", "held per value of 100 B", "overhead per value of 100 B"
FRESH, CHURNED, ENDED = (f"held {when}" for when in ("before the cycles", "after them", "with all deleted"))
SHARE_FRESH, SHARE_CHURNED = "held per live byte, before", "held per live byte, after"
FRAGMENTS = "fragmentation by the cycles"
RATES = ("get, before", "get, after", "set, before", "set, after")
CYCLE = "cycles"


@dataclass(frozen=True, slots=True)
class Served:
    """A fresh server.

    Attributes:
        values: a client of it.
        held: how many bytes the server holds now.
    """

    values: keepers.Values
    held: Callable[[], int]


class Live:
    """The values that are alive, and how they change: the same for every contender."""

    def __init__(self, count: int) -> None:
        self._random = random.Random(1)
        self._bytes = os.urandom(2 ** int(_SIZE_BITS[1]))
        self._sizes = [int(2 ** self._random.uniform(*_SIZE_BITS)) for _ in range(50_000)]
        self._numbers = itertools.count()
        self._keys: list[str] = []
        self.count = count

    def __repr__(self) -> str:
        return f"<Live {len(self._keys)} of {self.count}>"

    def new(self, count: int) -> dict[str, bytes]:
        """Values to be set, which are alive from now on."""
        made = {}
        for number in itertools.islice(self._numbers, count):
            made[f"live:{number}"] = self.value(number)
        self._keys += made
        return made

    def value(self, number: int) -> bytes:
        """The value of a number."""
        return self._bytes[: self._sizes[number % len(self._sizes)]]

    def old(self, count: int) -> list[str]:
        """Keys to be deleted, at random."""
        found = []
        for _ in range(count):
            place = self._random.randrange(len(self._keys))
            self._keys[place], self._keys[-1] = self._keys[-1], self._keys[place]
            found.append(self._keys.pop())
        return found

    def live_bytes(self) -> int:
        """Of keys and values together."""
        return sum(len(key) + len(self.value(_number(key))) for key in self._keys)

    def check(self, values: keepers.Values, name: str) -> None:
        """Raise RuntimeError unless some of the values are right."""
        for key in self._keys[:: max(1, len(self._keys) // 1000)]:
            if values.get(key) != self.value(_number(key)):
                raise RuntimeError(f"{name} gives a wrong value for {key}")


def _number(key: str) -> int:
    return int(key.partition(":")[2])


class Roomy(Hosted):
    """Holds many values. Cycles are made in batches: so many deletions, then so many sets."""

    def __init__(self, quick: bool) -> None:
        super().__init__(quick)
        self._cycles = min(_CYCLES_QUICK, CYCLES) if quick else CYCLES
        self._time_s = 0.02 if quick else 0.5

    def start(self) -> None:
        """Nothing: each part has a fresh server."""

    @abstractmethod
    def serve(self) -> AbstractContextManager[Served]:
        """A fresh server for as long as the block lasts."""

    def measure(self) -> Figures:
        with self.serve() as served:
            figures = self._fill(served)
            if self.quick:  # the figures mean nothing, so one server is enough
                return figures | self._churn(served)
        with self.serve() as served:
            return figures | self._churn(served)

    def _fill(self, served: Served) -> Figures:
        count = _VALUES_QUICK if self.quick else _VALUES
        value = os.urandom(_VALUE_BYTES)
        empty = served.held()
        keys = [f"k{number:07}" for number in range(count)]
        for batch in _batches(keys):
            served.values.set_many(dict.fromkeys(batch, value))
        held = (served.held() - empty) / count
        if any(served.values.get(key) != value for key in keys[:: max(1, count // 1000)]):
            raise RuntimeError(f"{self.name} gives wrong values")
        return {EMPTY: empty, PER_VALUE: held, OVERHEAD: held - _VALUE_BYTES - len(keys[0])}

    def _churn(self, served: Served) -> Figures:
        live = Live(_LIVE_QUICK if self.quick else _LIVE)
        probes = [f"probe:{number}" for number in range(_PROBES)]
        empty = served.held()
        served.values.set_many(dict.fromkeys(probes, bytes(_VALUE_BYTES)))
        for _ in range(live.count // _BATCH):
            served.values.set_many(live.new(_BATCH))
        fresh, fresh_bytes = served.held() - empty, live.live_bytes()
        speeds = self._speeds(served.values, probes)
        start = time.perf_counter()
        self.cycle(served.values, live)
        taken_s = time.perf_counter() - start
        churned, churned_bytes = served.held() - empty, live.live_bytes()
        live.check(served.values, self.name)
        speeds += self._speeds(served.values, probes)
        for _ in range(live.count // _BATCH):
            served.values.delete_many(live.old(_BATCH))
        ended = max(0, served.held() - empty)
        shares = {SHARE_FRESH: fresh / fresh_bytes, SHARE_CHURNED: churned / churned_bytes}
        fragments = max(0.0, churned - churned_bytes * shares[SHARE_FRESH])
        figures = {FRESH: fresh, CHURNED: churned, FRAGMENTS: fragments, ENDED: ended}
        order = (RATES[0], RATES[2], RATES[1], RATES[3])
        return figures | shares | dict(zip(order, speeds, strict=True)) | {CYCLE: self._cycles / taken_s}

    def cycle(self, values: keepers.Values, live: Live) -> None:
        """Make all cycles."""
        for _ in range(self._cycles // _BATCH):
            values.delete_many(live.old(_BATCH))
            values.set_many(live.new(_BATCH))

    def _speeds(self, values: keepers.Values, probes: Sequence[str]) -> list[float]:
        """Rates of get and set."""
        following, value = itertools.cycle(probes).__next__, bytes(_VALUE_BYTES)
        gets = one_at_a_time(lambda: values.get(following()), time_s=self._time_s)
        sets = one_at_a_time(lambda: values.set(following(), value), time_s=self._time_s)
        return [gets.rate, sets.rate]


def _batches(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    return (keys[start : start + _BATCH] for start in range(0, len(keys), _BATCH))


class Ours(Roomy):
    """A cloud of one node: its memory port's process and all that belongs to it."""

    name = "virgo"
    promises = "counted: supervisor, engine, node, 2 workers, and the store's file; cycles through the node"

    @contextmanager
    def serve(self) -> Iterator[Served]:
        from virgo.home import node_directory

        with ExitStack() as running:
            cloud = running.enter_context(servers.virgo_cloud())
            values = keepers.virgo_mapped(running, cloud.home)
            supervisor, store = cloud.supervisor().pid, node_directory(cloud.home, "n1") / "memory"
            yield Served(values, lambda: held_bytes(with_descendants(supervisor), store))


class OursMapped(Ours):
    """The same, where the client makes each change by mapping, in a transaction of its own."""

    name = "virgo mapped"
    promises = (
        f"the same, but a tenth of the cycles ({CYCLES // _MAPPED_SHARE:,}), each by mapping, one by one"
    )

    def __init__(self, quick: bool) -> None:
        super().__init__(quick)
        self._cycles //= _MAPPED_SHARE

    def measure(self) -> Figures:
        with self.serve() as served:
            return self._churn(served)

    def cycle(self, values: keepers.Values, live: Live) -> None:
        for _ in range(self._cycles // 100):
            for key in live.old(100):
                values.delete(key)
            for key, value in live.new(100).items():
                values.set(key, value)


class Redis(Roomy):
    """redis-server."""

    name = "redis-server"
    promises = (
        "counted: its process; jemalloc, no persistence, no active defragmentation; cycles by MSET and DEL"
    )
    needs = keepers.REDIS_NEEDS

    @contextmanager
    def serve(self) -> Iterator[Served]:
        with tempfile.TemporaryDirectory(prefix="redis-") as directory, ExitStack() as running:
            server = running.enter_context(servers.redis(directory))
            yield Served(keepers.redis_py(running, server.port), lambda: held_bytes([server.pid]))


class Memcached(Roomy):
    """memcached."""

    name = "memcached"
    promises = (
        "counted: its process; -m 2048, errors rather than evictions (-M); slabs; many sets in one write"
    )
    needs = keepers.MEMCACHED_NEEDS

    @contextmanager
    def serve(self) -> Iterator[Served]:
        with ExitStack() as running:
            server = running.enter_context(servers.memcached_of(2048, "-M"))
            yield Served(keepers.pymemcache(running, server.port), lambda: held_bytes([server.pid]))


def contenders(quick: bool) -> Sequence[Contender]:
    """Ours in two ways, and the peers."""
    return (Ours(quick), Redis(quick), OursMapped(quick), Memcached(quick))


_BYTES = (EMPTY, PER_VALUE, OVERHEAD, FRESH, SHARE_FRESH, CHURNED, SHARE_CHURNED, FRAGMENTS, ENDED)

ENTRY = Entry(
    name="memory_room",
    title=f"Memory held: 1 million values of 100 B; 100,000 up to 8 KiB, and {CYCLES:,} set/delete cycles",
    measures=(*(Measure(name, "B") for name in _BYTES), *(Measure(name, "1/s") for name in (*RATES, CYCLE))),
    comparisons=tuple(
        Comparison(ours, peer, measures)
        for peer in ("redis-server", "memcached")
        for ours, measures in (
            ("virgo", (EMPTY, PER_VALUE, OVERHEAD, SHARE_FRESH, SHARE_CHURNED, *RATES, CYCLE)),
            ("virgo mapped", (SHARE_CHURNED, *RATES, CYCLE)),
        )
    ),
    contenders=contenders,
    rounds=ROUNDS_MIN,
    time_s_max=600 + CYCLES / 5_000,
)
