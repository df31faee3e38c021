"""How long calls take, by what they are called: learnt as they end, and used as a hint."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

from virgo.limits import DURATIONS_MAX

_WEIGHT = 0.3  # of the last call

Key = TypeVar("Key", str, bytes)


class Durations(Generic[Key]):
    """A moving average for each label, or digest of a function; the least recently used are forgotten."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[Key, float] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Durations of {len(self._seconds)}>"

    def learn(self, key: Key, seconds: float) -> None:
        """A call has taken so long."""
        known = self._seconds.pop(key, seconds)
        self._seconds[key] = known + _WEIGHT * (seconds - known)
        if len(self._seconds) > DURATIONS_MAX:
            self._seconds.popitem(last=False)

    def expect(self, key: Key) -> float | None:
        """Seconds that one will probably take, None if there was none yet."""
        return self._seconds.get(key)

    def longest(self, count: int) -> dict[Key, float]:
        """Those that take longest."""
        return dict(sorted(self._seconds.items(), key=lambda each: -each[1])[:count])
