"""The way of a call from the node that was asked to the worker that runs it.

Promises: a call is sent to a second node only if the first surely did not run it (it could not be reached,
or refused), or if its caller said that it may be repeated. Where a call goes is decided by `placement`; who
waits for whom is known by contexts: a call whose cause is a call running here lets that lend its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from virgo import context as contexts
from virgo.context import Context
from virgo.cpu import messages
from virgo.cpu.messages import Options, Work
from virgo.cpu.placement import Candidate, Seats, choose, workers_of
from virgo.cpu.pool import WorkerPool
from virgo.cpu.published import Published
from virgo.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    NodeLost,
    NoNode,
    NotExported,
    NotLoaded,
    NotRunning,
    VirgoError,
)
from virgo.limits import CALLS_WAITING_MAX, NAME_CHARS_MAX
from virgo.members import Member
from virgo.module import NodeServices

# Waiting calls that are looked at when a place becomes free: some may not go to every node.
_LOOK_AHEAD: Final = 64
# Answers that say that the node did not run the call: another one may.
_NOT_BEGUN: Final = (Busy, NotExported, NotLoaded)


@dataclass(slots=True)
class _Flight:
    """A call that can be cancelled by its key."""

    owner: str
    task: asyncio.Task[Any]
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    peer: int = 0  # the other node that runs it
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A call that waits for a place on a node."""

    options: Options
    refused: dict[int, VirgoError]
    seat: asyncio.Future[int]


