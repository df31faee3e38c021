"""What `virgo doctor` looks at in the machine: ports, disk, kernel, limits, clock."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

from virgo.cli import render
from virgo.cli.diagnosis import Check, Finding, Patient, State
from virgo.limits import CLOCK_SKEW_MS_MAX, CONNECTIONS_MAX, GiB, MiB

_PROC = Path("/proc")
_DISK_FAIL_BYTES = 100 * MiB
_DISK_WARN_BYTES = 1 * GiB
# struct timex of 64-bit Linux: its size, and where its fields lie.
_TIMEX_BYTES, _TIMEX_MAXERROR, _TIMEX_STATUS = 256, 24, 40
_STA_UNSYNC = 0x40


def ports(patient: Patient) -> Iterator[Finding]:
    """Whether the ports of the nodes can be had, now and later."""
    from virgo.members import PORTS

    if not patient.config.node.bind:
        yield Finding("ports", "ok", "none: the nodes have Unix sockets only")
        return
    ours = _own_ports(patient.config.home)
    if ours and not patient.plans_ports:
        yield Finding("ports", "ok", f"{len(ours)} are held by the nodes that run")
        yield from _lent(sorted(ours))
        return
    first = [port + patient.config.node.port_offset for port in PORTS.values()]
    wanted = [port + index for port in first for index in range(patient.nodes)]
    beyond = [port for port in wanted if not 0 < port < 65536]
    if beyond:
        yield Finding("ports", "fail", f"port {beyond[0]} does not exist", "Choose another --port-offset.")
        return
    taken = [port for port in wanted if port not in ours and not _free(patient.config.node.bind, port)]
    yield from (_taken(port, patient.config.node.bind) for port in taken)
    if not taken:
        beside = f" and {render.count(patient.nodes - 1, 'port')} after each" if patient.nodes > 1 else ""
        held = len(ours.intersection(wanted))
        how = "are free" if not held else "are free, or held by the nodes that run"
        if held == len(wanted):
            how = "are held by the nodes that run"
        yield Finding("ports", "ok", f"{', '.join(map(str, first))}{beside} {how}")
    yield from _lent(wanted)


def _own_ports(home: Path) -> set[int]:
    """Ports of this cloud's nodes on this machine, also of those that run and do not answer."""
    from virgo.home import read_record, record_path
    from virgo.kernel.load import machine_id
    from virgo.node.control import leftovers, local_nodes, status

    found: set[int] = set()
    if local_nodes(home):
        here = machine_id()
        for node in status(home)["nodes"]:
            if node.get("machine") == here:
                found.update(node["ports"].values())
    for name in leftovers(home):
        record = read_record(record_path(home, name)) or {}
        found.update(record.get("member", {}).get("ports", {}).values())
    return found


def _lent(wanted: list[int]) -> Iterator[Finding]:
    """Those that the kernel may give away while nobody holds them."""
    from virgo.kernel.ports import exposed

    lent = [port for port in wanted if exposed(port)]
    if lent:
        yield Finding(
            "reserved ports",
            "warn",
            f"Linux lends {_listed(lent)} to outgoing connections, so they may be taken at the next start",
            f"sysctl -w net.ipv4.ip_local_reserved_ports={_reservation(lent)}",
        )


def _free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def _taken(port: int, host: str) -> Finding:
    from virgo.kernel.ports import port_taken

    error = port_taken(port, host)
    return Finding("ports", "fail", error.message, error.hint)


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return shown + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")


def _reservation(wanted: list[int]) -> str:
    """The setting with these ports and those that are reserved already, as ranges."""
    from virgo.kernel.ports import reserved

    parts: list[list[int]] = []
    for port in sorted({*wanted, *reserved()}):
        if parts and port == parts[-1][1] + 1:
            parts[-1][1] = port
        else:
            parts.append([port, port])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in parts)


def disk(patient: Patient) -> Iterator[Finding]:
    """Room for the pool, files and logs."""
    from virgo.kernel.load import measure

    free = measure(patient.config.home).disk_free_bytes
    state: State = "fail" if free < _DISK_FAIL_BYTES else "warn" if free < _DISK_WARN_BYTES else "ok"
    hint = "Make room, or put VIRGO_HOME on another disk."
    yield Finding("disk", state, f"{render.size(free)} free under {patient.config.home}", hint)


