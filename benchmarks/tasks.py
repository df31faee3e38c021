"""What the workers of every contender run."""

from __future__ import annotations

from typing import Any


def same(value: Any) -> Any:
    """The argument: a no-op that shows that it ran."""
    return value


def edges(array: Any) -> float:
    """The sum of the first and the last number: reads the array without copying it."""
    return float(array[0] + array[-1])
