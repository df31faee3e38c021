"""What the workers of every contender run."""

from __future__ import annotations

import os
import random
import time
from functools import lru_cache
from typing import Any


def same(value: Any) -> Any:
    """The argument: a no-op that shows that it ran."""
    return value


def edges(array: Any) -> float:
    """The sum of the first and the last number: reads the array without copying it."""
    return float(array[0] + array[-1])


def busy(time_s: float) -> int:
    """Keep a processor busy for so long, by the clock; how often the clock was read."""
    end, reads = time.perf_counter() + time_s, 1
    while time.perf_counter() < end:
        reads += 1
    return reads


def ends(data: bytes) -> tuple[int, bytes]:
    """The length, and the last bytes: a small result of a large argument."""
    return len(data), data[-8:]


def made(count: int) -> bytes:
    """So many bytes, the same in every process; they are made once, so that a second call only sends them."""
    return _made(count)


@lru_cache(1)  # of a function apart, since Ray takes nothing but plain functions
def _made(count: int) -> bytes:
    return random.Random(1).randbytes(count)


def process_id(time_s: float) -> int:
    """Which process runs this; waits first, so that another worker takes the next call."""
    time.sleep(time_s)
    return os.getpid()
