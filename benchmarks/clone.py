"""Clone: no-op calls to worker processes, one at a time and many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Comparison, Contender, Entry, Figures, Measure
from benchmarks.pools import DASK, LOKY, OURS, PROCESS_POOL, RAY, Pool, Pooled
from benchmarks.servers import WORKERS
from benchmarks.tasks import same
from benchmarks.timing import many_at_once, one_at_a_time

MEASURES = (
    Measure("one at a time, p50", "s"),
    Measure("one at a time, p99", "s"),
    Measure("pipelined", "1/s"),
)


class Caller(Pooled):
    """Calls a function that returns its argument, in another process."""

    function: Any = staticmethod(same)

    def __init__(self, pool: Pool, quick: bool) -> None:
        super().__init__(pool, quick)
        self._time_s = 0.3 if quick else 5.0

    def measure(self) -> Figures:
        one, many, function = self.calls.one, self.calls.many, self.function
        if one(function, 7) != 7 or many(function, range(50)) != list(range(50)):
            raise RuntimeError(f"{self.name} gives wrong results")
        latency = one_at_a_time(lambda: one(function, 7), time_s=self._time_s)
        rate = many_at_once(lambda count: many(function, range(count)), time_s=self._time_s / 2)
        return dict(zip((one.name for one in MEASURES), (latency.p50_s, latency.p99_s, rate), strict=True))


class OurClone(Caller):
    """`cloud.cpu` of a node."""

    def __init__(self, quick: bool, *, by_name: bool) -> None:
        super().__init__(OURS, quick)
        if by_name:
            self.function = "echo"
        how = "exported function by name" if by_name else "any callable, pickled"
        self.name = f"virgo by {'name' if by_name else 'callable'}"
        self.promises = (
            f"{how}; process per slot ({WORKERS} workers), placed by measured load; at most once, "
            "every loss named; cancel kills"
        )


def contenders(quick: bool) -> Sequence[Contender]:
    """Ours in two forms, and the peers."""
    process_pool, loky, ray, dask = (Caller(pool, quick) for pool in (PROCESS_POOL, LOKY, RAY, DASK))
    by_name, by_callable = (OurClone(quick, by_name=by_name) for by_name in (True, False))
    return (by_name, process_pool, loky, by_callable, ray, dask)


_GOALS = (
    ("ProcessPoolExecutor", 3.0, 15.0),
    ("loky", None, None),
    ("Ray", 20.0, 70.0),
    ("Dask", 50.0, 200.0),
)

ENTRY = Entry(
    name="clone",
    title="No-op calls to worker processes, from Python",
    measures=MEASURES,
    comparisons=tuple(
        Comparison(ours, peer, (measure,), goal)
        for ours in ("virgo by name", "virgo by callable")
        for peer, sequential, pipelined in _GOALS
        for measure, goal in (
            ("one at a time, p50", sequential),
            ("one at a time, p99", None),
            ("pipelined", pipelined),
        )
    ),
    contenders=contenders,
)
