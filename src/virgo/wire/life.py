"""Whether a node that is silent lives: when to ask, what to make of the answer, what to tell the caller.

Shared by both clients; no waiting is done here. A client that has an unanswered request and has heard
nothing for LIFE_QUIET_S sends a PING on a second connection. As a rule it is answered, and the request may
take as long as it likes. If it is not answered within LIFE_ANSWER_S, the node is lost.

On a Unix socket the kernel adds what it knows of the process that listens there. One that is stopped
answers nothing, though its connections are still accepted. One that computes or waits for a disk is alive
however long it is silent, so it is never called lost. Over TCP there is no such witness: a node whose event
loop is held up for more than LIFE_ANSWER_S is called lost although it lives.
"""

from __future__ import annotations

import errno
import math
from enum import Enum, auto
from typing import Final

from virgo.errors import NodeLost, NotRunning, VirgoError
from virgo.kernel.process import Vitals, vitals
from virgo.limits import LIFE_ANSWER_S, LIFE_QUIET_S, LIFE_WORK_S
from virgo.wire.address import Address

_UNKNOWN: Final = "Whether the request took effect is unknown."


class Answer(Enum):
    """What came of asking a node whether it lives."""

    GIVEN = auto()  # it said something, be it an error; or we could not ask for reasons of our own
    NONE = auto()  # it took the question, or would not even take a connection, and said nothing
    UNREACHABLE = auto()  # there is nobody at its address


def answer_of(error: VirgoError) -> Answer:
    """What a failure to ask says about the node."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno == errno.EADDRNOTAVAIL:
        return Answer.GIVEN  # all our own ports are in use
    if isinstance(error, NotRunning):
        # A full backlog is EAGAIN on a Unix socket, and silence on TCP.
        silent = isinstance(cause, TimeoutError | BlockingIOError)
        return Answer.NONE if silent else Answer.UNREACHABLE
    return Answer.UNREACHABLE if isinstance(error, NodeLost) else Answer.GIVEN


class Pulse:
    """What the connections of one client have found out about their node; one asks for all.

    Times are those of the monotonic clock, in seconds.
    """

    def __init__(self) -> None:
        self._answered = -math.inf
        self._lost_since = -math.inf
        self._loss = NodeLost()

    def __repr__(self) -> str:
        return f"<Pulse {'lost' if self._lost_since > -math.inf else 'alive'}>"

    def due_s(self, quiet_since: float, now: float) -> float:
        """When the node is to be asked, from now, for a request unheard of since; 0 or less: at once."""
        return max(quiet_since, self._answered) + LIFE_QUIET_S - now

    def beat(self, now: float) -> None:
        """The node lives."""
        self._answered, self._lost_since = now, -math.inf

    def lose(self, asked: float, loss: NodeLost) -> None:
        """The node has not answered since it was asked then."""
        self._lost_since, self._loss = asked, loss

    def check(self, quiet_since: float) -> None:
        """Raise NodeLost if the node has been lost since, for a request unheard of since then."""
        if quiet_since <= self._lost_since:
            raise self.loss()

    def loss(self) -> NodeLost:
        """The loss as an exception of the caller's own."""
        return NodeLost(self._loss.message, hint=self._loss.hint)


class Witness:
    """The process at the other end of a Unix socket, before and after the question; pid 0 sees nothing."""

    def __init__(self, address: Address, pid: int) -> None:
        self.address = address
        self._pid = pid
        self._before = vitals(pid) if pid else None

    def __repr__(self) -> str:
        return f"<Witness {self.address} pid {self._pid} {self._before}>"

    def verdict(self, answer: Answer) -> NodeLost | None:
        """The loss that the answer amounts to, or None if the node lives."""
        after = vitals(self._pid) if self._pid else None
        return judge(self.address, answer, self._pid, self._before, after)


def judge(
    address: Address, answer: Answer, pid: int, before: Vitals | None, after: Vitals | None
) -> NodeLost | None:
    """Weigh the answer and what was seen of the process, None where nothing could be seen."""
    if answer is Answer.GIVEN:
        return None
    silence = f"{address} is silent, and did not answer a PING on a second connection"
    if before is None or after is None:
        if answer is Answer.UNREACHABLE:
            silence = f"{address} is silent, and a second connection to it fails"
        return NodeLost(
            f"{silence} within {LIFE_ANSWER_S:g} s",
            hint=f"{_UNKNOWN} `virgo nodes`, asked of another node, shows who is up.",
        )
    if after.ended:
        return NodeLost(f"{address}: the node's process {pid} has ended", hint=_UNKNOWN)
    if after.stopped:
        return NodeLost(
            f"{address}: the node's process {pid} is stopped",
            hint=f"`kill -CONT {pid}` lets it go on. {_UNKNOWN}",
        )
    if answer is Answer.UNREACHABLE:
        return None  # only the socket's name is gone: the kernel would have told the end of the process
    works = after.state in "RD" or after.cpu_s - before.cpu_s >= LIFE_WORK_S
    if works:
        return None
    return NodeLost(
        f"{silence} within {LIFE_ANSWER_S:g} s, and its process {pid} does nothing",
        hint=f"{_UNKNOWN} The process may be frozen, or wait for something; the node's log may tell.",
    )
