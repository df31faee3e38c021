"""Which processes may be writing a store: each holds a lock on the byte of its pid in one file beside it.

The kernel drops the lock with the process, so nobody has to tidy up, and tells whoever asks of the holders.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

_NAME = "writers"
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, length, pid
_PIDS = 1 << 22  # the kernel's greatest pid_max


class Announcement:
    """This process is among the writers, until `close`, or until it ends. A forked child is not."""

    def __init__(self, directory: Path) -> None:
        self._descriptor = os.open(directory / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.lockf(self._descriptor, fcntl.LOCK_SH, 1, os.getpid())

    def __repr__(self) -> str:
        return f"<Announcement {'closed' if self._descriptor < 0 else os.getpid()}>"

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Be no longer among them."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def writers(directory: Path) -> list[int]:
    """Pids of the other processes that have announced themselves."""
    found: list[int] = []
    descriptor = os.open(directory / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # The kernel tells one lock of a range, that of who came first and not the one at the lowest byte.
        ranges = [(0, _PIDS)]
        while ranges:
            start, end = ranges.pop()
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, end - start, 0)
            kind, _whence, where, _length, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
            if kind != fcntl.F_UNLCK:
                found.append(pid)
                ranges += [one for one in ((start, where), (where + 1, end)) if one[0] < one[1]]
    finally:
        os.close(descriptor)
    return found
