"""Who gets a place on which node, and who waits for one.

A call or lease is bound to a node as late as can be (see `placement`, which decides): it waits here until
some node has a place. Calls of calls go first, the newest before the older; all others by priority, and in
the order in which they came.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from virgo.cpu.core import Crew
from virgo.cpu.durations import Durations
from virgo.cpu.line import Line
from virgo.cpu.messages import Options
from virgo.cpu.needs import PLAIN, Needs
from virgo.cpu.placement import Candidate, Seats, choose, compared, fits, fits_now, workers_of
from virgo.cpu.pool import WorkerPool
from virgo.errors import Busy, NodeLost, NoNode, VirgoError
from virgo.limits import CALLS_WAITING_MAX
from virgo.members import Load, Member
from virgo.module import NodeServices

# How often a node with something to do looks whether it still is what the others know, and these for places.
_LOOK_S: Final = 0.05
# Waiting calls that are looked at when a place becomes free: some may not go to every node.
_LOOK_AHEAD: Final = 64


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A call that waits for a place on a node."""

    options: Options
    refused: dict[int, VirgoError]
    seat: asyncio.Future[int]
    since: float


class Seating:
    """The places of all nodes, as this one sees them.

    Args:
        services: the node.
        pool: its workers.
        own: fills in this node's part of its load.
        chance: source of randomness for placement.

    Attributes:
        durations: how long calls take.
    """

    def __init__(
        self,
        services: NodeServices,
        pool: WorkerPool,
        own: Callable[[Load], Load],
        *,
        chance: random.Random,
    ) -> None:
        self._services = services
        self._pool = pool
        self._own = own
        self._chance = chance
        self.durations: Durations[str] = Durations()
        self._random = services.config.cpu.placement.lower() == "random"
        self._seats: dict[int, Seats] = {services.number: Seats()}
        self._waiting: Line[_Waiting] = Line()
        self._nested: OrderedDict[int, _Waiting] = OrderedDict()  # taken newest first
        self._serial = itertools.count(1)
        self._coming = 0  # places here of calls that did not reach the pool yet
        self._full = False  # as the others know it
        self._visited = False  # by a client, maybe one whom another node counts as still on its way here
        self._look: asyncio.TimerHandle | None = None
        pool.recalls.outside = self._longest

    def __repr__(self) -> str:
        return f"<Seating {self._services.name} waiting={self.waiting}>"

    @property
    def waiting(self) -> int:
        """Calls that no node has yet."""
        return len(self._waiting) + len(self._nested)

    def leave(self, number: int, *, places: int = 1, moved: bool = False) -> None:
        """Give places back; `moved`: somebody else takes one, who is not seen from here."""
        seats = self._seats[number]
        seats.ours -= places
        seats.moved += moved
        self.go_on()

    @contextlib.contextmanager
    def coming_to_pool(self, places: int = 1) -> Iterator[Callable[[], None]]:
        """A call that has places here is on its way to the pool, until it is said to have arrived."""
        coming = places

        def arrived() -> None:
            nonlocal coming
            self._coming -= coming
            coming = 0

        try:
            yield arrived
        finally:
            arrived()

    def _longest(self) -> tuple[Crew, float]:
        """The client whose call or lease comes next, and since when it waits; 0.0 if none does."""
        for serial in itertools.islice(self._in_turn(), 1):
            waiting = self._who(serial)
            return waiting.options.crew, waiting.since
        return b"", 0.0

    def _in_turn(self) -> Iterator[int]:
        """Those who wait: calls of calls, the newest first; then the others."""
        return itertools.chain(reversed(self._nested), self._waiting)

    def _who(self, serial: int) -> _Waiting:
        return self._nested[serial] if serial in self._nested else self._waiting[serial]

    def _drop(self, serial: int) -> None:
        if self._nested.pop(serial, None) is None:
            self._waiting.drop(serial)

    def _occupy(self, number: int, places: int) -> int:
        """Take places on a node."""
        self._seats.setdefault(number, Seats()).ours += places
        if number == self._services.number:
            self._coming += places
        self._watch()
        return number

    def has(self, needs: Needs) -> bool:
        """Whether a call would find here what it needs beside a place."""
        return needs == PLAIN or fits_now(needs, self._load(self._services.member(self._services.number)))

    def visited(self) -> None:
        """A client has leased a worker here: the others are to know, even if he is gone by then."""
        self._visited = True

    def close(self) -> None:
        """Look no more."""
        if self._look is not None:
            self._look.cancel()

    def _watch(self) -> None:
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(_LOOK_S, self._look_around)

    def _look_around(self) -> None:
        """Tell the others of a place that was taken or given back, and see whether they have told of one."""
        self._look = None
        full = self._pool.room <= self._coming
        if full != self._full or self._visited:
            self._full, self._visited = full, False
            self._services.announce()
        if self.waiting:
            self.go_on()
        if self.waiting or self._pool.at_work:
            self._watch()

    async def take(self, options: Options, refused: dict[int, VirgoError]) -> int:
        """A node that has a place for the call, as soon as there is one; the place is taken."""
        if options.node:
            return self._occupy(self._pinned(options, refused), options.needs.cpus)
        self._check_able(options, refused)
        number = None if self.waiting and not options.nested else self._choose(options, refused)
        if number is None and options.extra and self._services.number not in refused:
            number = self._services.number
        if number is None:
            return await self._wait_for_seat(options, refused)
        return self._occupy(number, options.needs.cpus)

    async def _wait_for_seat(self, options: Options, refused: dict[int, VirgoError]) -> int:
        if self.waiting >= CALLS_WAITING_MAX:
            raise Busy(f"{self.waiting} calls wait for a node already")
        serial = next(self._serial)
        waiting = _Waiting(options, refused, asyncio.get_running_loop().create_future(), time.monotonic())
        if options.nested:
            self._nested[serial] = waiting
        else:
            self._waiting.add(serial, waiting, priority=options.priority)
        self.go_on()  # it may go where those before it may not
        if not waiting.seat.done():
            self._pool.recalls.press()
            self._watch()
        try:
            return await waiting.seat
        except asyncio.CancelledError:
            if waiting.seat.done() and not waiting.seat.cancelled() and waiting.seat.exception() is None:
                number = waiting.seat.result()
                self._seats[number].ours -= options.needs.cpus
                if number == self._services.number:
                    self._coming -= options.needs.cpus
                self.go_on()
            raise
        finally:
            self._drop(serial)

    def go_on(self) -> None:
        """A place may have become free: give it to who waits, calls of calls first."""
        for serial in list(itertools.islice(self._in_turn(), _LOOK_AHEAD)):
            waiting = self._who(serial)
            if waiting.seat.done():
                self._drop(serial)
                continue
            options = waiting.options
            try:
                self._check_able(options, waiting.refused)
            except VirgoError as error:
                waiting.seat.set_exception(error)
                self._drop(serial)
                continue
            number = self._choose(options, waiting.refused)
            if number is None:
                # Others may go where it may not; but who needs many places is not passed by.
                if waiting.refused or options.at_hand or options.needs.gpus or options.needs.memory:
                    continue
                return
            waiting.seat.set_result(self._occupy(number, options.needs.cpus))
            self._drop(serial)

    def _check_able(self, options: Options, refused: dict[int, VirgoError]) -> None:
        """Raise if no node can ever take the call."""
        members = self._services.members()
        able = [one for one in members if self._runs_calls(one) and one.number not in refused]
        needs = options.needs
        if able and needs == PLAIN:
            return
        if any(fits(needs, self._load(one), self._workers(one, members)) for one in able):
            return
        if able and not refused:
            raise NoNode(
                f"{options.label} needs {needs}, which no node of this cloud has",
                hint="`virgo nodes --json` shows what they have.",
            )
        if refused:  # each has said why not; the last is as good as any
            raise list(refused.values())[-1]
        raise NoNode(f"{options.label}: no node of this cloud runs calls now")

    def _choose(self, options: Options, refused: dict[int, VirgoError]) -> int | None:
        """The best of the nodes that have a place now."""
        members = self._services.members()
        machine = self._services.member(self._services.number).machine if options.at_hand else ""
        needs, able = options.needs, []
        for member in members:
            at_hand = not options.at_hand or member.machine == machine
            if at_hand and member.number not in refused and self._runs_calls(member):
                if needs != PLAIN and not fits_now(needs, self._load(member)):
                    continue
                candidate, room = self._candidate(member, members)
                if room >= needs.cpus:
                    able.append(candidate)
        if not able:
            return None
        if len(able) == 1:
            return able[0].number
        if self._random:
            return self._chance.choice(able).number
        # A lease is for many calls, and lasts.
        expected = 1.0 if options.crew else self.durations.expect(options.label)
        near = self._number(options.near, members)
        return choose(able, chance=self._chance, near=near, compare=compared(expected))

    @staticmethod
    def _number(near: str | int, members: Sequence[Member]) -> int:
        if isinstance(near, int):
            return near
        return next((member.number for member in members if member.name == near), 0)

    def _load(self, member: Member) -> Load:
        """What a node has; of this one, what it has now."""
        return self._own(member.load) if member.number == self._services.number else member.load

    def _workers(self, member: Member, members: Sequence[Member]) -> int:
        own = member.number == self._services.number
        return self._pool.target if own else workers_of(member, members)

    def _runs_calls(self, member: Member) -> bool:
        if member.number == self._services.number:  # whatever its last beat said: the call is here
            return True
        return member.state == "up" and member.modules.get("cpu", "up") == "up"

    def _candidate(self, member: Member, members: Sequence[Member]) -> tuple[Candidate, int]:
        seats = self._seats.setdefault(member.number, Seats())
        if member.number == self._services.number:
            # Calls that have a place here but did not reach the pool yet count too.
            room = max(self._pool.room - self._coming, 1 - seats.ours)
            calls = self._pool.outstanding + self._coming
            return Candidate(member.number, member.load, calls, self._pool.target, local=True), room
        seats.seen(member.load)
        workers = workers_of(member, members)
        return Candidate(member.number, member.load, seats.calls, workers), seats.room(workers)

    def _pinned(self, options: Options, refused: dict[int, VirgoError]) -> int:
        for member in self._services.members():
            if member.name == options.node:
                if member.number in refused:
                    raise refused[member.number]
                workers = self._workers(member, self._services.members())
                if options.needs != PLAIN and not fits(options.needs, self._load(member), workers):
                    raise NoNode(
                        f"{options.label} needs {options.needs}, which node {member.name} does not have"
                    )
                return member.number
        if any(member.name == options.node for member in self._services.known()):
            raise NodeLost(f"{options.label} must run on node {options.node}, which is lost")
        raise NoNode(f"{options.label} must run on node {options.node}, which this cloud does not have")
