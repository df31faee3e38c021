"""Latency of calls, one at a time: of a no-op, and of one that keeps its worker busy for a millisecond.

The millisecond is a loop that reads the clock (`tasks.busy`), not a sleep: a worker that sleeps leaves its
processor to the pool. What a call takes beyond it is the pool's. Many such calls at once show how well a pool
keeps its workers at work: without any cost of its own it would make a thousand a second for each worker.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness import Contender, Entry, Figures, Measure
from benchmarks.pools import POOLS, Pool, Pooled, comparisons
from benchmarks.servers import WORKERS
from benchmarks.tasks import busy, same
from benchmarks.timing import latencies, many_at_once

BUSY_S = 0.001
MEASURES = (
    Measure("no-op, p50", "s"),
    Measure("no-op, p99", "s"),
    Measure("1 ms, p50", "s"),
    Measure("1 ms, p99", "s"),
    Measure("beyond the 1 ms, p50", "s"),
    Measure("beyond the 1 ms, p99", "s"),
    Measure("1 ms, pipelined", "1/s"),
)


class Latency(Pooled):
    """Makes calls one at a time, then many of a millisecond at once."""

    def __init__(self, pool: Pool, quick: bool) -> None:
        super().__init__(pool, quick)
        self._time_s = 0.1 if quick else 1.5

    def measure(self) -> Figures:
        one, many = self.calls.one, self.calls.many
        if one(same, 7) != 7 or min(many(busy, [BUSY_S] * 10)) < 1:
            raise RuntimeError(f"{self.name} gives wrong results")
        no_op = latencies(lambda: one(same, 7), time_s=self._time_s)
        long = latencies(lambda: one(busy, BUSY_S), time_s=self._time_s)
        rate = many_at_once(lambda count: many(busy, [BUSY_S] * count), time_s=self._time_s)
        beyond = [taken_s - BUSY_S for taken_s in long]
        return dict(zip((one.name for one in MEASURES), (*no_op, *long, *beyond, rate), strict=True))


def contenders(quick: bool) -> Sequence[Contender]:
    """Every pool."""
    return [Latency(pool, quick) for pool in POOLS]


ENTRY = Entry(
    name="cpu_calls",
    title=f"Calls to {WORKERS} worker processes one at a time: no-op, and busy for 1 ms",
    measures=MEASURES,
    comparisons=comparisons(one.name for one in MEASURES),
    contenders=contenders,
)
