"""One blocking connection to a node: requests out, replies in, each within its time.

A connection whose deadline passed is closed, since its next answer would be another's. While the node is
silent the connection asks its `Watch`, if it has one, whether to wait on.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import hiredis

from virgo.errors import DeadlineExceeded, NodeLost, NotRunning
from virgo.limits import AWAKE_S, CONNECT_S, LIFE_ANSWER_S, LIFE_LOOK_S, LIFE_QUIET_S, SOON_S
from virgo.wire.address import Address
from virgo.wire.peer import credentials
from virgo.wire.pool import failure, not_connected, pack_plain
from virgo.wire.wakeful import ALONE

S = TypeVar("S")
R = TypeVar("R")
_RECEIVE_BYTES = 256 * 1024
_LOOK_BYTES = 64 * 1024
# Sent at once: of more, TLS would not tell that the node takes it, but only when it has taken all.
_PIECE_BYTES = 64 * 1024
_SEND, _RECEIVE = socket.SO_SNDTIMEO, socket.SO_RCVTIMEO
_IP_LOCAL_PORT_RANGE = 51  # linux/in.h, from 6.3 on


class Connection:
    """One connection, for one thread at a time: `send` requests, then `receive` as many replies.

    Args:
        address: where to.
        tls: context for a `tls:` address.
        token: to log in with, or "".
        limit_s: time for all of it: connecting and login.
        place: the numeric address to connect to, if it is known.

    Attributes:
        peer_pid: the process at the other end of a Unix socket, 0 if it is not known.

    Raises:
        NotRunning: nobody answers there. WrongToken: it does not know the token.
    """

    def __init__(
        self,
        address: Address,
        *,
        tls: ssl.SSLContext | None = None,
        token: str = "",
        limit_s: float = CONNECT_S + LIFE_ANSWER_S,
        place: Place | None = None,
    ) -> None:
        self.address = address
        self.used = time.monotonic()
        self.place = place or _resolve(address)
        self._reader = hiredis.Reader()
        self._limits: dict[int, float] = {}
        self._soon = False  # whether the last reply has come soon
        self._socket = self._connect(tls, min(CONNECT_S, limit_s))
        self.peer_pid = credentials(self.fileno())[0] if address.path else 0
        if token:
            self._log_in(token, max(0.0, limit_s - (time.monotonic() - self.used)))

    def __repr__(self) -> str:
        return f"<Connection {self.address} {'closed' if self._socket.fileno() < 0 else 'open'}>"

    def _connect(self, tls: ssl.SSLContext | None, limit_s: float) -> socket.socket:
        family, place = self.place
        plain: socket.socket | None = None
        try:
            plain = socket.socket(family)
            plain.settimeout(limit_s)
            if self.address.path:
                plain.connect(place)
            else:
                _avoid_service_ports(plain)
                plain.connect(place)
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.address.tls:
                    assert tls is not None, "an address with TLS needs a context"
                    return tls.wrap_socket(plain, server_hostname=self.address.host)
        except OSError as error:
            if plain is not None:
                plain.close()
            raise not_connected(self.address, error) from error
        plain.settimeout(None)
        return plain

    def _log_in(self, token: str, limit_s: float) -> None:
        limit_s = min(limit_s, LIFE_ANSWER_S)
        try:
            self.send(pack_plain(("AUTH", token)), limit_s)
            error = failure(self.receive(limit_s))
            if error is not None:
                raise error
        except DeadlineExceeded as late:
            raise NotRunning(f"{self.address} does not answer the login within {limit_s:.2g} s") from late
        except BaseException:
            self.close()
            raise

    def _set_limit(self, option: int, seconds: float) -> None:
        """Bound each system call; by the kernel on plain sockets, which saves a poll per call."""
        limit = 0.0 if math.isinf(seconds) else max(seconds, 0.001)
        if limit == self._limits.get(option):
            return
        if self.address.tls:
            self._limits.clear()  # it has one limit for both
            self._socket.settimeout(limit or None)
        else:
            value = struct.pack("ll", int(limit), int(limit % 1 * 1_000_000))
            self._socket.setsockopt(socket.SOL_SOCKET, option, value)
        self._limits[option] = limit

    def send(self, data: bytes, timeout_s: float | None, *, watch: Watch | None = None) -> None:
        """Send packed requests; each piece of which the node takes any begins the time anew.

        Args:
            data: the requests.
            timeout_s: None for any time.
            watch: asked when the node is silent; see `Watch`.

        Raises:
            DeadlineExceeded, NodeLost: then the connection is closed.
        """
        sent, most = 0, _PIECE_BYTES if self.address.tls else len(data)
        try:
            if len(data) <= most:
                sent = self._attempt(_SEND, self._socket.send, data, timeout_s, watch)
            while sent < len(data):
                piece = memoryview(data)[sent : sent + most]
                sent += self._attempt(_SEND, self._socket.send, piece, timeout_s, watch)
        except DeadlineExceeded as late:
            raise DeadlineExceeded(f"{self.address} did not take the request in time") from late

    def receive(self, timeout_s: float | None, *, watch: Watch | None = None) -> Any:
        """The next reply, decoded; an error reply as hiredis.ReplyError. Arguments and errors as `send`.

        The time is that of the whole reply.
        """
        reply = self._reader.gets()
        if reply is not False:
            return reply
        began = time.monotonic()
        if self._soon and (reply := self._look(began + AWAKE_S)) is not False:
            return reply
        reply = self._wait(timeout_s, watch)
        self._soon = time.monotonic() - began < SOON_S and not (self.address.tls or ALONE)
        return reply

    def _look(self, until: float) -> Any:
        """The next reply if it comes by then, else False: without sleeping, see `wakeful`."""
        receive, reader = self._socket.recv, self._reader
        while True:
            try:
                data = receive(_LOOK_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if time.monotonic() > until:
                    return False
                continue
            except OSError:  # as whoever waits will find
                return False
            if not data:
                return False
            reader.feed(data)
            reply = reader.gets()
            if reply is not False or time.monotonic() > until:
                return reply

    def _wait(self, timeout_s: float | None, watch: Watch | None) -> Any:
        """The next reply, however long it takes within the time."""
        reply: Any = False
        deadline, left_s = 0.0, timeout_s
        while reply is False:
            try:
                data = self._attempt(_RECEIVE, self._socket.recv, _RECEIVE_BYTES, left_s, watch)
            except DeadlineExceeded as late:
                raise DeadlineExceeded(f"{self.address} did not answer within {timeout_s:g} s") from late
            if not data:
                self.close()
                raise NodeLost(f"{self.address} closed the connection before it answered")
            self._reader.feed(data)
            reply = self._reader.gets()
            if reply is False and timeout_s is not None:
                now = time.monotonic()
                deadline = deadline or now + timeout_s
                left_s = deadline - now
                if left_s < 0:
                    self.close()
                    raise DeadlineExceeded(f"{self.address} did not answer within {timeout_s:g} s")
        return reply

    def _attempt(
        self,
        option: int,
        action: Callable[[S], R],
        argument: S,
        timeout_s: float | None,
        watch: Watch | None,
    ) -> R:
        """Send or receive some bytes; while there are none to be had, `watch` is asked now and then."""
        now = began = time.monotonic()
        deadline = math.inf if timeout_s is None else began + timeout_s
        look_s = math.inf
        if watch is not None:
            # A kernel that has taken a part waits for the rest without a word, so it is not let wait long.
            look_s = LIFE_LOOK_S if option == _SEND else LIFE_QUIET_S
        while True:
            try:
                self._set_limit(option, min(look_s, deadline - now))
                return action(argument)
            except (TimeoutError, BlockingIOError) as error:
                now = time.monotonic()
                if now >= deadline:
                    self.close()
                    raise DeadlineExceeded from error
                if watch is not None:
                    look_s = self._ask(watch, Silence(self, began, deadline, sending=option == _SEND))
                    now = time.monotonic()
            except OSError as error:
                self.close()
                raise NodeLost(f"the connection to {self.address} broke: {error.strerror}") from error

    def _ask(self, watch: Watch, silence: Silence) -> float:
        try:
            return watch(silence)
        except BaseException:
            self.close()
            raise

    def alive(self) -> bool:
        """Whether the connection can be used: nothing unread, not closed by the node."""
        return self._socket.fileno() >= 0 and not readable(0.0, self)

    def fileno(self) -> int:
        """The socket's descriptor, -1 when closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close; what the node was still doing for this connection is cancelled there."""
        self._socket.close()