class Dispatcher:
    """Sends calls to nodes, and runs those that are for this one.

    Args:
        services: the node.
        pool: its workers.
        programs: its allowlist.
        published: the functions published to the cloud.
        chance: source of randomness for placement.
    """

    def __init__(
        self,
        services: NodeServices,
        pool: WorkerPool,
        programs: dict[str, list[str]],
        published: Published,
        *,
        chance: random.Random,
    ) -> None:
        self._services = services
        self._pool = pool
        self._programs = programs
        self._published = published
        self._chance = chance
        self._seats: dict[int, Seats] = {services.number: Seats()}
        self._waiting: OrderedDict[int, _Waiting] = OrderedDict()
        self._nested: OrderedDict[int, _Waiting] = OrderedDict()  # taken newest first
        self._serial = itertools.count(1)
        self._coming = 0  # calls that have a place here and did not reach the pool yet
        self._flights: dict[str, _Flight] = {}
        self._numbers: dict[str, int] = {}  # calls running here, by the id of their context
        self.forwarded: dict[str, int] = {}  # calls sent so far, by node

    def __repr__(self) -> str:
        return f"<Dispatcher {self._services.name} flights={len(self._flights)}>"

    @property
    def waiting(self) -> int:
        """Calls that no node has yet."""
        return len(self._waiting) + len(self._nested)

    async def dispatch(self, options: Options, function: bytes, arguments: list[bytes]) -> bytes:
        """Run a call on the best node and return its outcome.

        Raises:
            VirgoError: it has no outcome: no node for it, node lost, deadline, cancelled, name not exported.
        """
        context = _bounded(options)
        options = msgspec.structs.replace(options, timeout_ms=0)
        parent = self._numbers.get(context.cause)
        if context.cause:
            options = msgspec.structs.replace(options, nested=True, extra=parent is None)
        with self._flight(options.key, context), self._lent(parent), contexts.using(context):
            return await self._try(options, function, arguments)

    async def run_here(self, options: Options, function: bytes, arguments: list[bytes]) -> bytes:
        """Run a call that another node, or this one, placed here."""
        context = _bounded(options)
        with self._flight(options.key, context), contexts.using(context):
            try:
                return await self._run(options, function, arguments)
            finally:
                self.go_on()

    async def cancel(self, key: str) -> bool:
        """Cancel a call and wait until it is dead; False if there is none of that key."""
        flight = self._flights.get(key)
        context = contexts.current()
        if flight is None or (context is not None and flight.owner != context.identity.name):
            return False
        if flight.peer:
            with contextlib.suppress(NodeLost):  # then the call has ended with its node
                if await self._services.call(flight.peer, "CPU.CANCEL", key):
                    return True
        # It runs here, or has not reached the other node yet: closing its connection stops it there.
        if not flight.cancelled:
            flight.cancelled = True
            flight.task.cancel()
        await flight.ended.wait()
        return True

    async def cancel_all(self, keys: list[str]) -> int:
        """Cancel calls, all at once, and wait until they are dead; how many there were."""
        return sum(await asyncio.gather(*map(self.cancel, keys)))

    # --- which node ---------------------------------------------------------------------------

    async def _try(self, options: Options, function: bytes, arguments: list[bytes]) -> bytes:
        refused: dict[int, VirgoError] = {}
        retries = options.retries
        while True:
            number = await self._take_seat(options, refused)
            try:
                if number == self._services.number:
                    return await self._run_seated(options, function, arguments)
                return await self._forward(number, options, function, arguments)
            except _NOT_BEGUN as error:
                refused[number] = error
            except NodeLost as error:
                surely_not_run = isinstance(error.__cause__, NotRunning)
                if not surely_not_run:
                    if retries < 1 or number == self._services.number:
                        raise
                    retries -= 1
                refused[number] = error
            finally:
                self._seats[number].ours -= 1
                self.go_on()

    async def _run_seated(self, options: Options, function: bytes, arguments: list[bytes]) -> bytes:
        """Run a call here that has taken a place here."""
        coming = True

        def arrived() -> None:
            nonlocal coming
            self._coming -= coming
            coming = False

        try:
            return await self._run(options, function, arguments, arrived=arrived)
        finally:
            arrived()

    def _occupy(self, number: int) -> int:
        """Take a place on a node."""
        self._seats.setdefault(number, Seats()).ours += 1
        self._coming += number == self._services.number
        return number

    async def _take_seat(self, options: Options, refused: dict[int, VirgoError]) -> int:
        """A node that has a place for the call, as soon as there is one; the place is taken."""
        if options.node:
            return self._occupy(self._pinned(options, refused))
        self._check_able(options, refused)
        number = None if self.waiting and not options.nested else self._choose(refused)
        if number is None and options.extra and self._services.number not in refused:
            number = self._services.number
        if number is None:
            return await self._wait_for_seat(options, refused)
        return self._occupy(number)

    async def _wait_for_seat(self, options: Options, refused: dict[int, VirgoError]) -> int:
        if self.waiting >= CALLS_WAITING_MAX:
            raise Busy(f"{self.waiting} calls wait for a node already")
        serial = next(self._serial)
        waiting = _Waiting(options, refused, asyncio.get_running_loop().create_future())
        queue = self._nested if options.nested else self._waiting
        queue[serial] = waiting
        try:
            return await waiting.seat
        except asyncio.CancelledError:
            if waiting.seat.done() and not waiting.seat.cancelled() and waiting.seat.exception() is None:
                number = waiting.seat.result()
                self._seats[number].ours -= 1
                self._coming -= number == self._services.number
                self.go_on()
            raise
        finally:
            queue.pop(serial, None)

    def go_on(self) -> None:
        """A place may have become free: give it to who waits, calls of calls first."""
        for queue, last in ((self._nested, True), (self._waiting, False)):
            for serial in list(itertools.islice(reversed(queue) if last else queue, _LOOK_AHEAD)):
                waiting = queue[serial]
                if waiting.seat.done():
                    del queue[serial]
                    continue
                try:
                    self._check_able(waiting.options, waiting.refused)
                except VirgoError as error:
                    waiting.seat.set_exception(error)
                    del queue[serial]
                    continue
                number = self._choose(waiting.refused)
                if number is None:
                    if waiting.refused:  # others may go where it may not
                        continue
                    return
                waiting.seat.set_result(self._occupy(number))
                del queue[serial]

    def _check_able(self, options: Options, refused: dict[int, VirgoError]) -> None:
        """Raise if no node can ever take the call."""
        if any(self._runs_calls(one) and one.number not in refused for one in self._services.members()):
            return
        if refused:  # each has said why not; the last is as good as any
            raise list(refused.values())[-1]
        raise NoNode(f"{options.label}: no node of this cloud runs calls now")

    def _choose(self, refused: dict[int, VirgoError]) -> int | None:
        """The best of the nodes that have a place now."""
        members = self._services.members()
        able = []
        for member in members:
            if member.number not in refused and self._runs_calls(member):
                candidate, room = self._candidate(member, members)
                if room > 0:
                    able.append(candidate)
        if not able:
            return None
        return able[0].number if len(able) == 1 else choose(able, chance=self._chance)

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
                return member.number
        if any(member.name == options.node for member in self._services.known()):
            raise NodeLost(f"{options.label} must run on node {options.node}, which is lost")
        raise NoNode(f"{options.label} must run on node {options.node}, which this cloud does not have")

    # --- there, and here ----------------------------------------------------------------------

    async def _forward(self, number: int, options: Options, function: bytes, arguments: list[bytes]) -> bytes:
        """Have another node run it."""
        context = contexts.current()
        assert context is not None
        flight = self._flights.get(options.key)
        name = self._services.member(number).name
        self.forwarded[name] = self.forwarded.get(name, 0) + 1
        if flight is not None:
            flight.peer = number
        # The other node keeps the deadline: it stops the call first, and then says so.
        left_s = context.remaining_s()
        there = msgspec.structs.replace(
            options, timeout_ms=0 if left_s is None else max(1, int(left_s * 1000))
        )
        verb = "CPU.CALL.HERE" if options.form == "pickle" else "CPU.INVOKE.HERE"
        try:
            with contexts.using(msgspec.structs.replace(context, deadline=None)):
                outcome: bytes = await self._services.call(
                    number, verb, messages.encode_options(there), function, *arguments, timeout_s=math.inf
                )
            return outcome
        finally:
            if flight is not None:
                flight.peer = 0

    async def _run(
        self,
        options: Options,
        function: bytes,
        arguments: list[bytes],
        *,
        arrived: Callable[[], None] = lambda: None,
    ) -> bytes:
        """Run it here; `arrived` is called when the pool has it."""
        context = contexts.current()
        assert context is not None
        work, limit_s = await self._work(options, function, arguments, context)
        deadline = context.deadline
        if limit_s is not None:
            deadline = min(deadline or math.inf, time.monotonic() + limit_s)

        def started(number: int) -> None:
            self._numbers[context.id] = number
            arrived()

        try:
            return await self._pool.run(
                work, deadline=deadline, nested=options.nested, extra=options.extra, started=started
            )
        except DeadlineExceeded as error:
            if limit_s is not None and deadline != context.deadline:
                error.hint = f"cpu.program_time_s is {limit_s:g} s."
            raise
        finally:
            self._numbers.pop(context.id, None)

    async def _work(
        self, options: Options, function: bytes, arguments: list[bytes], context: Context
    ) -> tuple[Work, float | None]:
        """The call for the pool, and its time limit if it is a program. Raises NotExported."""
        encoded = contexts.encode(context)
        form, label = options.form, options.label
        if form == "pickle":
            return Work(form, label, "", function, arguments, None, encoded), None
        name = function.decode("utf-8", "replace")
        if name in self._pool.exports:
            return Work(form, name, name, b"", arguments, None, encoded), None
        program = self._programs.get(name)
        if program is not None:
            limit_s = self._services.config.cpu.program_time_s
            return Work(form, name, name, b"", arguments, program, encoded), limit_s
        found = await self._published.find(name) if 0 < len(name) <= NAME_CHARS_MAX else None
        if found is None:
            raise NotExported(f"no function or program {name[:80]!r} is exported")
        return Work(form, name, name, found.function, arguments, None, encoded), None

    # --- bookkeeping --------------------------------------------------------------------------

    @contextlib.contextmanager
    def _flight(self, key: str, context: Context) -> Iterator[None]:
        """Let the block be cancelled by its key."""
        task = asyncio.current_task()
        if not key or task is None:
            yield
            return
        flight = self._flights[key] = _Flight(context.identity.name, task)
        try:
            yield
        except asyncio.CancelledError:
            if not flight.cancelled:
                raise
            task.uncancel()
            raise Cancelled("the call was cancelled, and what it had started is dead") from None
        finally:
            if self._flights.get(key) is flight:
                del self._flights[key]
            flight.ended.set()

    @contextlib.contextmanager
    def _lent(self, parent: int | None) -> Iterator[None]:
        """Let the running call that waits for the block lend its worker's place."""
        if parent is None:
            yield
            return
        self._pool.lend(parent)
        self.go_on()
        try:
            yield
        finally:
            self._pool.reclaim(parent)


def _bounded(options: Options) -> Context:
    """The current context, ending with the call's own time limit."""
    context = contexts.current() or Context(id=contexts.new_id())
    if not options.timeout_ms:
        return context
    deadline = time.monotonic() + options.timeout_ms / 1000
    if context.deadline is not None:
        deadline = min(deadline, context.deadline)
    return msgspec.structs.replace(context, deadline=deadline)
