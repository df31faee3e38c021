"""Listeners: a Unix socket or a TCP port, each serving one table of commands.

A `Service` is what is served; `Listener` is where. Connections beyond CONNECTIONS_MAX are refused with an
error; one that does not log in within LOGIN_S, or is idle for IDLE_S, is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import ssl
from pathlib import Path

from virgo.context import NOBODY, Identity
from virgo.errors import Busy, NotRunning, PortTaken, VirgoError
from virgo.limits import CONNECTIONS_MAX, IDLE_S, LOGIN_S
from virgo.wire.address import Address
from virgo.wire.commands import CommandTable
from virgo.wire.crowd import Crowd
from virgo.wire.door import Door
from virgo.wire.peer import PeerAuthenticator
from virgo.wire.session import Session
from virgo.wire.speech import RESP, Speech
from virgo.wire.wakeful import Wakeful

_SWEEP_S = 1.0
_BACKLOG = 1024
_numbers = itertools.count(1)


class Service:
    """What a listener serves, and to whom it is connected.

    Args:
        table: the commands.
        authenticator: says who asks.
        crowd: what its connections are counted among; those of all listeners of a node.
        speech: how requests are read and errors are written.
        stranger: who comes by plain TCP, until a login.
    """

    def __init__(
        self,
        table: CommandTable,
        authenticator: PeerAuthenticator,
        *,
        crowd: Crowd | None = None,
        speech: Speech = RESP,
        stranger: Identity = NOBODY,
    ) -> None:
        self.table = table
        self.crowd = crowd or Crowd()
        self.authenticator = authenticator
        self.speech = speech
        self.stranger = stranger
        self.loop = asyncio.get_running_loop()
        self.sessions: set[Session] = set()
        self.wakeful = Wakeful(self.loop)

    def __repr__(self) -> str:
        return f"<Service {len(self.table)} commands, {len(self.sessions)} connections>"

    def session(self) -> Session:
        """A protocol for a new connection."""
        return Session(self, next(_numbers))

    def admit(self, session: Session) -> VirgoError | None:
        """Take note of a connection, or say why it is refused."""
        if len(self.sessions) >= CONNECTIONS_MAX:
            return Busy(f"{CONNECTIONS_MAX} connections are open here")
        if session.remote:
            if self.crowd.full():
                return Busy(f"{self.crowd.connections_max} connections have come to this node by TCP")
            self.crowd.remote += 1
        self.sessions.add(session)
        self.crowd.sessions.add(session)
        return None

    def forget(self, session: Session) -> None:
        """The connection is gone."""
        if session in self.sessions:
            self.sessions.remove(session)
            self.crowd.sessions.discard(session)
            self.crowd.remote -= session.remote

    async def sweep(self) -> None:
        """Close connections that never log in or have long been idle; runs until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = self.loop.time()
            for session in list(self.sessions):
                strange = session.identity == NOBODY and now - session.opened > LOGIN_S
                idle = now - session.last_seen > IDLE_S and not session.working
                if strange or idle:
                    session.abort()


class Listener:
    """A listening place; `async with` serves until the block ends."""

    def __init__(self, service: Service, address: Address, *, tls: ssl.SSLContext | None = None) -> None:
        self.service = service
        self.address = address
        self._tls = tls
        self._bound: socket.socket | None = None  # taken, and not served yet
        self._server: asyncio.Server | None = None
        self._door: Door | None = None
        self._sweeper: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Listener {self.address} {'open' if self._server or self._door else 'closed'}>"

    async def __aenter__(self) -> Listener:
        await self.open()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    def bind(self) -> None:
        """Take the place without serving yet: whoever connects is refused. Raises as `open`."""
        if self._bound is None:
            path = self.address.path
            self._bound = _bind_unix(path) if path else _bind_tcp(self.address)

    async def open(self) -> None:
        """Start to listen. Raises PortTaken (without naming the holder) or NotRunning."""
        self.bind()
        loop, session, listening = self.service.loop, self.service.session, self._bound
        assert listening is not None
        try:
            if self.address.path:
                self._server = await loop.create_unix_server(session, sock=listening, backlog=_BACKLOG)
            elif self._tls is None:
                self._server = await loop.create_server(session, sock=listening, backlog=_BACKLOG)
            else:
                listening.listen(_BACKLOG)
                self._door = Door(listening, self._tls, self.service.crowd, session)
                self._door.open()
        except OSError as error:
            raise _taken(self.address, error) from error
        self._bound = None
        self._sweeper = loop.create_task(self.service.sweep(), name=f"sweep {self.address}")

    def _abort_all(self) -> None:
        for session in list(self.service.sessions):
            session.abort()

    async def close(self) -> None:
        """Stop listening and close all connections of the service."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._bound is not None:
            self._bound.close()
            self._bound = None
        if self._door is not None:
            self._door.close()
            self._door = None
            self._abort_all()
        if self._server is not None:
            self._server.close()
            self._abort_all()
            self._server = None
            if self.address.path:
                os.unlink(self.address.path)  # noqa: PTH108 - asyncio has no unlink, and this one is instant


def _bind_unix(path: str) -> socket.socket:
    """Listen on the path; a socket left behind by a dead process is taken over."""
    if len(os.fsencode(path)) > 107:
        raise NotRunning(
            f"the socket path {path} is longer than the kernel's 107 bytes", hint="Use a shorter VIRGO_HOME."
        )
    with (
        socket.socket(socket.AF_UNIX) as probe,
        contextlib.suppress(FileNotFoundError, ConnectionRefusedError),
    ):
        probe.connect(path)
        raise PortTaken(f"another node serves {path}", hint="`virgo status` shows it.")
    Path(path).unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    Path(path).chmod(0o666)  # peer credentials decide, not the file's mode
    listening.setblocking(False)
    return listening


def _bind_tcp(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address.host, address.port))
    except OSError as error:
        listening.close()
        raise _taken(address, error) from error
    listening.setblocking(False)
    return listening


def _taken(address: Address, error: OSError) -> PortTaken:
    return PortTaken(
        f"cannot listen on {address}: {error.strerror}",
        hint=f"Another process holds it (`ss -ltnp`), or {address.host} is not of this machine.",
    )
