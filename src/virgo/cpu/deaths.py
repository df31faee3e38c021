"""Why a worker has died, as far as the kernel tells."""

from __future__ import annotations

import contextlib
import re
import signal
from pathlib import Path

from virgo.cpu.messages import Failure


class Deaths:
    """Explains deaths of workers of a node, each soon after it happened: whether memory ran out is counted.

    Args:
        node: its name.
    """

    def __init__(self, node: str) -> None:
        self._node = node
        self._oom_kills = _oom_kills()

    def __repr__(self) -> str:
        return f"<Deaths on {self._node}>"

    def explain(self, label: str, status: int | None) -> Failure:
        """What ended the call that the worker was at.

        Args:
            label: of the call.
            status: how the worker ended: its exit status, negative for a signal, None if that is unknown.
        """
        where = f"{label} on node {self._node}"
        if status is None:
            return Failure(
                f"{where} lost its worker; how it ended is unknown", cause="signal", node=self._node
            )
        if status >= 0:
            return Failure(f"{where} ended its process with status {status}", cause="exit", node=self._node)
        before, self._oom_kills = self._oom_kills, _oom_kills()
        if -status == signal.SIGKILL and self._oom_kills > before:
            return Failure(
                f"{where} was killed because memory ran out",
                hint="Let it hold less at once, or run it on a node with more memory.",
                cause="memory",
                node=self._node,
            )
        try:
            name = signal.Signals(-status).name
        except ValueError:  # a real-time signal
            name = f"signal {-status}"
        return Failure(f"{where} was ended by {name}", cause="signal", node=self._node)


def _oom_kills() -> int:
    """How often the kernel has killed for want of memory, on this machine and in this control group."""
    count = 0
    for path in (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")):
        with contextlib.suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", path.read_text(encoding="ascii"), re.MULTILINE)
            count += int(found[1]) if found else 0
    return count
