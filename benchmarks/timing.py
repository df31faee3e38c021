"""How time is taken: one call at a time, and many at once. Times in seconds, rates per second."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_SAMPLES_MAX = 200_000  # bounds the memory of the samples


@dataclass(frozen=True, slots=True)
class Sequential:
    """Calls made one at a time: quantiles of their latencies, and how many in a second."""

    p50_s: float
    p99_s: float
    rate: float


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection while it lasts."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quantile(ordered: list[int], share: float) -> int:
    """The nearest-rank quantile of sorted samples."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def one_at_a_time(call: Callable[[], object], *, time_s: float) -> Sequential:
    """Make calls one at a time for about `time_s`: half to time each, half to count them.

    The rate comes from a loop that reads no clock between calls, since a clock read (about 50 ns) is not
    small beside a read of mapped memory. A tenth of the time goes before as warm-up.
    """
    calls_until(call, time_s / 10)
    with undisturbed():
        ordered = samples_ns(call, time_s / 2)
        count, taken_s = calls_until(call, time_s / 2)
    return Sequential(quantile(ordered, 0.5) / 1e9, quantile(ordered, 0.99) / 1e9, count / taken_s)


def latencies(call: Callable[[], object], *, time_s: float) -> tuple[float, float]:
    """p50 and p99 of calls made one at a time for about `time_s`, after a tenth of it that is not counted."""
    calls_until(call, time_s / 10)
    with undisturbed():
        ordered = samples_ns(call, time_s)
    return quantile(ordered, 0.5) / 1e9, quantile(ordered, 0.99) / 1e9


def samples_ns(call: Callable[[], object], time_s: float) -> list[int]:
    """How long each call takes, in order of length, for about `time_s` or for as many as are kept."""
    samples: list[int] = []
    clock = time.perf_counter_ns
    end = clock() + int(time_s * 1e9)
    after = 0
    while after < end and len(samples) < _SAMPLES_MAX:
        before = clock()
        call()
        after = clock()
        samples.append(after - before)
    samples.sort()
    return samples


def calls_until(call: Callable[[], object], time_s: float) -> tuple[int, float]:
    """Call in growing batches until the time is over; how many calls, and in how many seconds."""
    count, batch = 0, 1
    start = time.perf_counter()
    while True:
        for _ in range(batch):
            call()
        count += batch
        taken_s = time.perf_counter() - start
        if taken_s >= time_s:
            return count, taken_s
        batch = max(1, min(batch * 2, int(count * (time_s - taken_s) / max(taken_s, 1e-9))))


def many_at_once(batch: Callable[[int], object], *, time_s: float, count_max: int = 200_000) -> float:
    """The rate of the first of ever larger batches that takes `time_s`, or of the largest allowed."""
    count = 100
    while True:
        with undisturbed():
            start = time.perf_counter()
            batch(count)
            taken_s = time.perf_counter() - start
        if taken_s >= time_s or count >= count_max:
            return count / taken_s
        count = min(count_max, max(2 * count, int(1.2 * count * time_s / max(taken_s, 1e-6))))


def median_time(call: Callable[[], object], *, repeats: int) -> float:
    """The median time of a few long calls, after one that is not counted."""
    call()
    taken: list[float] = []
    with undisturbed():
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]
