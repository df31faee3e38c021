"""A process as pid and start time, so that a signal never reaches a stranger.

A pid is given again once its process is gone; a file that only remembers a pid may therefore name anyone.
`ProcessMark` remembers when the process started too, and signals go through a pidfd that is opened
before the mark is compared: the process behind it cannot be exchanged in between. Start times are clock
ticks since a given boot, which a change of the wall clock does not move.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from virgo.errors import BadArgument, DeadlineExceeded, Denied, NotRunning
from virgo.limits import PROCESS_KILL_S

if TYPE_CHECKING:
    from collections.abc import Iterator

Ending = Literal["gone", "terminated", "killed"]


@dataclass(frozen=True, slots=True)
class ProcessMark:
    """One process and no other, even after a reboot.

    Attributes:
        pid: its process id.
        started: boot and clock tick at which it started; text to be compared, not to be read.
    """

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Self:
        """The mark of a living process. Raises NotRunning."""
        started = _started(pid)
        if started is None:
            raise NotRunning(f"there is no process {pid}", hint="It has ended already.")
        return cls(pid, started)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The mark that `to_json` gave. Raises BadArgument."""
        if (
            not isinstance(value, dict)
            or type(value.get("pid")) is not int
            or not isinstance(value.get("started"), str)
        ):
            raise BadArgument(
                f"{str(value)[:80]!r} is not the mark of a process",
                hint="The record is damaged: `virgo down`, then remove it from $VIRGO_HOME/run.",
            )
        return cls(value["pid"], value["started"])

    def to_json(self) -> dict[str, Any]:
        """The mark as a JSON object."""
        return {"pid": self.pid, "started": self.started}

    def alive(self) -> bool:
        """Whether the process still runs; one that ended and waits to be reaped does not."""
        return _started(self.pid) == self.started

    def signal(self, number: signal.Signals | int) -> bool:
        """Send a signal; False if the process is gone. Raises Denied."""
        with _opened(self) as descriptor:
            return descriptor is not None and _send(descriptor, self, number)


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a process was doing at one moment.

    Attributes:
        state: the kernel's letter for its main thread: R runs or would, S sleeps, D waits for a disk,
            T and t are stopped, Z and X have ended.
        cpu_s: processor time that all its threads have used so far.
    """

    state: str
    cpu_s: float

    @property
    def ended(self) -> bool:
        """Whether it will never do anything again."""
        return self.state in "ZX"

    @property
    def stopped(self) -> bool:
        """Whether it does nothing until somebody lets it go on: by SIGSTOP, or in a debugger."""
        return self.state in "Tt"


def vitals(pid: int) -> Vitals | None:
    """What a process is doing; None if it cannot be seen from here, but it may well live."""
    try:
        fields = _stat(pid)
    except ProcessLookupError:
        return Vitals("X", 0.0)
    except (FileNotFoundError, PermissionError):
        return None if _exists(pid) else Vitals("X", 0.0)
    return Vitals(fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))


def _exists(pid: int) -> bool:
    """Whether there is such a process, also where /proc hides those of other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def spawn(module: str, environment: dict[str, str], log: Path) -> int:
    """Start a module as a program in a session of its own, that writes to a log; its pid.

    Who waits for it does so by `os.waitpid`: it is not ours to end, so no Popen holds it.
    """
    command = [sys.executable, "-m", module]
    return os.posix_spawn(
        command[0],
        command,
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )


def umask_of(pid: int) -> int:
    """The umask of a process, without setting it. Raises FileNotFoundError."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022


def terminate(mark: ProcessMark, grace_s: float) -> Ending:
    """End a process: SIGTERM, `grace_s` to finish, then SIGKILL. Blocks until it is gone.

    Returns:
        `gone` if it was not there, `terminated` if SIGTERM was enough, else `killed`.

    Raises:
        Denied: it belongs to another user.
        DeadlineExceeded: it hangs in the kernel and does not even take SIGKILL.
    """
    with _opened(mark) as descriptor:
        if descriptor is None or not _send(descriptor, mark, signal.SIGTERM):
            return "gone"
        if _ended(descriptor, grace_s):
            return "terminated"
        _send(descriptor, mark, signal.SIGKILL)
        if _ended(descriptor, PROCESS_KILL_S):
            return "killed"
    raise DeadlineExceeded(
        f"process {mark.pid} did not end within {PROCESS_KILL_S:.0f} s of SIGKILL",
        hint="It waits in the kernel, for a disk or network file system perhaps; `ps` shows state D.",
    )


@contextmanager
def _opened(mark: ProcessMark) -> Iterator[int | None]:
    """A pidfd of exactly the marked process, or None if it is gone."""
    try:
        descriptor = os.pidfd_open(mark.pid) if mark.pid > 0 else None
    except (ProcessLookupError, OverflowError):
        descriptor = None
    if descriptor is None:
        yield None
        return
    try:
        yield descriptor if mark.alive() else None
    finally:
        os.close(descriptor)


def _send(descriptor: int, mark: ProcessMark, number: int) -> bool:
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        raise Denied(
            f"signal {number} may not be sent to process {mark.pid}", hint="It belongs to another user."
        ) from None
    return True


def _ended(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _started(pid: int) -> str | None:
    """Boot and start tick of a process; None if it is gone or only waits to be reaped."""
    try:
        fields = _stat(pid)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, ticks = fields[0], fields[19]
    return None if state in "ZX" else f"{boot[:8]}:{ticks}"


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on, which is field 3 in proc(5) and 0 here."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    # The name stands in parentheses and may hold any text, parentheses too: count from its end.
    return text[text.rindex(")") + 2 :].split()