def shared_memory(patient: Patient) -> Iterator[Finding]:
    """Where shared regions and arrays would lie."""
    from virgo.errors import BadConfig
    from virgo.memory.shelf import SHARED_MEMORY, home_for

    try:
        place = home_for(patient.config.memory.shared_directory, patient.config.memory.capacity_bytes)
    except BadConfig as error:
        yield Finding("shared memory", "fail", error.message, error.hint)
        return
    if place is None:
        hint = f"Let a tmpfs be at {SHARED_MEMORY}, or set memory.shared_directory."
        yield Finding("shared memory", "warn", "shared regions lie on the disk of the home", hint)
    else:
        free = os.statvfs(place.parent)
        room = render.size(free.f_bavail * free.f_frsize)
        yield Finding("shared memory", "ok", f"{room} free in {place.parent}", "")


def pressure(_patient: Patient) -> Iterator[Finding]:
    """Pressure stall information, by which calls are placed."""
    try:
        (_PROC / "pressure" / "cpu").read_text(encoding="ascii")
    except OSError:
        hint = "Boot with psi=1; until then calls are placed by run queue alone."
        yield Finding("pressure", "warn", "the kernel does not measure pressure (PSI)", hint)
    else:
        yield Finding("pressure", "ok", "the kernel measures it (PSI)")


def mounting(_patient: Patient) -> Iterator[Finding]:
    """FUSE, by which the cloud's files are mounted."""
    device = Path("/dev/fuse")
    if not device.exists():
        yield Finding("FUSE", "warn", "there is no /dev/fuse: files cannot be mounted", "modprobe fuse")
    elif not os.access(device, os.R_OK | os.W_OK):
        yield Finding("FUSE", "warn", "/dev/fuse may not be opened", "Give this user access to it.")
    else:
        how = "with" if kernel_version() >= (6, 9) else "without"
        yield Finding("FUSE", "ok", f"/dev/fuse is there, {how} passthrough")


def system_calls(_patient: Patient) -> Iterator[Finding]:
    """seccomp user notification, by which the new system calls are served."""
    try:
        actions = (_PROC / "sys/kernel/seccomp/actions_avail").read_text(encoding="ascii").split()
    except OSError:
        actions = []
    if "user_notif" not in actions or kernel_version() < (5, 9):
        hint = "Linux 5.9 or newer with CONFIG_SECCOMP_FILTER offers it; the other ways in need none."
        yield Finding("system calls", "warn", "the kernel has no seccomp notification", hint)
    else:
        yield Finding("system calls", "ok", f"seccomp notification, Linux {platform.release()}")


def open_files(_patient: Patient) -> Iterator[Finding]:
    """The limit on open files; nodes raise theirs to the hard one."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    enough = hard == resource.RLIM_INFINITY or hard >= CONNECTIONS_MAX
    hint = f"Raise it: `ulimit -Hn {CONNECTIONS_MAX}`, or LimitNOFILE= in the unit."
    yield Finding("open files", "ok" if enough else "warn", f"at most {shown} a process", hint)


def kernel_tls(_patient: Patient) -> Iterator[Finding]:
    """TLS in the kernel, which spares a copy between machines."""
    try:
        offered = (_PROC / "sys/net/ipv4/tcp_available_ulp").read_text(encoding="ascii").split()
    except OSError:
        offered = []
    if "tls" in offered:
        yield Finding("kernel TLS", "ok", "offered")
    else:
        hint = "modprobe tls; without it connections between machines are encrypted by the process."
        yield Finding("kernel TLS", "warn", "not loaded, or not in this kernel", hint)


def clock(_patient: Patient) -> Iterator[Finding]:
    """Whether something keeps the clock right; asked of the kernel, nothing is set."""
    state = ctypes.create_string_buffer(_TIMEX_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    if ctypes.sizeof(ctypes.c_long) != 8 or libc.adjtimex(state) < 0:
        yield Finding("clock", "warn", "the kernel does not tell whether the clock is kept right")
        return
    error_ms = int.from_bytes(state.raw[_TIMEX_MAXERROR : _TIMEX_MAXERROR + 8], "little") / 1000
    status = int.from_bytes(state.raw[_TIMEX_STATUS : _TIMEX_STATUS + 4], "little")
    if status & _STA_UNSYNC:
        hint = (
            "Run chrony or systemd-timesyncd; a node refuses times that are"
            f" {CLOCK_SKEW_MS_MAX / 1000:g} s ahead of its own."
        )
        yield Finding("clock", "warn", "nothing is known to keep the clock right", hint)
    else:
        yield Finding("clock", "ok", f"kept right, to {error_ms:.0f} ms at worst")


def kernel_version() -> tuple[int, int]:
    """Major and minor of the running kernel."""
    match = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(match[1]), int(match[2])) if match else (0, 0)


CHECKS: tuple[Check, ...] = (
    ports, disk, shared_memory, pressure, mounting, system_calls, open_files, kernel_tls, clock,
)  # fmt: skip
