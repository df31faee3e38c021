"""The first call: from nothing of the pool in a program to the program's first result.

Each is timed in a process begun afresh, which has imported what it needs and made nothing. "running" means
that what can run before the program does: our node, Ray's session, Dask's scheduler and workers, each used by
another program before. "cold" means that the program starts this too, as `virgo up`, `ray.init` and
LocalCluster do. A ProcessPoolExecutor and a loky executor cannot run before their program, so it makes them
in both.
"""

from __future__ import annotations

import importlib
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection

from benchmarks.harness import ROUNDS_MIN, Contender, Entry, Figures, Measure
from benchmarks.pools import POOLS, Opener, Pool, Pooled, comparisons
from benchmarks.servers import WORKERS
from benchmarks.tasks import same

RUNNING, COLD = "first result, running", "first result, cold"
_ANSWER_S = 120.0


def first_s(opener: Opener, libraries: Sequence[str]) -> float:
    """Seconds to the first result, in a process begun afresh."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_first, args=(theirs, opener, libraries))
    process.start()
    theirs.close()
    try:
        if not ours.poll(_ANSWER_S):
            raise RuntimeError(f"a program has no first result within {_ANSWER_S:g} s")
        return float(ours.recv())  # EOFError if it has died; what it said is in the output
    finally:
        ours.close()
        process.join(_ANSWER_S)


def _first(pipe: Connection, opener: Opener, libraries: Sequence[str]) -> None:
    for library in libraries:
        importlib.import_module(library)
    with ExitStack() as running:
        start = time.perf_counter()
        result = opener(running).one(same, 7)
        taken_s = time.perf_counter() - start
        if result != 7:
            raise RuntimeError("the first result is wrong")
        pipe.send(taken_s)


class Program(Pooled):
    """A program that makes its first call."""

    def __init__(self, pool: Pool, quick: bool) -> None:
        super().__init__(pool, quick)
        self._times = 1 if quick else 3
        before = "its server runs before" if pool.shared else "nothing runs before: it is made in both"
        self.promises = f"{pool.promises}; {before}"

    def start(self) -> None:
        """Nothing: what runs before is started after the cold ones."""

    def measure(self) -> Figures:
        cold_s = first_s(self.pool.make, self.pool.libraries)
        opener = self.pool.serve(self.running)
        first_s(opener, self.pool.libraries)  # another program before: it is not counted
        running_s = [first_s(opener, self.pool.libraries) for _ in range(self._times)]
        return {RUNNING: statistics.median(running_s), COLD: cold_s}


def contenders(quick: bool) -> Sequence[Contender]:
    """Every pool."""
    return [Program(pool, quick) for pool in POOLS]


ENTRY = Entry(
    name="cpu_first",
    title=f"A program's first call to {WORKERS} worker processes",
    measures=(Measure(RUNNING, "s"), Measure(COLD, "s")),
    comparisons=comparisons((RUNNING, COLD)),
    contenders=contenders,
    rounds=ROUNDS_MIN,
)
