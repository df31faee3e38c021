"""Memory: reads and writes of pooled memory from Python on the same machine, one at a time.

`get` reads keys over and over while nothing is written, so that our mapped client answers what it has read
before from its own memory, having looked at the store's clock. `both` sets one key and gets another in turn:
then every get is a look-up.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks import keepers, servers
from benchmarks.harness import Comparison, Contender, Entry, Figures, Hosted, Measure
from benchmarks.timing import one_at_a_time

SIZES = {64: "64 B", 64 * 1024: "64 KiB"}
_KEYS = 128  # 8 MiB of the large values: beyond the processor's nearer caches


class Keeper(Hosted):
    """Holds values by key; `get` and `set` are what is timed."""

    def __init__(self, quick: bool) -> None:
        super().__init__(quick)
        self._time_s = 0.1 if quick else 2.0
        self.get: Callable[[str], Any]
        self.set: Callable[[str, bytes], Any]

    @abstractmethod
    def start(self) -> None:
        """Start the server; set `get` and `set`."""

    def use(self, values: keepers.Values) -> None:
        """Take both from a client."""
        self.get, self.set = values.get, values.set

    def measure(self) -> Figures:
        figures: Figures = {}
        for size, label in SIZES.items():
            value = os.urandom(size)
            keys = [f"{size}:{number}" for number in range(_KEYS)]
            for key in keys:
                self.set(key, value)
            if any(bytes(self.get(key)) != value for key in keys):
                raise RuntimeError(f"{self.name} gives wrong values of {label}")
            following = itertools.cycle(keys).__next__
            for operation, call in (
                ("get", lambda following=following: self.get(following())),
                ("set", lambda following=following, value=value: self.set(following(), value)),
                ("both", partial(self._both, following, value)),
            ):
                timed = one_at_a_time(call, time_s=self._time_s)
                figures[f"{operation} {label}"] = timed.rate
                figures[f"{operation} {label}, p50"] = timed.p50_s
                figures[f"{operation} {label}, p99"] = timed.p99_s
        return figures

    def _both(self, following: Callable[[], str], value: bytes) -> None:
        self.set(following(), value)
        self.get(following())


class OurMapped(Keeper):
    """Our client on the node's machine: reads and writes the mapped store."""

    name = "virgo mapped"
    promises = (
        "mapped file, one copy out, none of what was read since the last change; a set outlasts node and "
        "client, not a power loss"
    )

    def start(self) -> None:
        place = self.running.enter_context(servers.virgo_cloud())
        self.use(keepers.virgo_mapped(self.running, place.home))


class OurWire(Keeper):
    """Our client's plain requests over TCP, without any mapping."""

    name = "virgo TCP"
    promises = "TCP, token, deadline on each call; outlasts the node's process, not a power loss"

    def start(self) -> None:
        place = self.running.enter_context(servers.virgo_cloud())
        self.use(keepers.virgo_tcp(self.running, place))


class Redis(Keeper):
    """redis-py with hiredis on redis-server."""

    name = "redis-py"
    promises = "TCP; no persistence: gone with the process"
    needs = keepers.REDIS_NEEDS

    def start(self) -> None:
        port = self.running.enter_context(servers.redis_server())
        self.use(keepers.redis_py(self.running, port))


class Memcached(Keeper):
    """pymemcache on memcached."""

    name = "pymemcache"
    promises = "TCP; volatile cache, may evict; set waits for its answer"
    needs = keepers.MEMCACHED_NEEDS

    def start(self) -> None:
        port = self.running.enter_context(servers.memcached())
        self.use(keepers.pymemcache(self.running, port))


class Lmdb(Keeper):
    """The floor: LMDB in this process, a transaction for each read and each write."""

    name = "LMDB"
    promises = (
        "in-process, one copy out (bytes); sync off: outlasts the process, not a power loss; no sharing rules"
    )
    needs = (servers.module("lmdb"),)

    def start(self) -> None:
        import lmdb

        directory = self.running.enter_context(tempfile.TemporaryDirectory(prefix="lmdb-"))
        env = self.running.enter_context(lmdb.open(directory, map_size=1 << 30, sync=False, metasync=False))

        def get(key: str) -> Any:
            with env.begin() as txn:
                return txn.get(key.encode())

        def put(key: str, value: bytes) -> None:
            with env.begin(write=True) as txn:
                txn.put(key.encode(), value)

        self.get, self.set = get, put


def contenders(quick: bool) -> Sequence[Contender]:
    """Ours by both ways, the peers, and the floor."""
    return (OurMapped(quick), Redis(quick), OurWire(quick), Memcached(quick), Lmdb(quick))


def _comparisons() -> tuple[Comparison, ...]:
    gets, sets, boths = (
        [f"{operation} {label}" for label in SIZES.values()] for operation in ("get", "set", "both")
    )
    made = [
        Comparison("virgo mapped", peer, (measure,), goal)
        for peer in ("pymemcache", "redis-py")
        for measure, goal in zip(gets, (50.0, 150.0), strict=True)
    ]
    made.append(Comparison("virgo mapped", "LMDB", (gets[0],), goal=0.5))  # within twice its time
    made.append(Comparison("virgo mapped", "LMDB", (gets[1],)))
    peers = ("pymemcache", "redis-py")
    made += [Comparison("virgo mapped", peer, tuple(sets)) for peer in peers]
    made += [Comparison("virgo mapped", peer, tuple(boths)) for peer in (*peers, "LMDB")]
    made.append(Comparison("virgo TCP", "redis-py", (*gets, *sets), goal=1.5))
    return tuple(made)


ENTRY = Entry(
    name="memory",
    title="get and set from Python on the same machine, one at a time",
    measures=tuple(
        measure
        for label in SIZES.values()
        for operation in ("get", "set", "both")
        for measure in (
            Measure(f"{operation} {label}", "1/s"),
            Measure(f"{operation} {label}, p50", "s"),
            Measure(f"{operation} {label}, p99", "s"),
        )
    ),
    comparisons=_comparisons(),
    contenders=contenders,
)
