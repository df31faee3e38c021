"""The blocking client: connections, their pool, and `Client`, which runs `Call`s.

Safe for use from several threads and after a fork (a child opens its own connections). Every request has
a deadline; a connection whose deadline passed is closed, since its next answer would be another's. A
request is never sent twice: if the connection breaks after sending, the outcome is unknown and NodeLost
says so. An idle connection that the node has closed meanwhile is noticed before it is used.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import hiredis

from virgo import context as contexts
from virgo.errors import DeadlineExceeded, NodeLost, NotRunning, VirgoError, from_line
from virgo.limits import CONNECT_S, POOL_IDLE_MAX, REQUEST_DEADLINE_S
from virgo.wire.address import Address
from virgo.wire.call import Argument, Call

T = TypeVar("T")
_RECEIVE_BYTES = 256 * 1024
_IP_LOCAL_PORT_RANGE = 51  # linux/in.h, from 6.3 on
_FRESH_S = 0.25  # a connection used this recently is not checked for life before use


def failure(reply: object) -> VirgoError | None:
    """The error that a decoded reply stands for, or None."""
    return from_line(str(reply)) if isinstance(reply, hiredis.ReplyError) else None


def pack_plain(request: Sequence[Argument]) -> bytes:
    """A request on the wire, without context; text may hold surrogates for bytes that are not UTF-8."""
    try:
        packed: bytes = hiredis.pack_command(tuple(request))  # type: ignore[arg-type]
    except UnicodeEncodeError:
        encoded = [
            part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part for part in request
        ]
        packed = hiredis.pack_command(tuple(encoded))  # type: ignore[arg-type]
    return packed


def pack(request: Sequence[Argument], timeout_s: float | None = None) -> bytes:
    """A request on the wire: inside the current context if there is one or a deadline is given."""
    if contexts.current() is not None:
        limit = None if timeout_s is None or math.isinf(timeout_s) else timeout_s
        context = contexts.encode(contexts.derive(timeout_s=limit))
        request = ("WITH", context, *request)
    return pack_plain(request)


class Connection:
    """One connection, for one thread at a time: `send` requests, then `receive` as many replies."""

    def __init__(self, address: Address, *, tls: ssl.SSLContext | None = None, token: str = "") -> None:
        self.address = address
        self.used = time.monotonic()
        self._reader = hiredis.Reader()
        self._limit_s = -1.0
        self._socket = self._connect(tls)
        if token:
            try:
                self.send(pack_plain(("AUTH", token)), CONNECT_S)
                reply = self.receive(CONNECT_S)
            except BaseException:
                self.close()
                raise
            error = failure(reply)
            if error is not None:
                self.close()
                raise error

    def __repr__(self) -> str:
        return f"<Connection {self.address} {'closed' if self._socket.fileno() < 0 else 'open'}>"

    def _connect(self, tls: ssl.SSLContext | None) -> socket.socket:
        address = self.address
        plain = socket.socket(_family(address))
        plain.settimeout(CONNECT_S)
        try:
            if address.path:
                plain.connect(address.path)
            else:
                _avoid_service_ports(plain)
                plain.connect((address.host, address.port))
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if address.tls:
                    assert tls is not None, "an address with TLS needs a context"
                    return tls.wrap_socket(plain, server_hostname=address.host)
        except OSError as error:
            plain.close()
            raise NotRunning(f"nothing answers at {address}: {error.strerror or error}") from error
        plain.settimeout(None)
        return plain

    def _set_limit(self, seconds: float | None) -> None:
        """Bound each system call; by the kernel on plain sockets, which saves a poll per call."""
        limit = 0.0 if seconds is None or math.isinf(seconds) else max(seconds, 0.001)
        if limit == self._limit_s:
            return
        self._limit_s = limit
        if self.address.tls:
            self._socket.settimeout(limit or None)
        else:
            value = struct.pack("ll", int(limit), int(limit % 1 * 1_000_000))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def send(self, data: bytes, timeout_s: float | None) -> None:
        """Send packed requests. Raises NodeLost or DeadlineExceeded; then the connection is closed."""
        self._set_limit(timeout_s)
        try:
            self._socket.sendall(data)
        except (TimeoutError, BlockingIOError) as error:
            self.close()
            raise DeadlineExceeded(f"{self.address} did not take the request in time") from error
        except OSError as error:
            self.close()
            raise NodeLost(f"the connection to {self.address} broke: {error.strerror}") from error

    def receive(self, timeout_s: float | None) -> Any:
        """The next reply, decoded; an error reply as hiredis.ReplyError. Raises as `send`."""
        reply = self._reader.gets()
        deadline = None
        while reply is False:
            self._set_limit(timeout_s)
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except (TimeoutError, BlockingIOError) as error:
                self.close()
                raise DeadlineExceeded(f"{self.address} did not answer within {timeout_s:g} s") from error
            except OSError as error:
                self.close()
                raise NodeLost(f"the connection to {self.address} broke: {error.strerror}") from error
            if not data:
                self.close()
                raise NodeLost(f"{self.address} closed the connection before it answered")
            self._reader.feed(data)
            reply = self._reader.gets()
            if reply is False and timeout_s is not None and not math.isinf(timeout_s):
                now = time.monotonic()
                deadline = deadline or now + timeout_s
                timeout_s = max(0.001, deadline - now)
        return reply

    def alive(self) -> bool:
        """Whether the connection can be used: nothing unread, not closed by the node."""
        if self._socket.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        return not poll.poll(0)

    def fileno(self) -> int:
        """The socket's descriptor, -1 when closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close; what the node was still doing for this connection is cancelled there."""
        self._socket.close()


