"""Hybrid logical time: wall clock when clocks behave, logical order when they do not.

A timestamp is one 64-bit integer: 48 bits of milliseconds since 1970 and 16 bits of counter, so that
integers compare as the events they stamp. `Clock.now` is later than every timestamp this clock has
given or seen; a remote timestamp too far ahead is refused rather than adopted.

Source: Kulkarni, Demirbas, Madappa, Avva, Leone, "Logical Physical Clocks" (OPODIS 2014), figure 5.
It orders what is causally related; that two timestamps compare does not make them related.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from virgo.errors import BadArgument
from virgo.limits import CLOCK_SKEW_MS_MAX

COUNTER_BITS = 16


def wall_ms() -> int:
    """Milliseconds since 1970 by this machine's clock."""
    return time.time_ns() // 1_000_000


class Clock:
    """One hybrid logical clock; safe for use from several threads."""

    def __init__(self, wall: Callable[[], int] = wall_ms) -> None:
        self._wall = wall
        self._last = 0
        self._mutex = threading.Lock()

    def __repr__(self) -> str:
        return f"<Clock {format_time(self._last)}>"

    def now(self) -> int:
        """A timestamp later than all that this clock has given or observed."""
        with self._mutex:
            self._last = max(self._last + 1, self._wall() << COUNTER_BITS)
            return self._last

    def observe(self, remote: int) -> int:
        """Take note of a timestamp that arrived with a message; returns one later than both.

        Raises:
            BadArgument: the timestamp is ahead of this clock by more than CLOCK_SKEW_MS_MAX.
        """
        with self._mutex:
            wall = self._wall()
            if (remote >> COUNTER_BITS) - wall > CLOCK_SKEW_MS_MAX:
                raise BadArgument(
                    f"hybrid time {format_time(remote)} is over {CLOCK_SKEW_MS_MAX} ms ahead",
                    hint="Set the clocks of the machines, with NTP for example.",
                )
            self._last = max(self._last + 1, remote + 1, wall << COUNTER_BITS)
            return self._last


def format_time(timestamp: int) -> str:
    """A timestamp as `milliseconds:counter`."""
    return f"{timestamp >> COUNTER_BITS}:{timestamp & ((1 << COUNTER_BITS) - 1)}"
