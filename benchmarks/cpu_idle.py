"""Memory of idle workers: each has run no-op calls and waits for the next.

A worker is a process that ran a call, by its own word. Uss are the pages that it alone has, which its end
would free; Pss counts those that several processes map too, by their share: a worker forked from its program
has the less of it the more workers there are. All processes together are those of the pool and the program
that uses it, with schedulers, supervisors, and the engine of our cloud.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.harness import ROUNDS_MIN, Contender, Entry, Figures, Measure
from benchmarks.held import held_bytes, private_bytes, with_descendants
from benchmarks.pools import POOLS, Pool, Pooled, comparisons
from benchmarks.servers import WORKERS
from benchmarks.tasks import process_id, same

PRIVATE, SHARE = "idle worker, Uss", "idle worker, Pss"
ALL = f"all processes for {WORKERS} workers, Pss"
_ATTEMPTS = 50
_LINGER_S = 0.05  # of a call, while another worker takes the next


class Idle(Pooled):
    """Lets each worker run calls, waits, and counts."""

    def __init__(self, pool: Pool, quick: bool) -> None:
        super().__init__(pool, quick)
        self._rest_s = 0.1 if quick else 1.0

    def measure(self) -> Figures:
        workers = worker_pids(self.calls.many, WORKERS)
        self.calls.many(same, range(10))
        time.sleep(self._rest_s)
        everybody = set(with_descendants(os.getpid()))
        if self.calls.root:
            everybody |= set(with_descendants(self.calls.root))
        if not workers < everybody:
            raise RuntimeError(f"{self.name}: workers {workers - everybody} descend from nobody known")
        return {
            PRIVATE: statistics.mean(map(private_bytes, workers)),
            SHARE: held_bytes(workers) / len(workers),
            ALL: held_bytes(everybody),
        }


def worker_pids(many: Callable[[Any, Iterable[Any]], list[Any]], count: int) -> set[int]:
    """The processes of so many workers; RuntimeError if there are more, or fewer."""
    found: set[int] = set()
    for _ in range(_ATTEMPTS):
        found |= set(many(process_id, [_LINGER_S] * 2 * count))
        if len(found) >= count:
            break
    if len(found) != count:
        raise RuntimeError(f"{len(found)} workers ran calls instead of {count}")
    return found


def contenders(quick: bool) -> Sequence[Contender]:
    """Every pool."""
    return [Idle(pool, quick) for pool in POOLS]


ENTRY = Entry(
    name="cpu_idle",
    title="Memory of idle worker processes that have run no-op calls",
    measures=(Measure(PRIVATE, "B"), Measure(SHARE, "B"), Measure(ALL, "B")),
    comparisons=comparisons((PRIVATE, SHARE, ALL)),
    contenders=contenders,
    rounds=ROUNDS_MIN,
)
