"""How long calls take, by what they are called: learnt as they end, and used as a hint."""

from __future__ import annotations

from collections import OrderedDict

from virgo.limits import DURATIONS_MAX

_WEIGHT = 0.3  # of the last call


class Durations:
    """A moving average for each label; the least recently used are forgotten."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[str, float] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Durations of {len(self._seconds)}>"

    def learn(self, label: str, seconds: float) -> None:
        """A call has taken so long."""
        known = self._seconds.pop(label, seconds)
        self._seconds[label] = known + _WEIGHT * (seconds - known)
        if len(self._seconds) > DURATIONS_MAX:
            self._seconds.popitem(last=False)

    def expect(self, label: str) -> float | None:
        """Seconds that one will probably take, None if there was none yet."""
        return self._seconds.get(label)

    def longest(self, count: int) -> dict[str, float]:
        """Those that take longest."""
        return dict(sorted(self._seconds.items(), key=lambda each: -each[1])[:count])
