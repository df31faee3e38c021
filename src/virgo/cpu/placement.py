"""Which node runs a call: decisions only. No I/O, no clock, no randomness but what is passed in.

A call is bound to a node as late as can be: it waits here until a node has a free place, so that it never
waits there behind a slow one while another node is idle. Among nodes with a place the least loaded of a few
is taken, the best of some random ones among many, since least-loaded herds when figures are a beat old
(source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 2001). Of how many,
depends on how old a beat is beside such calls: of two, or of more if they take longer (`compared`).

Figures of another node are its last, corrected by what this node knows: calls that it has there now, and what
of the figures was not its own. However busy a node is with the calls of others, each asking node may have one
call waiting there, so that nobody starves.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from virgo.cpu.needs import Needs
from virgo.limits import MEMBER_BEAT_S
from virgo.members import Load, Member

# Up to this many nodes all are compared.
_COMPARE_ALL_MAX: Final = 8
# How much busier than the best the local node may be and still be taken: a hop costs more than that.
_LOCAL_BONUS: Final = 0.25
# The same for the node that has the data of the call: moving them costs more, but not to wait for a worker.
_NEAR_BONUS: Final = 0.9


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that may be chosen.

    Attributes:
        number: the node's number.
        load: its last figures.
        calls: calls running or waiting there, as far as is known.
        workers: calls it can run at once.
        local: whether it is this node.
    """

    number: int
    load: Load
    calls: int = 0
    workers: int = 1
    local: bool = False

    @property
    def score(self) -> float:
        """How busy it is: calls per worker, and the pressure on its machine. Lower is better."""
        queue = min(self.load.run_queue / max(self.load.cpus, 1), 4.0)
        pressure = self.load.cpu_pressure_percent + 2 * self.load.memory_pressure_percent
        return self.calls / self.workers + 0.5 * queue + pressure / 100


def compared(duration_s: float | None) -> int:
    """How many random nodes to compare for a call that will probably take so long; None if nothing is known.

    Figures are up to a beat old. What a call is worth by then was found by simulation, see docs/placement.md.
    """
    if duration_s is None or duration_s < MEMBER_BEAT_S:
        return 2
    return 4 if duration_s < 10 * MEMBER_BEAT_S else 8


def choose(candidates: Sequence[Candidate], *, chance: random.Random, near: int = 0, compare: int = 2) -> int:
    """The number of the node to run a call, of those that have a place.

    The node near its data, or else the local one, is taken unless it is clearly busier than the best;
    otherwise the least loaded, of so many random ones if there are many, and among equals a random one.
    """
    assert candidates
    if near:
        preferred, bonus = near, _NEAR_BONUS
    else:
        preferred, bonus = next((one.number for one in candidates if one.local), -1), _LOCAL_BONUS
    if len(candidates) > _COMPARE_ALL_MAX:
        few = chance.sample(candidates, compare)
        few += [one for one in candidates if one.number == preferred and one not in few]
    else:
        few = list(candidates)
    scores = [round(one.score, 3) for one in few]
    best = min(scores)
    for one, score in zip(few, scores, strict=True):
        if one.number == preferred and score <= best + bonus:
            return one.number
    return chance.choice([one.number for one, score in zip(few, scores, strict=True) if score == best])


def fits(needs: Needs, load: Load, workers: int) -> bool:
    """Whether a node can ever run a call that needs this."""
    return (
        needs.cpus <= workers and needs.gpus <= load.gpus and needs.memory <= load.calls_memory_bytes
    )  # fmt: skip


def fits_now(needs: Needs, load: Load) -> bool:
    """Whether it has what the call needs beside a place, as far as is known."""
    return needs.gpus <= load.gpus_free and needs.memory <= load.calls_memory_free_bytes


def workers_of(member: Member, members: Sequence[Member]) -> int:
    """Calls that a node runs at once: what it says, else its share of its machine's processors."""
    if member.load.workers:
        return member.load.workers
    sharing = sum(1 for other in members if other.machine and other.machine == member.machine)
    return max(1, round(member.load.cpus / max(1, sharing)))


class Seats:
    """The places of another node, as this one sees them.

    Attributes:
        ours: calls that this node has there now.
        moved: clients that were sent there since the last figures.
    """

    __slots__ = ("_foreign", "_load", "moved", "ours")

    def __init__(self) -> None:
        self.ours = self.moved = 0
        self._foreign = 0
        self._load: Load | None = None

    def seen(self, load: Load) -> None:
        """Take note of figures; only new ones count."""
        if load is not self._load:
            self._load = load
            self.moved = 0
            self._foreign = max(0, load.outstanding - self.ours)

    @property
    def calls(self) -> int:
        """Calls there, of all nodes."""
        return self._foreign + self.moved + self.ours

    def room(self, workers: int) -> int:
        """Calls that this node may send there now."""
        return max(1, workers - self._foreign) - self.moved - self.ours