Place = tuple[socket.AddressFamily, Any]


class Silence(NamedTuple):
    """A connection on which nothing moves.

    Attributes:
        connection: that one.
        since: when its node last sent or took a byte, in monotonic time.
        deadline: when its request ends anyway, in monotonic time.
        sending: whether the node is to take bytes, rather than to send some.
    """

    connection: Connection
    since: float
    deadline: float
    sending: bool

    @property
    def over(self) -> bool:
        """Whether what is waited for has come, bytes or the end. (Of room to send nobody tells.)"""
        return not self.sending and bool(readable(0.0, self.connection))


# Told of a silence; returns after how many more seconds of it to be told again, or raises NodeLost.
Watch = Callable[[Silence], float]


def readable(timeout_s: float, *connections: Connection) -> set[int]:
    """Descriptors of those on which there is something to read, or the end, within that time."""
    poll = select.poll()
    for connection in connections:
        if connection.fileno() >= 0:  # another thread may have closed it
            poll.register(connection.fileno(), select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(max(0.0, timeout_s) * 1000)}


def _avoid_service_ports(outgoing: socket.socket) -> None:
    """Take a local port below 50000: a closed connection would hold a service's port for a minute.

    Kernels before 6.3 do not know the option, and choose any ephemeral port as ever.
    """
    low_and_high = struct.pack("I", 49_999 << 16 | 32_768)
    with contextlib.suppress(OSError):
        outgoing.setsockopt(socket.IPPROTO_IP, _IP_LOCAL_PORT_RANGE, low_and_high)


def _resolve(address: Address) -> Place:
    if address.path:
        return socket.AF_UNIX, address.path
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise NotRunning(f"the host {address.host} is not known: {error.strerror}") from error
    return found[0], found[4]
