"""A line of those who wait: the greatest priority first, and among equals who came first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Line(Generic[T]):
    """Who waits, by a number that each has for himself. All but iterating takes the same time always."""

    def __init__(self) -> None:
        self._ranks: dict[int, dict[int, T]] = {}  # by priority, the greatest first
        self._priorities: dict[int, int] = {}  # by number

    def __repr__(self) -> str:
        return f"<Line of {len(self)}>"

    def __len__(self) -> int:
        return len(self._priorities)

    def __iter__(self) -> Iterator[int]:
        for rank in self._ranks.values():
            yield from rank

    def __getitem__(self, number: int) -> T:
        return self._ranks[self._priorities[number]][number]

    def add(self, number: int, who: T, *, priority: int = 0) -> None:
        """Let somebody wait."""
        if priority not in self._ranks:
            self._ranks = dict(sorted([*self._ranks.items(), (priority, {})], reverse=True))
        self._ranks[priority][number] = who
        self._priorities[number] = priority

    def drop(self, number: int) -> None:
        """Somebody waits no more, if he did."""
        priority = self._priorities.pop(number, None)
        if priority is not None:
            rank = self._ranks[priority]
            del rank[number]
            if not rank:
                del self._ranks[priority]
