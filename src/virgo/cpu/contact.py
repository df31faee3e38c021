"""A node of this machine, as a client who leases workers of it knows it."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import hiredis
import msgspec

from virgo import context as contexts
from virgo.context import Context, Identity
from virgo.cpu import messages
from virgo.cpu.lane import Lane
from virgo.cpu.messages import Options
from virgo.cpu.slate import Slate
from virgo.errors import Cancelled, DeadlineExceeded, Denied, NodeLost, NotLoaded, VirgoError
from virgo.limits import CALL_TERMINATE_S, LIFE_ANSWER_S, LIFE_LOOK_S, REQUEST_DEADLINE_S
from virgo.wire.address import Address
from virgo.wire.call import Argument, Call
from virgo.wire.client import Client
from virgo.wire.connection import Connection
from virgo.wire.pool import failure, not_connected, pack

T = TypeVar("T")
_WELCOME_BYTES = 64 * 1024


class Contact:
    """A node from which workers are leased.

    Args:
        client: connections to it.
        identity: for whom workers are leased, None for who the connections are.
        own: whether the connections are of this contact alone, to be closed with it.

    Attributes:
        machine: numbers of the nodes of its machine when we met it; none before.
    """

    def __init__(self, client: Client, identity: Identity | None, *, own: bool = False) -> None:
        self._client = client
        self._own = own
        self._identity = identity
        self.machine: frozenset[int] = frozenset()
        self._key = os.urandom(16).hex()
        self._control: Connection | None = None
        self._meeting = threading.Lock()

    def __repr__(self) -> str:
        return f"<Contact {self._client.address} {'open' if self._control else 'closed'}>"

    @property
    def address(self) -> Address:
        """Where the node is."""
        return self._client.address

    @property
    def known(self) -> bool:
        """Whether the node knows us; if not, `introduce` comes first."""
        return self._control is not None and self._control.alive()

    def introduce(self) -> None:
        """Let the node know us; it takes seconds if that is stopped. Raises NotRunning, NodeLost, Busy."""
        with self._meeting:
            if not self.known:
                self._introduce()

    def _introduce(self) -> None:
        if self._control is not None:  # the node has been started anew
            self._control.close()
            self._control = None
        control = Connection(self.address)
        try:
            control.send(self._packed("CPU.CREW", self._key), LIFE_ANSWER_S)
            reply = control.receive(LIFE_ANSWER_S)
            refusal = failure(reply)
            if refusal is not None:
                raise refusal
            self.machine = frozenset(reply)
        except BaseException as error:
            control.close()
            if isinstance(error, DeadlineExceeded):
                raise NodeLost(f"the node at {self.address} does not answer") from error
            raise
        self._control = control

    def _on_behalf(self) -> AbstractContextManager[None]:
        """A context without the deadline of the call that asks: the lease will be for others too."""
        if self._identity is None:
            return nullcontext()
        asking = contexts.current()
        return contexts.using(Context(id="" if asking is None else asking.id, identity=self._identity))

    def _packed(self, *request: Argument) -> bytes:
        with self._on_behalf():
            return pack(request)

    def _run(self, call: Call[T]) -> T:
        with self._on_behalf():
            return self._client.run(call)

    def hire(self, *, node: str, extra: bool, near: bool) -> Hire:
        """Ask for a worker; the answer comes on the connection. Raises NotRunning, NodeLost, Busy."""
        options = Options(label="a call", node=node, extra=extra, at_hand=near, crew=self._key.encode())
        connection: socket.socket | None = None
        try:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(LIFE_LOOK_S)
            connection.connect(self.address.path)
            connection.sendall(self._packed("CPU.LEASE", messages.encode_options(options)))
            connection.setblocking(False)
        except OSError as error:
            if connection is not None:
                connection.close()
            raise not_connected(self.address, error) from error
        return Hire(self, connection, extra=extra)

    def ping(self) -> None:
        """Return if the node lives. Raises NodeLost, NotRunning."""
        self._client.execute("PING")

    def stop(self, lease: int) -> None:
        """Stop a leased worker; returns when it is dead, as a worker of a dead node is."""
        try:
            self._check_there()
            self._run(Call(("CPU.LEASE.STOP", self._key, lease), bool, CALL_TERMINATE_S + REQUEST_DEADLINE_S))
        except VirgoError:  # it is dead with its node, or nobody can tell
            return

    def end(self, lease: int) -> bytes:
        """How a leased worker ended, as an outcome. Raises VirgoError; NodeLost if it ended with its node."""
        self._check_there()
        try:
            return self._run(Call(("CPU.LEASE.END", self._key, lease), bytes))
        except Denied:  # by the one that was started in its place
            self._check_there()
            raise
        except (NotLoaded, Cancelled) as error:
            raise NodeLost(f"the node at {self.address} is stopping") from error

    def _check_there(self) -> None:
        """Raise NodeLost if the node is not the one any more from which workers were leased."""
        if not self.known:
            raise NodeLost(f"the node at {self.address} has ended")

    def close(self) -> None:
        """Give everything back that was leased."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._own:
            self._client.close()


class NotHired(NodeLost):
    """Whoever should have greeted us is gone."""


class Hire:
    """A worker that is asked for.

    Attributes:
        contact: whom.
        extra: whether it must not wait for a worker that is free, see `messages.Options`.
        patience_s: for how long to wait before it is asked for otherwise.
        since, asked: when it was asked for, and when it was looked whether the node lives, in monotonic time.
    """

    def __init__(self, contact: Contact, connection: socket.socket, *, extra: bool = False) -> None:
        self.contact = contact
        self.extra = extra
        self.patience_s = math.inf
        self.since = self.asked = time.monotonic()
        self._connection = connection
        self._reader = hiredis.Reader()
        self._descriptors: list[int] = []

    def __repr__(self) -> str:
        return f"<Hire of {self.contact!r}>"

    def fileno(self) -> int:
        """Of the connection."""
        return self._connection.fileno()

    def answer(self) -> Lane | tuple[str, str, int] | None:
        """What has come: a worker; or node, socket and places of another one that has some; None if nothing.

        Unless it is a worker, whose connection this is, it is to be closed then.

        Raises:
            NotHired: it was closed without an answer: the worker has died, or the node.
            VirgoError: there is none to be had.
        """
        try:
            data, descriptors, _, _ = socket.recv_fds(self._connection, _WELCOME_BYTES, 1)
        except BlockingIOError:
            return None
        except OSError:
            data, descriptors = b"", []
        self._descriptors += descriptors
        self._reader.feed(data)
        answer = self._reader.gets() if data else None
        if answer is False:
            return None
        if isinstance(answer, bytes) and self._descriptors:
            try:
                lease, node, _pid = msgspec.msgpack.decode(answer)
                lane = Lane(self._connection, Slate(self._descriptors[0]), lease, node)
            except (OSError, ValueError, msgspec.DecodeError) as error:
                raise self._not_hired() from error
            os.close(self._descriptors.pop())
            return lane
        if isinstance(answer, list):
            name, path, places = answer
            return name.decode(), path.decode(), int(places)
        raise failure(answer) or self._not_hired()

    def _not_hired(self) -> NotHired:
        return NotHired(f"{self.contact.address} closed the connection before it had a worker for us")

    def close(self) -> None:
        """Want it no more."""
        self._connection.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
