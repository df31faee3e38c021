"""A worker that is leased: it gets calls straight from a client and answers them straight.

The client's connection to its node has been handed to this process, with a slate (see `slate`). On it the
client sends parcels, `[head, function, arguments...]`: calls of one function, numbered from 0 over the whole
lease. The worker answers each call, in order, with one bulk string that holds its outcome. A call that was
taken back before it began is answered with `TAKEN`.

The lease ends when the client closes the connection, or when the node wants it back: then the worker finishes
the call that it is at, says on the slate that it lets go, and closes. What it has received and not begun is
the client's again.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from array import array
from collections import deque
from typing import TYPE_CHECKING, Final

import hiredis
import msgspec

from virgo import context as contexts
from virgo.context import Context
from virgo.cpu import messages, slate
from virgo.cpu.apart import APART, GIFT, Apart, Received
from virgo.cpu.exports import exported
from virgo.cpu.messages import Failure, Parcel, Sent, Terms, failed
from virgo.cpu.outcomes import not_loaded, outcome_of
from virgo.cpu.segments import Segment, drop_spare, spare, take_spare
from virgo.cpu.slate import (
    BEGUN,
    LET_GO,
    RESTING,
    SINCE_NS,
    TAKEN_FROM,
    TAKEN_TO,
    UNSENT,
    UNSENT_FIRST,
    WANTED,
)
from virgo.kernel import barrier
from virgo.limits import AWAKE_S, LEASE_OUTCOMES_BYTES, LEASE_OUTCOMES_S, SOON_S
from virgo.wire.wakeful import ALONE

if TYPE_CHECKING:
    from collections.abc import Callable

    from virgo.cpu.worker import Worker

_RECEIVE_BYTES: Final = 256 * 1024
_GIFT: Final = b"$%d\r\n%b\r\n" % (len(GIFT), GIFT)
_REST_MS: Final = 1000
_EXTRA_BYTES: Final = socket.CMSG_SPACE(4)
_FLUSH_BYTES: Final = LEASE_OUTCOMES_BYTES // 2
_FLUSH_NS: Final = int(LEASE_OUTCOMES_S * 1e9)


class Leased:
    """One lease, as its worker serves it.

    Args:
        worker: who runs the calls.
        connection: to the client.
        page: the slate's descriptor.
        orders: the worker's connection to its node, on which a word comes when the lease is wanted back.
        terms: whose it is.
    """

    def __init__(
        self, worker: Worker, connection: socket.socket, page: int, orders: socket.socket, terms: Terms
    ) -> None:
        self._worker = worker
        self._connection = connection
        self._slate = slate.Slate(page)
        self._words = self._slate.words
        self._terms = terms
        self._next = 0  # number of the next call
        self._written = worker.output_end()
        self._laid = self._sent = 0  # bytes of outcomes laid down, and of these sent
        self._label = ""
        self._gone = False  # the client is
        self._fills = False  # results fill segments
        self._descriptors: deque[int] = deque()  # that have come, for calls to come
        self._soon = False
        self._parcel = Parcel("pickle", "")
        self._deadline: float | None = None
        self._context: Context | None = None
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._poll.register(orders, select.POLLIN)
        self._orders = orders
        barrier.register()  # so that the client can run one here, see `slate`
        welcome = msgspec.msgpack.encode([terms.lease, terms.node, os.getpid()])
        socket.send_fds(connection, [b"$%d\r\n%b\r\n" % (len(welcome), welcome)], [page])
        os.close(page)

    def __repr__(self) -> str:
        return f"<Leased {self._terms.lease} {self._slate!r}>"

    def serve(self) -> None:
        """Run calls until the lease ends."""
        reader = hiredis.Reader()
        contexts.adopt(self._current)
        try:
            while data := self._receive():
                reader.feed(data)
                while (parcel := reader.gets()) is not False:
                    self._run(parcel)
                    if self._words[WANTED] or self._gone:
                        break
                self._flush()
        except (hiredis.ProtocolError, msgspec.DecodeError, TypeError, ValueError, IndexError, OSError):
            self._gone = True  # it speaks nonsense
        finally:
            contexts.adopt(None)
            if not self._worker.forked:
                self._words[LET_GO] = 1
                self._connection.close()
                for descriptor in self._descriptors:
                    os.close(descriptor)

    def _current(self) -> Context:
        """The context of the call that runs, made when somebody asks for it."""
        if self._context is None:
            self._context = Context(
                id=self._terms.task(self._next),
                cause=self._parcel.cause,
                deadline=self._deadline,
                identity=self._terms.identity,
            )
        return self._context

    # --- in -----------------------------------------------------------------------------------

    def _receive(self) -> bytes:
        """What the client has sent; b"" if the lease is over."""
        words = self._words
        began = time.monotonic()
        try:
            while self._soon:
                if words[WANTED]:
                    return b""
                try:
                    return self._read()
                except BlockingIOError:
                    if time.monotonic() > began + AWAKE_S:
                        break
            words[SINCE_NS] = time.monotonic_ns()
            words[RESTING] = 1
            ready = dict(self._poll.poll(_REST_MS))
            if not ready:
                drop_spare()
                ready = dict(self._poll.poll())
            words[RESTING] = 0
            if words[WANTED] or self._orders.fileno() in ready:
                return b""
            self._soon = time.monotonic() - began < SOON_S and not ALONE
            return self._read()
        except OSError:  # the client has died
            return b""

    def _read(self) -> bytes:
        """What there is on the connection; descriptors are kept until the call that they belong to."""
        data, extra, _, _ = self._connection.recvmsg(_RECEIVE_BYTES, _EXTRA_BYTES, socket.MSG_DONTWAIT)
        for _level, _kind, payload in extra:
            self._descriptors += array("i", payload)
        return data

    # --- the calls ----------------------------------------------------------------------------

    def _run(self, parcel: list[bytes]) -> None:
        """Run the calls of a parcel, as far as nobody takes them back or wants the lease."""
        head = messages.decode_parcel(parcel[0])
        self._parcel = head
        self._deadline = None if head.left_ms is None else time.monotonic() + head.left_ms / 1000
        if head.label != self._label:
            self._label = head.label
            self._slate.show(head.label)
        run = self._runner(head, parcel[1])
        words, worker, clock = self._words, self._worker, time.monotonic_ns
        words[SINCE_NS] = now = clock()
        flush_at_ns = now + _FLUSH_NS
        for position in range(2, len(parcel)):
            number = self._next
            arguments: bytes | Received | OSError = parcel[position]
            if parcel[position][:1] == APART and head.form == "pickle":
                arguments = self._received(parcel[position])
            words[BEGUN] = number + 1
            # Looked at after BEGUN shows it: either we see that it was taken, or who takes it sees BEGUN.
            if words[TAKEN_FROM] <= number < words[TAKEN_TO]:
                outcome: Sent = messages.TAKEN
            else:
                self._context = None
                outcome = run(arguments)
                if worker.forked:
                    worker.leave()
            apart = isinstance(arguments, Received)
            parcel[position] = b""  # large ones are not kept while the others run
            del arguments
            if worker.output_end() != self._written:  # before the outcome: who has that may ask for it
                self._say_written()
            self._lay(outcome)
            if apart:
                self._give_back(ran=len(outcome) > 1)
                del outcome
            self._next = number + 1
            now = clock()
            if now > flush_at_ns or self._laid > _FLUSH_BYTES:
                self._flush()
                flush_at_ns = now + _FLUSH_NS
                if words[WANTED] or self._gone:
                    return

    def _received(self, data: bytes) -> Received | OSError:
        """Arguments whose buffers lie apart, or why they cannot be had here."""
        try:
            return Received.apart(data, self._descriptors.popleft(), kept=True)
        except OSError as error:
            return error

    def _runner(self, head: Parcel, sent: bytes) -> Callable[[bytes | Received | OSError], Sent]:
        """What turns the arguments of one call of the parcel into its outcome."""
        worker, node = self._worker, self._terms.node
        if head.form == "pickle" and not self._terms.trusted:
            refusal = failed(Failure(f"{head.label} needs the role exec", cause="denied", node=node))
            return lambda _arguments: refusal
        if not head.digest and head.name not in exported():
            return lambda _arguments: messages.NOT_EXPORTED
        try:
            function = worker.function_of(head.name, head.digest, sent)
        except BaseException as error:  # noqa: BLE001 - unpickling runs code: anything may come
            broken = not_loaded(head, error, node=node)
            return lambda _arguments: broken
        if function is None:
            return lambda _arguments: messages.UNKNOWN
        found = function

        def run(arguments: bytes | Received | OSError) -> Sent:
            if isinstance(arguments, OSError):
                return not_loaded(head, arguments, node=node)
            came = arguments.mapping if isinstance(arguments, Received) else None
            return outcome_of(head, found, [arguments], node=node, segments=True, came=came)

        return run

    # --- out ----------------------------------------------------------------------------------

    def _lay(self, outcome: Sent) -> None:
        """Lay an outcome down; send it at once if it is too long for that, or a descriptor goes with it."""
        if isinstance(outcome, Apart):
            if outcome.lent:
                self._lend(outcome)
            else:
                self._fills = True
            self._flush()
            frame = b"$%d\r\n%b\r\n" % (len(outcome), outcome.data)
            self._send(memoryview(frame), give_up=False, segment=outcome.segment)
            self._words[UNSENT_FIRST] = self._next + 1
            return
        size = len(outcome)
        if size < _FLUSH_BYTES:
            frame = b"$%d\r\n%b\r\n" % (size, outcome)
            end = self._laid + len(frame)
            if end <= LEASE_OUTCOMES_BYTES:
                self._slate.outcomes[self._laid : end] = frame
                self._laid = end
                self._words[UNSENT] = end
                return
            self._flush()
            self._lay(outcome)
            return
        self._flush()
        for part in (b"$%d\r\n" % size, outcome, b"\r\n"):
            self._send(memoryview(part), give_up=False)
        self._words[UNSENT_FIRST] = self._next + 1

    def _say_written(self) -> None:
        """Tell the node which part of the output is of the call that has ended; nobody waits for it."""
        start, self._written = self._written, self._worker.output_end()
        what = messages.encode_order([self._next, self._parcel.label, start, self._written])
        with contextlib.suppress(OSError):  # the node is stopped, or gone
            said = b"*2\r\n$1\r\n%b\r\n$%d\r\n%b\r\n" % (messages.WROTE, len(what), what)
            self._orders.send(said, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _lend(self, outcome: Apart) -> None:
        """Have a segment sent back in which a result lies; if it is used here, not for the client to fill."""
        free = take_spare()
        for segment in free:
            if segment is not outcome.segment:
                spare(segment)
        if outcome.segment not in free:
            outcome.lend()
            outcome.segment.lent = self._terms.lease

    def _give_back(self, *, ran: bool) -> None:
        """Give segments back that came with calls, unless they are still used, or results fill them again.

        If the call was not run its client sends the very segment again, so it is not free.
        """
        free = take_spare() if ran else []
        kept = next((one for one in free if not one.lent), None) if self._fills else None
        for segment in free:
            # One that another client may have mapped is no use any more.
            if segment is not kept and segment.lent in (0, self._terms.lease):
                self._flush()
                self._send(memoryview(_GIFT), give_up=False, segment=segment)
        if kept is not None:
            spare(kept)

    def _flush(self) -> None:
        """Send what is laid down; what cannot be sent stays there for the client to find."""
        if self._laid:
            self._sent += self._send(self._slate.outcomes[self._sent : self._laid], give_up=True)
            if self._sent == self._laid:
                self._sent = self._laid = 0
                self._words[UNSENT] = 0
                self._words[UNSENT_FIRST] = self._next

    def _send(self, data: memoryview, *, give_up: bool, segment: Segment | None = None) -> int:
        """How many bytes could be sent: all, unless the client is gone.

        To `give_up`: or unless the node wants the lease while the client does not read.
        """
        sent = 0
        while sent < len(data) and not self._gone:
            try:
                if segment is not None and not sent:
                    sent = socket.send_fds(self._connection, [data], [segment.descriptor])
                else:
                    sent += self._connection.send(data[sent:], socket.MSG_DONTWAIT)
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._connection, select.POLLOUT)
                if give_up:
                    poll.register(self._orders, select.POLLIN)
                poll.poll()
                if give_up and self._words[WANTED]:
                    break
            except OSError:
                self._gone = True
        return sent
