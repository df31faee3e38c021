"""Who is in the cloud, as one node sees it: a pure state machine without clock or network.

Every member says once a second that it lives (a beat). A beat renews the lease that each observer grants
on its own monotonic clock; when it runs out the member is lost. If the observer does not even hear its
own beats, it is the engine that is silent, not the others: then nobody's lease runs out.

A peer that did not answer is suspected: it is lost at once, until its next beat.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

from virgo.limits import MEMBER_LEASE_S
from virgo.members import Member


@dataclass(slots=True)
class _Seen:
    member: Member
    beat: float  # local monotonic time of the last beat
    up: bool


class View:
    """The members known to `own`, the observing node."""

    def __init__(self, own: Member, *, now: float) -> None:
        self.own = own
        self._seen: dict[int, _Seen] = {own.number: _Seen(own, now, up=True)}
        self._up: list[Member] | None = None  # kept until something changes: placement asks for each call

    def __repr__(self) -> str:
        up = sum(1 for seen in self._seen.values() if seen.up)
        return f"<View of {self.own.name}: {up} up, {len(self._seen) - up} lost>"

    def register(self, member: Member) -> None:
        """Learn of a member from its registration; until it beats it is lost."""
        if member.number not in self._seen:
            lost = msgspec.structs.replace(member, state="lost")
            self._seen[member.number] = _Seen(lost, float("-inf"), up=False)
            self._up = None

    def beat(self, member: Member, *, now: float) -> bool:
        """Take note of a beat; True if the member was not up before."""
        known = self._seen.get(member.number)
        if known is not None and known.up and known.member.started_ms > member.started_ms:
            return False  # a late beat of an earlier life
        news = known is None or not known.up
        up = member.state == "up"
        self._seen[member.number] = _Seen(member, now, up=up or member.number == self.own.number)
        self._up = None
        if member.number == self.own.number:
            self.own = member
        return news and up

    def suspect(self, number: int) -> bool:
        """A member did not answer: it is lost until it beats again. True if it was up."""
        seen = self._seen.get(number)
        if seen is None or not seen.up or number == self.own.number:
            return False
        self._up = None
        seen.up = False
        seen.member = msgspec.structs.replace(seen.member, state="lost")
        return True

    def expire(self, *, now: float) -> list[Member]:
        """Members whose lease has run out since the last call."""
        if now - self._seen[self.own.number].beat > MEMBER_LEASE_S / 2:
            return []
        late = [
            seen.member
            for number, seen in self._seen.items()
            if seen.up and number != self.own.number and now - seen.beat > MEMBER_LEASE_S
        ]
        return [member for member in late if self.suspect(member.number)]

    def resume(self, *, now: float) -> None:
        """After the engine's silence: give everyone who was up a new lease."""
        for seen in self._seen.values():
            if seen.up:
                seen.beat = now

    def silent(self, *, now: float) -> bool:
        """Whether the observer has not heard its own beats for a while."""
        return now - self._seen[self.own.number].beat > MEMBER_LEASE_S / 2

    def up(self) -> list[Member]:
        """Members that are up, by name."""
        if self._up is None:
            self._up = [member for member in self.known() if self._seen[member.number].up]
        return self._up

    def known(self) -> list[Member]:
        """All members that were ever registered, by name: n2 before n10."""
        return sorted((seen.member for seen in self._seen.values()), key=_by_name)

    def get(self, number: int) -> Member | None:
        """The member of that number, up or lost."""
        seen = self._seen.get(number)
        return None if seen is None else seen.member

    def is_up(self, number: int) -> bool:
        """Whether that member is up."""
        seen = self._seen.get(number)
        return seen is not None and seen.up


def _by_name(member: Member) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", member.name)]