def _avoid_service_ports(outgoing: socket.socket) -> None:
    """Take a local port below 50000: a closed connection would hold a service's port for a minute.

    Kernels before 6.3 do not know the option, and choose any ephemeral port as ever.
    """
    low_and_high = struct.pack("I", 49_999 << 16 | 32_768)
    with contextlib.suppress(OSError):
        outgoing.setsockopt(socket.IPPROTO_IP, _IP_LOCAL_PORT_RANGE, low_and_high)


def _family(address: Address) -> socket.AddressFamily:
    if address.path:
        return socket.AF_UNIX
    try:
        return socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        raise NotRunning(f"the host {address.host} is not known: {error.strerror}") from error


class Client:
    """A pool of connections to one node, running `Call`s (a `Runner`).

    Args:
        address: where the node listens.
        token: for TCP without a client certificate.
        tls: context for a `tls:` address.
        timeout_s: deadline of calls that name none.
    """

    def __init__(
        self,
        address: Address,
        *,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        timeout_s: float = REQUEST_DEADLINE_S,
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._token = token
        self._tls = tls
        self._idle: list[Connection] = []
        self._mutex = threading.Lock()
        self._pid = os.getpid()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Client {self.address} {'closed' if self._closed else f'{len(self._idle)} idle'}>"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def stats(self) -> dict[str, Any]:
        """Where it leads and how many connections wait."""
        return {"address": str(self.address), "idle": len(self._idle), "closed": self._closed}

    def take(self) -> Connection:
        """A connection for the caller alone; give it back with `give`, or close it."""
        if self._closed:
            raise NotRunning("this client is closed", hint="Call virgo.connect() again.")
        if self._pid != os.getpid():
            self._idle, self._mutex, self._pid = [], threading.Lock(), os.getpid()
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            if time.monotonic() - connection.used < _FRESH_S or connection.alive():
                return connection
            connection.close()
        return Connection(self.address, tls=self._tls, token=self._token)

    def give(self, connection: Connection) -> None:
        """Give a connection back that has no reply outstanding."""
        connection.used = time.monotonic()
        if connection.fileno() >= 0:
            with self._mutex:
                if len(self._idle) < POOL_IDLE_MAX and not self._closed:
                    self._idle.append(connection)
                    return
            connection.close()

    def run(self, call: Call[T]) -> T:
        """Send, wait, decode. Raises what the node answered, NotRunning, NodeLost, DeadlineExceeded."""
        timeout_s = self._time(call)
        connection = self.take()
        try:
            connection.send(pack(call.request, timeout_s), timeout_s)
            reply = connection.receive(timeout_s)
        except BaseException:
            connection.close()
            raise
        self.give(connection)
        error = failure(reply)
        if error is not None:
            raise error
        return call.decode(reply)

    def run_many(self, calls: list[Call[T]]) -> list[T | Exception]:
        """Send all on one connection at once; failures take their place in the list."""
        if not calls:
            return []
        timeout_s = max(self._time(call) or math.inf for call in calls)
        connection = self.take()
        try:
            sender = _start_sender(connection, [pack(call.request, timeout_s) for call in calls], timeout_s)
            replies = [connection.receive(timeout_s) for _ in calls]
            sender()
        except BaseException:
            connection.close()
            raise
        self.give(connection)
        return [failure(reply) or call.decode(reply) for call, reply in zip(calls, replies, strict=True)]

    def execute(self, *request: Argument, timeout_s: float | None = None) -> Any:
        """Run a command and return its reply as it is (bytes, int, list, None)."""
        return self.run(Call(request, _as_is, timeout_s))

    def close(self) -> None:
        """Close all idle connections; later calls raise NotRunning."""
        self._closed = True
        with self._mutex:
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def _time(self, call: Call[Any]) -> float | None:
        timeout_s = self.timeout_s if call.timeout_s is None else call.timeout_s
        context = contexts.current()
        if context is not None and context.deadline is not None:
            context.check(str(call.request[0]))
            timeout_s = min(timeout_s, context.deadline - time.monotonic())
        return None if math.isinf(timeout_s) else timeout_s


def _as_is(reply: Any) -> Any:
    return reply


_SMALL_BYTES = 64 * 1024


def _start_sender(connection: Connection, packed: list[bytes], timeout_s: float | None) -> Callable[[], None]:
    """Send at once if it fits the socket's buffers, else from a thread, so that neither side waits."""
    data = b"".join(packed)
    if len(data) <= _SMALL_BYTES:
        connection.send(data, timeout_s)
        return lambda: None
    thread = threading.Thread(target=connection.send, args=(data, timeout_s), daemon=True)
    thread.start()
    return thread.join
