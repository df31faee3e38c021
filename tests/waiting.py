"""Waiting, with a bound, for what another process or thread is about to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")


def until(condition: Callable[[], Found], *, within_s: float = 20.0, what: str = "the condition") -> Found:
    """What the condition gives as soon as that is true. Raises AssertionError if it is not in time."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {within_s} s"
        time.sleep(0.005)
    return found


def alive(pid: int) -> bool:
    """Whether the process runs (and not only waits to be reaped)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
