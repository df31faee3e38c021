"""How busy this machine is, from the kernel's own figures.

`measure` reads /proc and the file system once and returns a `Load`; it keeps no history and never waits.
What the kernel does not offer (pressure stall information is off on some) is reported as 0. Figures of
the pool and of outstanding work are not known here; the modules add them.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from virgo.members import Load

_PROC = Path("/proc")


def measure(disk: Path) -> Load:
    """The load of this machine; `disk` is any path on the disk whose free space matters."""
    memory = psutil.virtual_memory()
    return Load(
        cpus=len(os.sched_getaffinity(0)),
        cpu_pressure_percent=pressure_percent("cpu"),
        memory_pressure_percent=pressure_percent("memory"),
        io_pressure_percent=pressure_percent("io"),
        run_queue=os.getloadavg()[0],
        memory_free_bytes=memory.available,
        memory_total_bytes=memory.total,
        disk_free_bytes=_disk_free_bytes(disk),
    )


def pressure_percent(resource: str, *, directory: Path = _PROC / "pressure") -> float:
    """Share of the last 10 s in which some task waited for `cpu`, `memory` or `io`; 0 if not offered."""
    try:
        first, *_ = (directory / resource).read_text(encoding="ascii").splitlines()
        averages = dict(word.split("=", 1) for word in first.split()[1:])
        return float(averages["avg10"])
    except (OSError, ValueError, KeyError):  # absent, booted with psi=0, or of another form
        return 0.0


def machine_id() -> str:
    """An id of this boot and network namespace.

    Nodes with equal ids share loopback and, unless their file systems were set apart, Unix sockets. A
    container with its own network gets an id of its own. Machines resumed from one memory snapshot may
    share it, so a caller that finds no socket at the other's path should use its address.
    """
    boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{(_PROC / 'self/ns/net').stat().st_ino}"


def _disk_free_bytes(path: Path) -> int:
    """Free space where `path` is, or will be once its missing directories are made."""
    for place in (path, *path.absolute().parents):
        try:
            return psutil.disk_usage(str(place)).free
        except FileNotFoundError:
            continue
    return 0
