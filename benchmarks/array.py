"""Array: 100 MB of numpy float64 to a worker process, and back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import servers
from benchmarks.harness import Comparison, Contender, Entry, Figures, Hosted, Measure, Need
from benchmarks.peers import ray_session
from benchmarks.tasks import edges, same
from benchmarks.timing import median_time

MEASURES = (Measure("to a worker", "s"), Measure("to a worker and back", "s"))
_FLOATS = 12_500_000


class Sender(Hosted):
    """Sends an array with a call."""

    needs: tuple[Need, ...] = (servers.module("numpy"),)

    def __init__(self, quick: bool) -> None:
        super().__init__(quick)
        self._repeats = 1 if quick else 7
        self.call: Callable[[Callable[[Any], Any], Any], Any]

    @abstractmethod
    def start(self) -> None:
        """Start workers and set `call`, which runs a function with the array."""

    def measure(self) -> Figures:
        import numpy

        array = numpy.random.default_rng(1).random(_FLOATS)
        if self.call(edges, array) != edges(array) or not numpy.array_equal(self.call(same, array), array):
            raise RuntimeError(f"{self.name} gives wrong results")
        there = median_time(lambda: self.call(edges, array), repeats=self._repeats)
        back = median_time(lambda: self.call(same, array), repeats=self._repeats)
        return {MEASURES[0].name: there, MEASURES[1].name: back}


class OurArray(Sender):
    """A call through `cloud.cpu`."""

    name = "virgo"
    promises = "argument and result of a call to a worker process on the same machine; at most once"

    def start(self) -> None:
        import virgo

        place = self.running.enter_context(servers.virgo_cloud())
        cloud = self.running.enter_context(virgo.connect(home=place.home, embedded=False))
        self.call = cloud.cpu.clone


class RayArray(Sender):
    """A Ray task; its argument goes through the object store."""

    name = "Ray"
    promises = "shared-memory object store: one copy in, none out (read-only); 2 processors, no dashboard"
    needs = (servers.module("numpy"), servers.module("ray"))

    def start(self) -> None:
        ray = self.running.enter_context(ray_session())
        self.call = lambda function, array: ray.get(ray.remote(function).remote(array))


def contenders(quick: bool) -> Sequence[Contender]:
    """Both sides."""
    return (OurArray(quick), RayArray(quick))


ENTRY = Entry(
    name="array",
    title="100 MB numpy array to a worker process, from Python",
    measures=MEASURES,
    comparisons=(
        Comparison("virgo", "Ray", ("to a worker",)),
        Comparison("virgo", "Ray", ("to a worker and back",), goal=1.0),
    ),
    contenders=contenders,
)
