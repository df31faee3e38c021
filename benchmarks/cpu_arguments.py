"""Arguments and results: 1 KB to 100 MB of bytes to a worker process, and from one."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness import ROUNDS_MIN, Contender, Entry, Figures, Measure
from benchmarks.pools import POOLS, Pooled, comparisons
from benchmarks.servers import WORKERS
from benchmarks.tasks import ends, made
from benchmarks.timing import median_time

# Bytes, and how many calls the median is of.
SIZES = {
    "1 KB": (1_000, 100),
    "10 KB": (10_000, 100),
    "100 KB": (100_000, 50),
    "1 MB": (1_000_000, 20),
    "10 MB": (10_000_000, 7),
    "100 MB": (100_000_000, 3),
}
_REPEATS_QUICK = 1
_BYTES_QUICK = 1_000_000  # at most, to see only that it runs


def names(size: str) -> tuple[str, str]:
    """Of the measures of a size."""
    return f"argument of {size}", f"result of {size}"


class Sender(Pooled):
    """Sends bytes with a call, whose result is their length and end; then has bytes made and sent back."""

    def measure(self) -> Figures:
        figures: Figures = {}
        for size, (count, repeats) in SIZES.items():
            data = made(min(count, _BYTES_QUICK) if self.quick else count)
            times = self._times(data, _REPEATS_QUICK if self.quick else repeats)
            figures |= dict(zip(names(size), times, strict=True))
        return figures

    def _times(self, data: bytes, repeats: int) -> tuple[float, float]:
        one, count = self.calls.one, len(data)
        # Each worker makes its bytes before the clock runs.
        if one(ends, data) != ends(data) or self.calls.many(made, [count] * 2 * WORKERS)[-1] != data:
            raise RuntimeError(f"{self.name} gives wrong results")
        there = median_time(lambda: one(ends, data), repeats=repeats)
        return there, median_time(lambda: one(made, count), repeats=repeats)


def contenders(quick: bool) -> Sequence[Contender]:
    """Every pool."""
    return [Sender(pool, quick) for pool in POOLS]


_ALL = [name for kind in zip(*map(names, SIZES), strict=True) for name in kind]

ENTRY = Entry(
    name="cpu_arguments",
    title="Calls with bytes as argument, or as result, to worker processes",
    measures=tuple(Measure(name, "s") for name in _ALL),
    comparisons=comparisons(_ALL),
    contenders=contenders,
    rounds=ROUNDS_MIN,
)
