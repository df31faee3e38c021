"""The membership view: beats, leases, suspicion, and the engine's silence."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from virgo.limits import MEMBER_LEASE_S, NODE_LOST_S
from virgo.members import Member
from virgo.node.view import View

ONE, TWO, THREE = (Member(name=f"n{i}", number=i, id=str(i), started_ms=1) for i in (1, 2, 3))


def view(now: float = 0.0) -> View:
    made = View(ONE, now=now)
    made.beat(TWO, now=now)
    made.beat(THREE, now=now)
    return made


def names(members: list[Member]) -> list[str]:
    return [member.name for member in members]


def test_a_member_is_up_from_its_first_beat() -> None:
    """A registered member is known but not up; its beat is news once."""
    made = View(ONE, now=0)
    made.register(TWO)
    assert (names(made.up()), names(made.known())) == (["n1"], ["n1", "n2"])
    assert made.beat(TWO, now=1)
    assert not made.beat(TWO, now=2)
    assert names(made.up()) == ["n1", "n2"]


def test_a_missed_lease_is_a_loss_in_bounded_time() -> None:
    """Without beats a member is lost within the promised time, and said once."""
    made = view()
    for tenth in range(1, int(NODE_LOST_S * 10) + 1):
        now = tenth / 10
        made.beat(ONE, now=now)
        made.beat(TWO, now=now)
        lost = made.expire(now=now)
        if lost:
            assert names(lost) == ["n3"]
            assert MEMBER_LEASE_S < now < NODE_LOST_S
            break
    else:
        raise AssertionError("n3 was never lost")
    assert made.expire(now=now + 0.1) == []
    assert made.get(3) == msgspec.structs.replace(THREE, state="lost")


def test_a_silent_engine_loses_nobody() -> None:
    """If the observer does not hear itself either, no lease runs out; on return all get a new one."""
    made = view()
    assert made.expire(now=100.0) == []
    assert made.silent(now=100.0)
    made.beat(ONE, now=100.5)
    made.resume(now=100.5)
    assert made.expire(now=101.0) == []
    assert names(made.up()) == ["n1", "n2", "n3"]


def test_a_suspect_is_lost_until_it_beats() -> None:
    """A peer that did not answer is not chosen again before it says that it lives."""
    made = view()
    assert made.suspect(2)
    assert not made.suspect(2)
    assert names(made.up()) == ["n1", "n3"]
    assert made.beat(TWO, now=1)
    assert names(made.up()) == ["n1", "n2", "n3"]


def test_nobody_loses_itself() -> None:
    """The observer is always up for itself."""
    made = view()
    assert not made.suspect(1)
    assert made.is_up(1)


def test_a_farewell_ends_membership_at_once() -> None:
    """A member that says it leaves is no longer up."""
    made = view()
    made.beat(msgspec.structs.replace(TWO, state="leaving"), now=0.5)
    assert names(made.up()) == ["n1", "n3"]


def test_a_late_beat_of_an_earlier_life_is_ignored() -> None:
    """After a restart the old life's delayed beats and farewell change nothing."""
    made = view()
    made.beat(msgspec.structs.replace(TWO, started_ms=2, pid=22), now=1)
    made.beat(msgspec.structs.replace(TWO, state="leaving"), now=1.1)
    member = made.get(2)
    assert member is not None
    assert (member.pid, made.is_up(2)) == (22, True)


@given(
    st.lists(
        st.tuples(st.sampled_from(["beat1", "beat2", "expire", "suspect2"]), st.floats(0, 2)), max_size=40
    )
)
def test_a_member_that_beats_within_its_lease_is_never_lost(events: list[tuple[str, float]]) -> None:
    """Whatever else happens, a beat younger than the lease means up, unless suspected since."""
    made, now, beat2, suspected = View(ONE, now=0), 0.0, -1e9, False
    for kind, step in events:
        now += step
        if kind == "beat1":
            made.beat(ONE, now=now)
        elif kind == "beat2":
            made.beat(TWO, now=now)
            beat2, suspected = now, False
        elif kind == "suspect2":
            made.suspect(2)
            suspected = True
        else:
            made.expire(now=now)
        if now - beat2 <= MEMBER_LEASE_S and not suspected:
            assert made.is_up(2)
