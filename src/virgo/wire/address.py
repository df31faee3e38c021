"""Where a node listens, and how it is reached: `unix:/path`, `HOST:PORT` or `tls:HOST:PORT`."""

from __future__ import annotations

from dataclasses import dataclass

from virgo.errors import BadArgument, WrongType
from virgo.members import Member

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


@dataclass(frozen=True, slots=True)
class Address:
    """One place: a Unix socket's `path`, or `host` and `port` with or without TLS."""

    path: str = ""
    host: str = ""
    port: int = 0
    tls: bool = False

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls:' if self.tls else ''}{host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether it can be reached from this machine only."""
        return bool(self.path) or self.host in LOOPBACK or self.host.startswith("127.")


def of_member(member: Member, machine: str) -> Address | None:
    """Where a node is reached from a machine: its socket there, else any of its ports, by TLS.

    Returns:
        None if it listens to no other machine.
    """
    if member.socket and member.machine == machine:
        return Address(path=member.socket)
    port = next(iter(member.ports.values()), 0)
    return Address(host=member.address, port=port, tls=True) if member.address and port else None


def parse(text: str, *, default_port: int = 0) -> Address:
    """The address that `str(address)` gave.

    Raises:
        BadArgument: the text is no address. WrongType: it is no text.
    """
    if not isinstance(text, str):
        raise WrongType(
            f"an address is text, not {type(text).__name__}", hint="Write HOST:PORT or unix:/path."
        )
    if text.startswith("unix:"):
        return Address(path=text.removeprefix("unix:"))
    tls = text.startswith(("tls:", "tls://"))
    rest = text.removeprefix("tls:").removeprefix("//")
    host, colon, port = rest.rpartition(":")
    if not colon or host.endswith(":") or (":" in host and not host.startswith("[")):
        host, port = rest, str(default_port)
    if not host or not port.isdigit() or int(port) > 65535:
        raise BadArgument(f"{text!r} is not an address", hint="Write HOST:PORT or unix:/path.")
    return Address(host=host.strip("[]"), port=int(port), tls=tls)
