"""All connections of a node together: how many there are, and how much memory they hold.

Bounds of single connections are not enough: many that are each within their bound may exhaust the node. What
counts are requests that are not complete, requests that wait, and answers that wait to be read. Local
users' Unix sockets are not counted out, so that strangers cannot keep a node's owner from it.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from virgo.errors import Busy
from virgo.limits import (
    CROWD_BYTES_MIN,
    CROWD_LOOK_BYTES,
    CROWD_LOOK_S,
    CROWD_MEMORY_SHARE,
    DESCRIPTORS_RESERVED,
)

if TYPE_CHECKING:
    from virgo.wire.session import Session

_CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")


class Crowd:
    """The sessions of all listeners of a node.

    Args:
        bytes_max: what they may hold together; 0 for the share of the machine's memory.
        connections_max: how many may come by TCP; 0 for what the process's descriptors allow.
    """

    def __init__(self, *, bytes_max: int = 0, connections_max: int = 0) -> None:
        self.bytes_max = bytes_max or max(CROWD_BYTES_MIN, int(_memory_bytes() * CROWD_MEMORY_SHARE))
        self.connections_max = connections_max or _connections_max()
        self.sessions: set[Session] = set()
        self.remote = 0  # of them by TCP, and of those that are still shaking hands
        self._held = 0
        self._looked_at = float("-inf")

    def __repr__(self) -> str:
        return f"<Crowd of {len(self.sessions)} sessions, {self.remote} by TCP, {self._held} bytes>"

    def full(self) -> bool:
        """Whether no further connection may come by TCP."""
        return self.remote >= self.connections_max

    def held_bytes(self) -> int:
        """What all sessions hold, as of a moment ago."""
        now = time.monotonic()
        if now - self._looked_at > CROWD_LOOK_S:
            self._held = sum(session.held_bytes() for session in self.sessions)
            self._looked_at = now
        return self._held

    def make_room(self, size: int) -> None:
        """Note that a session is about to hold so much more. Raises Busy if that is too much for all."""
        if size >= CROWD_LOOK_BYTES:
            refusal = self.take(size)
            if refusal is not None:
                raise refusal

    def take(self, size: int) -> Busy | None:
        """Note that a session holds so much more; the error if that is too much for all."""
        if self.held_bytes() + size <= self.bytes_max:
            self._held += size
            return None
        more = f", and {size} more are wanted" if size else ""
        return Busy(
            f"the connections of this node hold {self._held} bytes{more}",
            hint=f"All may hold {self.bytes_max} together; try again in a moment, with smaller values.",
        )


def _memory_bytes() -> int:
    """Memory of the machine, or of the control group if that is less."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(_CGROUP_LIMIT.read_text(encoding="ascii")))
    except (OSError, ValueError):  # there is no group, or its limit is "max"
        return total


def _connections_max() -> int:
    """The process's descriptors, but for those that the node itself and its owner need."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - DESCRIPTORS_RESERVED)
