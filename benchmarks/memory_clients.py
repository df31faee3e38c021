"""Memory by clients: 1 to 8 client processes at once get and set values of 64 B."""

from __future__ import annotations

import itertools
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from benchmarks import keepers, servers
from benchmarks.crowd import Crowd, Operations
from benchmarks.harness import ROUNDS_MIN, Comparison, Contender, Entry, Figures, Hosted, Measure
from benchmarks.keepers import Values

CLIENTS = (1, 2, 4, 8)
_CLIENTS_QUICK = 2  # at most, to see only that it runs
SETS_EVERY = {"get": 0, "set": 1, "90/10": 10}  # of so many calls one is a set; 0 for none
_CLIENT_LIBRARIES = ("virgo.memory.client", "redis", "pymemcache.client.base")
_VALUE_BYTES = 64
_KEYS = 1024
_CHECKED = 64  # keys that each client checks before it begins

Opener = Callable[[ExitStack], Values]


def _measure(operation: str, clients: int) -> str:
    return f"{operation}, {clients} client{'s' if clients > 1 else ''}"


def joins(opener: Opener, keys: Sequence[str], value: bytes, running: ExitStack, number: int) -> Operations:
    """Make a client of these keys; all have this value."""
    values = opener(running)
    if any(values.get(key) != value for key in keys[:: len(keys) // _CHECKED]):
        raise RuntimeError("a client gets wrong values")
    first = number * len(keys) // CLIENTS[-1]  # so that not all are at the same key
    following = itertools.cycle([*keys[first:], *keys[:first]]).__next__
    return {operation: call_of(values, every, following, value) for operation, every in SETS_EVERY.items()}


def call_of(values: Values, every: int, following: Callable[[], str], value: bytes) -> Callable[[], object]:
    """A get of the next key, or its set: of `every` calls one is a set; 0 for none."""
    if every == 0:
        return lambda: values.get(following())
    if every == 1:
        return lambda: values.set(following(), value)
    sets = itertools.cycle([False] * (every - 1) + [True]).__next__
    return lambda: values.set(following(), value) if sets() else values.get(following())


class Shared(Hosted):
    """A server that several processes use; all use the same keys."""

    def __init__(self, quick: bool) -> None:
        super().__init__(quick)
        self._time_s = 0.01 if quick else 0.5
        self._most = _CLIENTS_QUICK if quick else CLIENTS[-1]
        self.opener: Opener

    @abstractmethod
    def start(self) -> None:
        """Start the server, and set `opener`, which makes a client."""

    def measure(self) -> Figures:
        opener = self.opener
        value = os.urandom(_VALUE_BYTES)
        keys = [f"k{number:04}" for number in range(_KEYS)]
        with ExitStack() as running:
            opener(running).set_many(dict.fromkeys(keys, value))
        figures: Figures = {}
        with Crowd(partial(joins, opener, keys, value), self._most, _CLIENT_LIBRARIES) as crowd:
            for clients in CLIENTS:
                there = min(clients, self._most)
                for operation in SETS_EVERY:
                    measure = _measure(operation, clients)
                    figures[measure] = crowd.rate(operation, clients=there, time_s=self._time_s)
                    p99_s = crowd.p99_s(operation, clients=there, time_s=self._time_s)
                    figures[f"{measure}, p99"] = p99_s
        return figures


class OurMapped(Shared):
    """Our clients on the node's machine."""

    name = "virgo mapped"
    promises = "no daemon; one writer at a time, readers wait for nobody; a set outlasts node and client"

    def start(self) -> None:
        place = self.running.enter_context(servers.virgo_cloud())
        self.opener = partial(keepers.virgo_mapped, home=place.home)


class Redis(Shared):
    """redis-py clients of one redis-server."""

    name = "redis-py"
    promises = "TCP, one thread in the server; no persistence: gone with the process"
    needs = keepers.REDIS_NEEDS

    def start(self) -> None:
        port = self.running.enter_context(servers.redis_server())
        self.opener = partial(keepers.redis_py, port=port)


class Memcached(Shared):
    """pymemcache clients of one memcached."""

    name = "pymemcache"
    promises = "TCP, four threads in the server; volatile cache, may evict; set waits for its answer"
    needs = keepers.MEMCACHED_NEEDS

    def start(self) -> None:
        port = self.running.enter_context(servers.memcached())
        self.opener = partial(keepers.pymemcache, port=port)


def contenders(quick: bool) -> Sequence[Contender]:
    """Ours and the peers."""
    return (OurMapped(quick), Redis(quick), Memcached(quick))


_ALL = [_measure(operation, clients) for operation in SETS_EVERY for clients in CLIENTS]

ENTRY = Entry(
    name="memory_clients",
    title=f"get and set of 64 B by client processes at once ({os.cpu_count()} processors), all together",
    measures=tuple(
        one for measure in _ALL for one in (Measure(measure, "1/s"), Measure(f"{measure}, p99", "s"))
    ),
    comparisons=tuple(
        Comparison("virgo mapped", peer, (measure, f"{measure}, p99"))
        for peer in ("redis-py", "pymemcache")
        for measure in _ALL
    ),
    contenders=contenders,
    rounds=ROUNDS_MIN,
)
