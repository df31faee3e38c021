"""The way of a call from the node that was asked to the worker that runs it.

Promises: a call is sent to a second node only if the first surely did not run it (it could not be reached,
or refused), or if its caller said that it may be repeated. Where a call goes is decided by `placement`; who
waits for whom is known by contexts: a call whose cause is a call running here lets that lend its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from virgo import context as contexts
from virgo.context import Context
from virgo.cpu import landing, messages
from virgo.cpu.freight import Freight
from virgo.cpu.hiring import Hiring
from virgo.cpu.messages import Options, Terms, Work
from virgo.cpu.pool import WorkerPool
from virgo.cpu.published import Published
from virgo.cpu.seating import Seating
from virgo.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    NodeLost,
    NotExported,
    NotLoaded,
    NotRunning,
    VirgoError,
)
from virgo.limits import CALL_NODES_LOST_MAX, LEASE_TURN_S, NAME_CHARS_MAX
from virgo.members import Load
from virgo.module import NodeServices

# Answers that say that the node did not run the call: another one may.
_PATIENCE_S: Final = 3 * LEASE_TURN_S  # for a place here, which leases may have to give back first
_NOT_BEGUN: Final = (Busy, NotExported, NotLoaded)


@dataclass(slots=True)
class _Flight:
    """A call that can be cancelled by its key."""

    owner: str
    task: asyncio.Task[Any]
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    peer: int = 0  # the other node that runs it
    cancelled: bool = False


class Dispatcher:
    """Sends calls to nodes, and runs those that are for this one.

    Args:
        services: the node.
        pool: its workers.
        programs: its allowlist.
        published: the functions published to the cloud.
        own: fills in this node's part of its load.
        chance: source of randomness for placement.

    Attributes:
        seating: who gets a place on which node.
        forwarded: calls sent so far, by node.
        freight: what is large of those for other machines, and of theirs.
    """

    def __init__(
        self,
        services: NodeServices,
        pool: WorkerPool,
        programs: dict[str, list[str]],
        published: Published,
        own: Callable[[Load], Load],
        *,
        chance: random.Random,
    ) -> None:
        self._services = services
        self._pool = pool
        self._programs = programs
        self._published = published
        self.seating = Seating(services, pool, own, chance=chance)
        self.freight = Freight(services)
        self._flights: dict[str, _Flight] = {}
        self._numbers: dict[str, int] = {}  # calls running here, by the id of their context
        self.forwarded: dict[str, int] = {}  # calls sent so far, by node

    def __repr__(self) -> str:
        return f"<Dispatcher {self._services.name} flights={len(self._flights)}>"

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

    async def lease(self, options: Options, hiring: Hiring, terms: Terms) -> tuple[int, bytes]:
        """Lease a worker of this node to its end; or give at once the number of another node with a place.

        Returns:
            The node, and the outcome: a failure if the worker has died.

        Raises:
            VirgoError: there is no worker to be had.
        """
        context = contexts.current() or Context(id=contexts.new_id())
        parent = self._numbers.get(context.cause)
        nested = bool(context.cause)
        options = msgspec.structs.replace(
            options, nested=nested, extra=nested and options.extra and parent is None
        )
        with self._lent(parent):
            number = await self.seating.take(options, {})
            if number != self._services.number:
                self.seating.leave(number, moved=True)
                return number, b""
            self.seating.visited()
            work = Work("lease", options.label, "", b"", [], None, messages.encode_order(terms))
            try:
                with self.seating.coming_to_pool() as arrived:
                    outcome = await self._pool.run(
                        work,
                        nested=options.nested,
                        extra=options.extra,
                        started=lambda _number: arrived(),
                        hiring=hiring,
                    )
            finally:
                self.seating.leave(number)
        return number, outcome

    async def run_here(self, options: Options, function: bytes, arguments: list[bytes]) -> bytes:
        """Run a call that another node, or this one, placed here."""
        if options.bounces and not self.seating.has(options.needs):
            return messages.TAKEN  # the other node did not know yet
        context = _bounded(options)
        if context.cause:  # the request of the other node is not the call: that has an id already
            context = msgspec.structs.replace(context, id=context.cause, cause=options.cause)
        with self._flight(options.key, context), contexts.using(context):
            loop = asyncio.get_running_loop()
            send_on = loop.call_later(_PATIENCE_S, self._send_on, context.id) if options.bounces else None
            try:
                return await self._run_for(options, function, arguments)
            finally:
                if send_on is not None:
                    send_on.cancel()
                self.seating.go_on()

    def _send_on(self, task: str) -> None:
        """A call waits for a place here, although the other node thought there was one."""
        number = self._numbers.get(task)
        if number is not None:
            self._pool.send_on(number)

    async def _run_for(self, options: Options, function: bytes, arguments: list[bytes]) -> bytes:
        """Run a call for a node of this machine, or of another one, which has what is large to be taken."""
        place = landing.place() if options.afar else None
        if place is not None:
            options = msgspec.structs.replace(options, land=place.address)
        async with self.freight.taken(options.label, arguments) as here:
            outcome = await self._run(options, function, here)
        return outcome if place is None else self.freight.offered(outcome, place)

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
        full: set[int] = set()  # nodes that had no place left: a second time it waits there for one
        attempts, lost = 1, 0
        while True:
            number = await self.seating.take(options, refused)
            began, bounced = time.monotonic(), False
            try:
                if number == self._services.number:
                    outcome = await self._run_seated(options, function, arguments)
                else:
                    bounces = not (options.node or options.nested or number in full)
                    sent = msgspec.structs.replace(options, bounces=bounces)
                    outcome = await self._forward(number, sent, function, arguments)
                if outcome[:1] == messages.TAKEN:
                    bounced = True
                    full.add(number)
                    continue
                if outcome[:1] != messages.FAILED:
                    self.seating.durations.learn(options.label, time.monotonic() - began)
                    return outcome
                if attempts > options.retries or not messages.has_died(outcome):
                    return messages.after(outcome, attempts)
                attempts += 1
            except _NOT_BEGUN as error:
                refused[number] = error
            except NodeLost as error:
                surely_not_run = isinstance(error.__cause__, NotRunning)
                if not surely_not_run:
                    if not options.retries or lost >= CALL_NODES_LOST_MAX or number == self._services.number:
                        raise
                    lost += 1
                    options = _for_another_attempt(options)
                refused[number] = error
            finally:
                self.seating.leave(number, places=options.needs.cpus, moved=bounced)

    async def _run_seated(self, options: Options, function: bytes, arguments: list[bytes]) -> bytes:
        """Run a call here that has taken a place here."""
        with self.seating.coming_to_pool(options.needs.cpus) as arrived:
            return await self._run(options, function, arguments, arrived=arrived)

    # --- there, and here ----------------------------------------------------------------------

    async def _forward(self, number: int, options: Options, function: bytes, arguments: list[bytes]) -> bytes:
        """Have another node run it."""
        context = contexts.current()
        assert context is not None
        flight = self._flights.get(options.key)
        there, here = self._services.member(number), self._services.member(self._services.number)
        name = there.name
        self.forwarded[name] = self.forwarded.get(name, 0) + 1
        if flight is not None:
            flight.peer = number
        # The other node keeps the deadline: it stops the call first, and then says so.
        left_s = context.remaining_s()
        land, afar = options.land, there.machine != here.machine
        options = msgspec.structs.replace(
            options,
            cause=context.cause,
            timeout_ms=0 if left_s is None else max(1, int(left_s * 1000)),
            land=None if afar else land,
            afar=afar and land is not None,
        )
        verb = "CPU.CALL.HERE" if options.form == "pickle" else "CPU.INVOKE.HERE"
        freight = self.freight.sent(options.label, arguments) if afar else contextlib.nullcontext(arguments)
        try:
            with contexts.using(msgspec.structs.replace(context, deadline=None)), freight as sent:
                outcome: bytes = await self._services.call(
                    number, verb, messages.encode_options(options), function, *sent, timeout_s=math.inf
                )
                return await self.freight.landed(options.label, outcome, land)
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
        form, followed = options.form, options.followed
        if form == "pickle":
            work = Work(form, options.label, "", function, arguments, None, encoded, options.needs)
            return msgspec.structs.replace(work, land=options.land, followed=followed), None
        name = function.decode("utf-8", "replace")
        work = Work(form, name, name, b"", arguments, None, encoded, options.needs, followed=followed)
        if name in self._pool.exports:
            return work, None
        program = self._programs.get(name)
        if program is not None:
            limit_s = self._services.config.cpu.program_time_s
            return msgspec.structs.replace(work, program=program), limit_s
        found = await self._published.find(name) if 0 < len(name) <= NAME_CHARS_MAX else None
        if found is None:
            raise NotExported(f"no function or program {name[:80]!r} is exported")
        return msgspec.structs.replace(work, function=found.function), None

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
        self.seating.go_on()
        try:
            yield
        finally:
            self._pool.reclaim(parent)


def _for_another_attempt(options: Options) -> Options:
    """Where those that were lost with their nodes, and may still run, do not write."""
    land = None if options.land is None else landing.next_part(options.land)
    return msgspec.structs.replace(options, land=land)


def _bounded(options: Options) -> Context:
    """The current context, ending with the call's own time limit."""
    context = contexts.current() or Context(id=contexts.new_id())
    if not options.timeout_ms:
        return context
    deadline = time.monotonic() + options.timeout_ms / 1000
    if context.deadline is not None:
        deadline = min(deadline, context.deadline)
    return msgspec.structs.replace(context, deadline=deadline)
