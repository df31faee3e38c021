"""One connection of a server: order, identity, deadlines, batches, back-pressure.

Promises: answers leave in the order of the requests, in one write per received chunk; a request is
handled to its end before the next of its connection begins, unless its command is concurrent; a failing
handler answers a typed error and the connection goes on; a client that goes away cancels what it had
running; a slow reader stops being read, then is closed.

Handlers may group the work of a chunk: `batch(key, factory)` gives an object that lives until the chunk
has been handled (or until something must be awaited), whose `close()` makes the work final. If it fails,
every command of the chunk that is flagged `writes` is answered with that error.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from types import CoroutineType
from typing import TYPE_CHECKING, Any, cast

from virgo import context as contexts
from virgo.context import NOBODY, ROLES, Context, Identity
from virgo.errors import Cancelled, DeadlineExceeded, NodeLost, VirgoError
from virgo.limits import (
    CONCURRENT_CALLS_MAX,
    CROWD_LOOK_BYTES,
    EOF_GRACE_S,
    OUTPUT_PAUSE_BYTES,
    OUTPUT_STALL_S,
    PIPELINE_DEPTH_MAX,
    QUEUED_BYTES_MAX,
    REQUEST_BYTES_MAX,
    REQUEST_UNAUTHENTICATED_BYTES_MAX,
)
from virgo.wire import resp
from virgo.wire.answers import Answers, Slot
from virgo.wire.batches import Batches, fail
from virgo.wire.commands import Command, CommandTable
from virgo.wire.hooks import Interceptor
from virgo.wire.peer import hung_up, identify
from virgo.wire.refusals import defect, denied, not_allowed
from virgo.wire.runs import handle_run
from virgo.wire.within import unwrap

if TYPE_CHECKING:
    from virgo.wire.server import Service

log = logging.getLogger("virgo.wire")


_SMALL_BYTES = 512  # answers below this are not counted against OUTPUT_PAUSE_BYTES


class Session(asyncio.Protocol):
    """One connection, as its commands see it.

    Attributes:
        identity: who is connected, NOBODY before login.
        protocol: RESP version, 2 or 3.
        client_name: what the client calls itself.
        last_seen: loop time of the last received bytes.
        remote: whether it has come by TCP.
        queue: requests that were received and are not handled yet.
        attached: what commands keep for the connection, by a name of their own.
        at_end: called when the connection is no more.
        batch: gives the chunk's batch of a key, made by a function on first use.
    """

    def __init__(self, service: Service, number: int) -> None:
        self.service = service
        self.number = number
        self.identity: Identity = NOBODY
        self._shown: Identity = NOBODY  # what the connection itself shows, without a token
        self.protocol = 2
        self.client_name = ""
        self.peer = ""
        self.remote = False
        self.attached: dict[str, Any] = {}
        self.at_end: list[Callable[[], None]] = []
        self._allowed: frozenset[str] = frozenset({""})
        self._roles = self._allowed  # none while there is an interceptor, so that all is looked at closely
        self._interceptor: Interceptor | None = None
        self._reader = service.speech.reader(REQUEST_UNAUTHENTICATED_BYTES_MAX)
        self._error = service.speech.error
        self.queue: deque[list[bytes]] = deque()
        self._queued_bytes = 0
        self._answers = Answers(self._error)
        self._tasks: set[asyncio.Task[None]] = set()
        self._serial = False  # a request is being awaited that those behind it wait for
        self._exclusive = False  # that, or as many are being awaited as may be
        self._batches = Batches(self._error)
        self.batch = self._batches.get
        self._closing = False
        self._ended = False  # the client will send no more
        self._lingers = False  # a fault was answered, and the client may read it
        self._tail: asyncio.TimerHandle | None = None
        self._reading = True
        self._writable = True
        self._stall: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._clean = contextvars.copy_context()
        self._wakeful = service.wakeful
        self.opened = self.last_seen = service.loop.time()

    def __repr__(self) -> str:
        return f"<Session {self.number} {self.peer or 'closed'} {self.identity.name or 'nobody'}>"

    @property
    def table(self) -> CommandTable:
        """The commands that this connection's port serves."""
        return self.service.table

    @property
    def working(self) -> bool:
        """Whether requests of this connection are being handled, or something hangs on it."""
        return bool(self._tasks or self.at_end)

    def login(self, identity: Identity) -> None:
        """Go on as this identity."""
        self.identity = identity
        known = identity.roles & ROLES
        self._allowed = frozenset({"", "login"}) | (ROLES if "admin" in known else known)
        if identity == NOBODY:
            self._allowed = frozenset({""})
            self._reader.request_bytes_max = REQUEST_UNAUTHENTICATED_BYTES_MAX
        else:
            self._reader.request_bytes_max = REQUEST_BYTES_MAX
        self.intercept(self._interceptor)

    def intercept(self, interceptor: Interceptor | None) -> None:
        """Give all further requests to the interceptor; None: to their commands again."""
        self._interceptor = interceptor
        self._roles = self._allowed if interceptor is None else frozenset()

    def reset(self) -> None:
        """Forget the login that a token gave, the protocol, the client's name and all that is attached."""
        self.attached.clear()
        self.intercept(None)
        self.protocol, self.client_name = 2, ""
        self.login(self._shown)

    def require(self, role: str, what: str) -> None:
        """Raise Denied unless who asks has a further role that this form of a command needs."""
        context = contexts.current()
        identity = self.identity if context is None else context.identity
        if not identity.may(role):
            raise denied(what, role, identity)

    def close(self) -> None:
        """Close once all answers so far have left."""
        self._closing = True

    def duplicate(self) -> int:
        """A descriptor of the connection, for another process; nothing more is read here. Raises NodeLost."""
        if self._transport is None:
            raise NodeLost("the connection was closed meanwhile")
        self._transport.pause_reading()
        return os.dup(self._transport.get_extra_info("socket").fileno())

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    # --- the transport's side -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Find out who it is."""
        transport = cast("asyncio.Transport", transport)  # uvloop's own class has its surface
        self._transport = transport
        transport.set_write_buffer_limits(high=OUTPUT_PAUSE_BYTES)
        self.remote = transport.get_extra_info("socket").family != socket.AF_UNIX
        refusal = self.service.admit(self)
        if refusal is not None:
            transport.write(self._error(refusal))
            transport.close()
            return
        self.peer, self._shown = identify(transport, self.service.authenticator, self.service.stranger)
        self.login(self._shown)

    def data_received(self, data: bytes) -> None:
        """Handle the requests that the chunk completes."""
        self._wakeful.begin(self)
        self.last_seen = self.service.loop.time()
        self.queue.extend(self._reader.read(data))
        if self._reader.open_bytes > CROWD_LOOK_BYTES:
            self._reader.fault = self._reader.fault or self.service.crowd.take(len(data))
        if self._exclusive or not self._writable:
            self._queued_bytes += len(data)
        self._drain()
        self._wakeful.end()

    def held_bytes(self) -> int:
        """What the connection holds in requests and answers."""
        waiting = 0 if self._transport is None else self._transport.get_write_buffer_size()
        return self._reader.open_bytes + self._queued_bytes + self._answers.waiting_bytes + waiting

    def eof_received(self) -> bool:
        """The client will send no more: finish what is quick, unless it is gone altogether."""
        if not (self._answers or self.queue) or self._transport is None or hung_up(self._transport):
            return False
        self._ended = True
        self._limit_tail()
        return self._transport.get_extra_info("ssl_object") is None

    def _limit_tail(self) -> None:
        """After the client's last byte each request has little time: its client may be dead."""
        if self._tail is not None:
            self._tail.cancel()
        self._tail = self.service.loop.call_later(EOF_GRACE_S, self._cancel_tasks)

    def _cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()

    def connection_lost(self, error: Exception | None) -> None:
        """Cancel what the client had running."""
        self.service.forget(self)
        self._transport = None
        self.queue.clear()
        self._answers.clear()
        for timer in (self._stall, self._tail):
            if timer is not None:
                timer.cancel()
        self._cancel_tasks()
        for leave in self.at_end:
            leave()

    def pause_writing(self) -> None:
        """The client does not read: stop reading from it, and close it if that goes on."""
        self._writable = False
        self._stall = self.service.loop.call_later(OUTPUT_STALL_S, self.abort)
        self._set_reading()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._writable = True
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        self._drain()

    # --- handling -----------------------------------------------------------------------------

    def _drain(self) -> None:  # noqa: PLR0912 - see the docstring
        """Handle queued requests until one must be awaited or the client must read first.

        The hottest loop of a node: what every request passes stands here, the rest in methods.
        """
        queue, out, writes, size = self.queue, list[bytes](), list[int](), 0
        known = self.service.table.spellings
        while (
            queue
            and not self._exclusive
            and self._writable
            and not self._closing
            and self._answers.waiting_bytes < QUEUED_BYTES_MAX
        ):
            request = queue.popleft()
            result: Any
            try:
                command = known.get(request[0]) or self.service.table.find(request[0])
                context = None
                if command.role in self._roles and command.words_min <= len(request) <= command.words_max:
                    if command.run is not None and handle_run(self, command, request, out, writes):
                        continue
                    result = command.handler(self, request)
                else:
                    command, result, context = self._handle_other(command, request)
                kind = type(result)
                if kind is bytes:
                    if len(result) < resp.LARGE_BYTES or command.writes:
                        data = b"$%d\r\n%b\r\n" % (len(result), result)
                    else:
                        self.service.crowd.make_room(len(result))
                        out += (b"$%d\r\n" % len(result), result)
                        data, size = resp.LINE_END, size + len(result)
                elif kind is resp.Encoded:
                    data = result
                elif kind is CoroutineType:
                    self.finish(out, writes)
                    self._start(command, result, context or self._new_context())
                    continue
                else:
                    data = self._encode(result)
                if command.writes:
                    writes.append(len(out))
                out.append(data)
                if len(data) > _SMALL_BYTES:
                    size += len(data)
                if size > OUTPUT_PAUSE_BYTES:
                    self.finish(out, writes)
                    size = 0
            except Exception as error:  # noqa: BLE001 - a defect must not take the connection down
                out.append(self._refused(request, error))
        if self._reader.fault is not None and not queue and not self._exclusive and not self._closing:
            out.append(self._error(self._reader.fault))
            self._closing = True
        if out or self._batches or self._closing or self._ended:
            self.finish(out, writes)
        if not queue:
            self._queued_bytes = 0
        if queue or not self._reading or not self._writable:
            self._set_reading()

    def _handle_other(self, command: Command, request: list[bytes]) -> tuple[Command, Any, Context | None]:
        """What is not simply allowed: in a context, intercepted, without the role, of a wrong arity."""
        if self._interceptor is not None:
            return command, self._interceptor(self, command, request), None
        if command.name == "WITH":
            return self._handle_with(request)
        self.check(command, request)
        return command, command.handler(self, request), None

    def check(self, command: Command, request: list[bytes]) -> None:
        """Raise NotAuthenticated, Denied or BadArgument unless the connection may send the request."""
        if command.role not in self._allowed:
            raise not_allowed(command, self.identity)
        command.check_arity(request)

    def _handle_with(self, request: list[bytes]) -> tuple[Command, Any, Context | None]:
        """`WITH context COMMAND ...`: run the command in that context, as its identity."""
        command, inner, context = unwrap(request, self.service.table, self.identity)
        with contexts.using(context):
            return command, command.handler(self, inner), context

    def _encode(self, result: object) -> bytes:
        """The answer for a result. Raises Busy if all connections hold too much already."""
        data = resp.encode(result, self.protocol)
        self.service.crowd.make_room(len(data))
        return data

    def _refused(self, request: list[bytes], error: Exception) -> bytes:
        """The answer to a request that failed."""
        if self._interceptor is not None:
            self._interceptor.refused()
        return self._error(error if isinstance(error, VirgoError) else defect(request, error))

    def _new_context(self) -> Context:
        return Context(id=contexts.new_id(), identity=self.identity)

    def _start(self, command: Command, work: Coroutine[Any, Any, Any], context: Context) -> None:
        """Await the work in a task of its own; its answer keeps its place in the order."""
        slot = self._answers.promise()
        if not command.concurrent:
            self._serial = True
        with contexts.using(context):
            self._spawn(self._await(command, work, context, slot))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.service.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._exclusive = self._serial or len(self._tasks) >= CONCURRENT_CALLS_MAX

    async def _await(
        self, command: Command, work: Coroutine[Any, Any, Any], context: Context, slot: Slot
    ) -> None:
        try:
            async with asyncio.timeout(context.remaining_s()) as deadline:
                result = await work
            parts = resp.parts(result, self.protocol)
            self.service.crowd.make_room(sum(map(len, parts)))
            self._answers.fill(slot, parts)
        except VirgoError as error:
            self._answers.fail(slot, error)
        except TimeoutError as error:
            if deadline.expired():
                late = DeadlineExceeded(f"{command.name}: the deadline of the request has passed")
                self._answers.fail(slot, late)
            else:
                self._answers.fail(slot, defect([command.name.encode()], error))
        except asyncio.CancelledError:
            self._answers.fail(slot, Cancelled(f"{command.name} was cancelled"))
            if self._transport is None:
                raise
        except Exception as error:  # noqa: BLE001 - a defect must not take the connection down
            self._answers.fail(slot, defect([command.name.encode()], error))
        if not command.concurrent:
            self._serial = False
        self._exclusive = self._serial  # this one has ended, so there is room for another
        if self._ended:
            self._limit_tail()
        self._flush()
        # In the connection's own context: this task's is that of the request that has just ended.
        self.service.loop.call_soon(self._drain, context=self._clean)

    # --- answers ------------------------------------------------------------------------------

    def finish(self, out: list[bytes], writes: list[int]) -> None:
        """Close the batches, then send the answers of the chunk so far."""
        pending = self._batches.close(out, writes) if self._batches else None
        if pending is not None:
            self._spawn(self._hold(pending, self._answers.promise(), out.copy(), writes.copy()))
            out.clear()
            writes.clear()
        elif out:
            self._answers.add(out.copy(), self._transport)
            out.clear()
            writes.clear()
        if self._closing or self._ended:
            self._flush()

    async def _hold(self, pending: Awaitable[None], slot: Slot, out: list[bytes], writes: list[int]) -> None:
        """Send answers once what they acknowledge is wherever it has to be."""
        try:
            await pending
        except VirgoError as error:
            fail(out, writes, self._error(error))
        self._answers.fill(slot, out)
        self._exclusive = self._serial
        self._flush()
        self.service.loop.call_soon(self._drain, context=self._clean)

    def _flush(self) -> None:
        """Send the answers that are there, in order; close if that was asked and all is sent."""
        if self._transport is None:
            return
        self._answers.flush(self._transport)
        over = self._closing or (self._ended and not self.queue and not self._exclusive)
        if over and not self._answers:
            self._leave(self._transport)

    def _leave(self, transport: asyncio.Transport) -> None:
        """Close. After a fault the client may still be sending: it gets time to read the reason first.

        Closing with unread bytes would reset the connection, and the answer with it.
        """
        if self._reader.fault is None or self._ended or not transport.can_write_eof():
            transport.close()
        elif not self._lingers:
            self._lingers = True
            transport.write_eof()
            self.service.loop.call_later(EOF_GRACE_S, self.abort)

    def _set_reading(self) -> None:
        """Read from the client only while its requests find room."""
        if self._transport is None or self._transport.is_closing():
            return
        crammed = bool(self.queue) and self._queued_bytes >= QUEUED_BYTES_MAX
        reading = self._writable and not crammed and len(self.queue) < PIPELINE_DEPTH_MAX
        if reading is not self._reading:
            self._reading = reading
            (self._transport.resume_reading if reading else self._transport.pause_reading)()
