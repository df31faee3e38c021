"""TCP ports: who holds one, and which the kernel hands out by itself.

Two of the node's ports, 50000 and 60000, lie in the range from which Linux takes the local ports of
outgoing connections, so any browser may sit on them for a while. `port_taken` builds the error that says
who does, and what to do about it. Nothing here binds or changes a setting.
"""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import psutil

from virgo.errors import PortTaken
from virgo.members import PORTS

_SETTINGS = Path("/proc/sys/net/ipv4")
_CLOSED = "a connection that was just closed"
_UNSEEN = "another process (its owner is not visible)"


def holder(port: int) -> str:
    """The process that holds a TCP port, as `redis-server (pid 123)`; a listener before a connection."""
    found = [
        entry for entry in psutil.net_connections(kind="tcp") if entry.laddr and entry.laddr.port == port
    ]
    if not found:
        return "a process that has let go of it since"
    found.sort(key=lambda entry: (entry.pid is None, entry.status != psutil.CONN_LISTEN))
    chosen = found[0]
    if chosen.pid is None:
        if all(entry.status == psutil.CONN_TIME_WAIT for entry in found):
            return _CLOSED
        return _UNSEEN
    try:
        name = psutil.Process(chosen.pid).name()
    except psutil.Error:
        return f"pid {chosen.pid}"
    how = "" if chosen.status == psutil.CONN_LISTEN else ", as the local end of a connection"
    return f"{name} (pid {chosen.pid}{how})"


def ephemeral_range() -> tuple[int, int]:
    """First and last port that the kernel gives to outgoing connections."""
    try:
        low, high = (_SETTINGS / "ip_local_port_range").read_text(encoding="ascii").split()
        return int(low), int(high)
    except (OSError, ValueError):
        return 32768, 60999  # the kernel's own default


def reserved() -> set[int]:
    """Ports that the kernel leaves alone although they are in its range."""
    ports: set[int] = set()
    for part in _reserved_text().split(","):
        low, _, high = part.partition("-")
        if low.isdigit():
            ports.update(range(int(low), int(high or low) + 1))
    return ports


def exposed(port: int) -> bool:
    """Whether the kernel may give the port to an outgoing connection of any process."""
    low, high = ephemeral_range()
    return low <= port <= high and port not in reserved()


def is_own(host: str) -> bool:
    """Whether the address is one of this machine's, so that something can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def port_taken(port: int, host: str = "") -> PortTaken:
    """The error for a port that cannot be bound: who holds it, and the remedy."""
    if host and not is_own(host):
        return PortTaken(
            f"port {port} cannot be had: {host} is no address of this machine",
            hint="Mend node.bind (--bind); `ip address` shows what this machine has.",
        )
    where = f"port {port} of {host}" if host else f"port {port}"
    by = holder(port)
    remedy = "Wait a minute" if by == _CLOSED else "Stop that process"
    hint = f"{remedy}, or choose other ports with --port-offset N."
    if exposed(port):
        hint += (
            f" Linux lends port {port} to outgoing connections; to keep it free:"
            f" sysctl -w net.ipv4.ip_local_reserved_ports={_reservation(port)}"
        )
    return PortTaken(f"{where} is held by {by}", hint=hint)


def _reservation(port: int) -> str:
    """The setting that reserves all of the node's ports, and keeps what is reserved already.

    The whole family at the port's offset is reserved, for the next run might meet its neighbour.
    """
    offset = min((port - base for base in PORTS.values() if port >= base), default=0)
    wanted = {port, *(base + offset for base in PORTS.values() if base + offset <= 65535)}
    parts = [part for part in _reserved_text().split(",") if part]
    return ",".join([*parts, *(str(number) for number in sorted(wanted) if exposed(number))])


def _reserved_text() -> str:
    try:
        return (_SETTINGS / "ip_local_reserved_ports").read_text(encoding="ascii").strip()
    except OSError:
        return ""
