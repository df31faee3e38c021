"""Calls by clients: 1 to 16 client processes at once make no-op calls, one at a time and many at once.

Those of ours, of Ray and of Dask share one node, session or scheduler with two workers. A
ProcessPoolExecutor and a loky executor belong to the program that made them: there each client has a pool of
its own, which is what programs have that use them, and shares nothing but the processors.

Ray takes part with up to 4 clients. A worker of Ray's belongs to one client, and Ray ends those that are idle
beyond the number of processors: with more clients on two processors it begins workers all the time, and some
clients have waited for a minute and longer for one call.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from benchmarks.crowd import Crowd, Operations
from benchmarks.harness import ROUNDS_MIN, Contender, Entry, Figures, Measure
from benchmarks.pools import OURS, POOLS, RAY, Opener, Pool, Pooled, comparisons
from benchmarks.tasks import same

CLIENTS = (1, 2, 4, 8, 16)
CLIENTS_MAX = {RAY.name: 4}
ONE, MANY = "one at a time", "pipelined"
_BATCH = 100  # calls that a client makes at once
_CLIENTS_QUICK = 2  # at most, to see only that it runs


def joins(opener: Opener, running: ExitStack, _number: int) -> Operations:
    """Join the pool, or make one."""
    calls = opener(running)
    if calls.one(same, 7) != 7 or calls.many(same, range(10)) != list(range(10)):
        raise RuntimeError("a client gets wrong results")
    return {ONE: lambda: calls.one(same, 7), MANY: lambda: calls.many(same, range(_BATCH))}


class Shared(Pooled):
    """A pool that several programs use, or one for each of them."""

    def __init__(self, pool: Pool, quick: bool) -> None:
        super().__init__(pool, quick)
        self._time_s = 0.02 if quick else 0.3
        self._counts = counts(pool.name)
        self._most = _CLIENTS_QUICK if quick else self._counts[-1]
        shared = "all clients share it" if pool.shared else "each client has a pool of its own"
        fewer = f", up to {self._counts[-1]} of them" if self._counts != CLIENTS else ""
        self.promises = f"{pool.promises}; {shared}{fewer}"

    def start(self) -> None:
        self.opener = self.pool.serve(self.running)

    def measure(self) -> Figures:
        figures: Figures = {}
        with Crowd(partial(joins, self.opener), self._most, self.pool.libraries) as crowd:
            for clients in self._counts:
                there = min(clients, self._most)
                one = crowd.rate_and_p99_s(ONE, clients=there, time_s=self._time_s)
                many = _BATCH * crowd.rate(MANY, clients=there, time_s=self._time_s)
                figures |= dict(zip(names(clients), (*one, many), strict=True))
        return figures


def counts(pool: str) -> tuple[int, ...]:
    """How many clients a pool of that name is used by, one after the other."""
    return tuple(clients for clients in CLIENTS if clients <= CLIENTS_MAX.get(pool, clients))


def names(clients: int) -> tuple[str, str, str]:
    """Of the measures of so many clients: calls per second, their p99, and calls per second pipelined."""
    count = f"{clients} client{'s' if clients > 1 else ''}"
    return f"{ONE}, {count}", f"{ONE}, {count}, p99", f"{MANY}, {count}"


def contenders(quick: bool) -> Sequence[Contender]:
    """Every pool."""
    return [Shared(pool, quick) for pool in POOLS]


def all_names(pool: str) -> list[str]:
    """Of all measures that a pool of that name takes."""
    return [name for kind in zip(*map(names, counts(pool)), strict=True) for name in kind]


ENTRY = Entry(
    name="cpu_clients",
    title=f"No-op calls by client processes at once, all together ({os.cpu_count()} processors)",
    measures=tuple(Measure(name, "s" if name.endswith("p99") else "1/s") for name in all_names(OURS.name)),
    comparisons=tuple(
        comparison
        for pool in POOLS
        if pool is not OURS
        for comparison in comparisons(all_names(pool.name), [pool.name])
    ),
    contenders=contenders,
    rounds=ROUNDS_MIN,
)
