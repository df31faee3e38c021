"""Clone: no-op calls to worker processes, one at a time and many at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import servers
from benchmarks.harness import Comparison, Contender, Entry, Figures, Hosted, Measure
from benchmarks.peers import dask_client, ray_session
from benchmarks.servers import WORKERS
from benchmarks.tasks import same
from benchmarks.timing import many_at_once, one_at_a_time

MEASURES = (
    Measure("one at a time, p50", "s"),
    Measure("one at a time, p99", "s"),
    Measure("pipelined", "1/s"),
)


class Caller(Hosted):
    """Calls a function that returns its argument, in another process."""

    def __init__(self, quick: bool) -> None:
        super().__init__(quick)
        self._time_s = 0.3 if quick else 5.0
        self.one: Callable[[int], Any]
        self.many: Callable[[int], list[Any]]

    @abstractmethod
    def start(self) -> None:
        """Start workers; set `one`, which makes a call, and `many`, which makes so many at once."""

    def measure(self) -> Figures:
        if self.one(7) != 7 or self.many(50) != list(range(50)):
            raise RuntimeError(f"{self.name} gives wrong results")
        latency = one_at_a_time(lambda: self.one(7), time_s=self._time_s)
        rate = many_at_once(self.many, time_s=self._time_s / 2)
        return dict(zip((one.name for one in MEASURES), (latency.p50_s, latency.p99_s, rate), strict=True))


class OurClone(Caller):
    """`cloud.cpu` of a node."""

    needs = ()

    def __init__(self, quick: bool, *, by_name: bool) -> None:
        super().__init__(quick)
        self._by_name = by_name
        how = "exported function by name" if by_name else "any callable, pickled"
        self.name = f"virgo by {'name' if by_name else 'callable'}"
        self.promises = (
            f"{how}; process per slot ({WORKERS} workers), placed by measured load; at most once, "
            "every loss named; cancel kills"
        )

    def start(self) -> None:
        import virgo

        place = self.running.enter_context(servers.virgo_cloud())
        cloud = self.running.enter_context(virgo.connect(home=place.home, embedded=False))
        function: Any = "echo" if self._by_name else same
        self.one = lambda value: cloud.cpu.clone(function, value)
        self.many = lambda count: list(cloud.cpu.map(function, range(count)))


class ProcessPool(Caller):
    """The standard library's pool."""

    name = "ProcessPoolExecutor"
    promises = f"function by reference; {WORKERS} worker processes of this program; one death breaks the pool"

    def start(self) -> None:
        from concurrent.futures import ProcessPoolExecutor

        pool = self.running.enter_context(ProcessPoolExecutor(WORKERS))
        self.one = lambda value: pool.submit(same, value).result()
        self.many = lambda count: [one.result() for one in [pool.submit(same, i) for i in range(count)]]


class RayTasks(Caller):
    """Ray tasks."""

    name = "Ray"
    promises = f"any callable; num_cpus={WORKERS}, no dashboard; system failures retried (at least once)"
    needs = (servers.module("ray"),)

    def start(self) -> None:
        ray = self.running.enter_context(ray_session())
        remote = ray.remote(same)
        self.one = lambda value: ray.get(remote.remote(value))
        self.many = lambda count: ray.get([remote.remote(i) for i in range(count)])


class DaskTasks(Caller):
    """Dask distributed futures."""

    name = "Dask"
    promises = f"any callable; {WORKERS} worker processes of one thread, no dashboard; recomputed on loss"
    needs = (servers.module("distributed"),)

    def start(self) -> None:
        client = self.running.enter_context(dask_client())
        self.one = lambda value: client.submit(same, value, pure=False).result()
        self.many = lambda count: client.gather(client.map(same, range(count), pure=False))


def contenders(quick: bool) -> Sequence[Contender]:
    """Ours in two forms, and the peers."""
    ours = [OurClone(quick, by_name=by_name) for by_name in (True, False)]
    return (ours[0], ProcessPool(quick), ours[1], RayTasks(quick), DaskTasks(quick))


_GOALS = (("ProcessPoolExecutor", 3.0, 15.0), ("Ray", 20.0, 70.0), ("Dask", 50.0, 200.0))

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
