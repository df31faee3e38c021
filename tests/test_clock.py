"""Hybrid logical time: rises whatever the wall clock does, and refuses clocks that are far ahead."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from virgo.clock import COUNTER_BITS, Clock, format_time
from virgo.errors import BadArgument
from virgo.limits import CLOCK_SKEW_MS_MAX

CHECK = settings(deadline=None, max_examples=100, phases=set(Phase) - {Phase.explain})
START = 1_700_000_000_000


class Wall:
    """A wall clock that is set by hand."""

    def __init__(self) -> None:
        self.ms = START

    def __call__(self) -> int:
        return self.ms


@CHECK
@given(
    st.lists(
        st.tuples(st.integers(-100_000, 100_000), st.booleans(), st.integers(-70_000, 60_000)), max_size=40
    )
)
def test_time_rises_whatever_happens(steps: list[tuple[int, bool, int]]) -> None:
    """Steps of the wall clock, back too, and messages from other clocks never make a timestamp repeat;
    each is later than the message that it answers."""
    wall = Wall()
    clock = Clock(wall)
    last = clock.now()
    for step, message, ahead in steps:
        wall.ms = max(0, wall.ms + step)
        if message:
            remote = max(0, wall.ms + ahead) << COUNTER_BITS | 7
            stamp = clock.observe(remote)
            assert stamp > remote
        else:
            stamp = clock.now()
        assert stamp > last
        last = stamp


def test_time_follows_the_wall_clock() -> None:
    """While clocks behave the upper bits are the wall clock's milliseconds, and the counter is small."""
    wall = Wall()
    clock = Clock(wall)
    assert clock.now() == START << COUNTER_BITS
    assert clock.now() == (START << COUNTER_BITS) + 1
    wall.ms += 5
    assert clock.now() == (START + 5) << COUNTER_BITS
    assert abs((Clock().now() >> COUNTER_BITS) - time.time() * 1000) < 2000


def test_a_clock_far_ahead_is_refused_and_forgotten() -> None:
    """A timestamp beyond the permitted skew is BadArgument with the remedy, and changes nothing."""
    clock = Clock(Wall())
    before = clock.now()
    limit = START + CLOCK_SKEW_MS_MAX
    for remote in ((limit + 1) << COUNTER_BITS, 2**63 - 1, 2**64 - 1, 2**80):
        with pytest.raises(BadArgument, match="NTP"):
            clock.observe(remote)
    assert clock.now() == before + 1
    assert clock.observe(limit << COUNTER_BITS) == (limit << COUNTER_BITS) + 1


def test_causes_order_events_over_machines_whose_clocks_differ() -> None:
    """A message from a machine that is ahead, answered by one that is behind: the answer is later."""
    ahead, behind = Wall(), Wall()
    behind.ms -= 30_000
    first, second = Clock(ahead), Clock(behind)
    sent = first.now()
    answered = second.observe(sent)
    back = first.observe(answered)
    assert sent < answered < back


def test_threads_never_get_the_same_time() -> None:
    """Timestamps given to several threads at once are all different."""
    clock = Clock()
    given_out: list[list[int]] = [[] for _ in range(4)]

    def draw(mine: list[int]) -> None:
        mine.extend(clock.now() for _ in range(2000))

    threads = [threading.Thread(target=draw, args=(mine,)) for mine in given_out]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({stamp for mine in given_out for stamp in mine}) == 8000


def test_times_are_shown_as_milliseconds_and_counter() -> None:
    """People see milliseconds and the counter."""
    assert format_time(START << COUNTER_BITS | 5) == f"{START}:5"
    assert repr(Clock(Wall())) == "<Clock 0:0>"
