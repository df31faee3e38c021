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
    cpus = len(os.sched_getaffinity(0))
    run_queue = os.getloadavg()[0]
    return Load(
        cpus=cpus,
        cpu_pressure_percent=unthrottled_percent(
            pressure_percent("cpu"), pressure_percent("cpu", "avg60"), run_queue, os.cpu_count() or cpus
        ),
        memory_pressure_percent=pressure_percent("memory"),
        io_pressure_percent=pressure_percent("io"),
        run_queue=run_queue,
        memory_free_bytes=memory.available,
        memory_total_bytes=memory.total,
        disk_free_bytes=_disk_free_bytes(disk),
    )


def unthrottled_percent(now: float, minute: float, run_queue: float, cpus: int) -> float:
    """The pressure on processors without that of control groups that have used up their own share.

    The kernel takes a task that is kept from running by its group's quota for one that waits for a processor,
    so that one such group makes an idle machine look full. But that task is not runnable, and does not count
    in the load average. Where tasks wait for a share p of the time, in that time more are runnable than there
    are processors, hence p <= run_queue / (cpus + 1); what the pressure is beyond that is throttling. Both
    averages are of a minute, with the same decay, so that this holds while they rise, too.

    Args:
        now: pressure of the last 10 s, in percent.
        minute: that of the last minute.
        run_queue: the load average of the last minute.
        cpus: processors of the machine.
    """
    possible = 100 * run_queue / (cpus + 1)
    return now if minute <= possible else now * possible / minute


def pressure_percent(resource: str, average: str = "avg10", *, directory: Path = _PROC / "pressure") -> float:
    """Share of the last 10 s in which some task waited for `cpu`, `memory` or `io`; 0 if not offered."""
    try:
        first, *_ = (directory / resource).read_text(encoding="ascii").splitlines()
        averages = dict(word.split("=", 1) for word in first.split()[1:])
        return float(averages[average])
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
