"""Who is at the other end of a transport: Unix peer credentials or a TLS certificate."""

from __future__ import annotations

import os
import select
import socket
import struct
from typing import TYPE_CHECKING, Protocol

from virgo.context import NOBODY, Identity

if TYPE_CHECKING:
    import asyncio

_CREDENTIALS = struct.Struct("3i")


class PeerAuthenticator(Protocol):
    """Turns what a connection shows into an identity."""

    def unix(self, uid: int, gid: int, pid: int) -> Identity:
        """The identity of a process on this machine."""

    def token(self, user: str, token: str) -> Identity:
        """The identity that a token gives. Raises WrongToken."""

    def certificate(self, common_name: str, organizational_units: list[str]) -> Identity:
        """The identity that a verified client certificate gives."""


def identify(
    transport: asyncio.Transport, authenticator: PeerAuthenticator, stranger: Identity = NOBODY
) -> tuple[str, Identity]:
    """The peer's name for people, and its identity: `stranger` for plain TCP, which shows nothing."""
    tls = transport.get_extra_info("ssl_object")
    if tls is not None:
        certificate = tls.getpeercert() or {}
        fields = [field for group in certificate.get("subject", ()) for field in group]
        names = [value for key, value in fields if key == "commonName"]
        units = [value for key, value in fields if key == "organizationalUnitName"]
        return _place(transport), authenticator.certificate(names[0] if names else "", units)
    plain = transport.get_extra_info("socket")
    if plain is not None and plain.family == socket.AF_UNIX:
        pid, uid, gid = credentials(plain.fileno())
        return f"unix pid {pid}", authenticator.unix(uid, gid, pid)
    return _place(transport), stranger


def credentials(descriptor: int) -> tuple[int, int, int]:
    """Process, user and group at the other end of a Unix socket: who connected to it, or who listens.

    The process is 0 if it lives in a namespace that cannot be seen from here.
    """
    with socket.socket(fileno=os.dup(descriptor)) as own:
        data = own.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(data)
    return pid, uid, gid


def _place(transport: asyncio.Transport) -> str:
    name = transport.get_extra_info("peername")
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "unknown"


def hung_up(transport: asyncio.Transport) -> bool:
    """Whether the peer closed both directions, as far as the kernel can tell."""
    plain = transport.get_extra_info("socket")
    if plain is None or plain.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(plain.fileno(), 0)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))
