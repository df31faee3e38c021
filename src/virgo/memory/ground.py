"""The blocks under a store's file, which are there before its pages are used.

The store is written through the map, which is several times faster than by system calls; but a page of a
sparse file that finds no room on the disk is a SIGBUS, which ends the process. So whoever is about to use
pages that may lie beyond what is known to be there takes more first, and a full disk is an error.

A file never gets shorter: others may have it mapped, and be in the middle of a change beyond what is final.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from virgo.errors import DiskFull, FileRefused
from virgo.limits import MEMORY_GROUND_STEP_BYTES, MiB

_METADATA_BYTES = 1 * MiB  # what a file system may count as blocks of the file beside its content
_LOCK = "opening"


class Ground:
    """What is there of the file of a store.

    Args:
        path: of the file.
        bytes_max: how long it may get.

    Attributes:
        taken: bytes from the beginning that are surely there.
    """

    def __init__(self, path: Path, bytes_max: int) -> None:
        self._path = path
        self.bytes_max = bytes_max
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        blocks = os.fstat(self._descriptor).st_blocks * 512
        self.taken = max(0, min(blocks - _METADATA_BYTES, bytes_max))

    def __repr__(self) -> str:
        return f"<Ground {self.taken} of {self.bytes_max} bytes>"

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Take no more."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def take(self, upto: int) -> None:
        """Have all bytes up to there, and some more if there is room. Raises DiskFull."""
        wanted = min(upto, self.bytes_max)
        for end in (min(wanted + MEMORY_GROUND_STEP_BYTES, self.bytes_max), wanted):
            if end <= self.taken:
                return
            try:
                os.posix_fallocate(self._descriptor, self.taken, end - self.taken)
            except OSError as error:
                failure = error
            else:
                self.taken = end
                return
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"the disk under {self._path} is full") from failure
        name = errno.errorcode[failure.errno or errno.EIO]
        raise FileRefused(
            f"{self._path}: {failure.strerror} ({name})", hint="The store's file system has to take it."
        )


@contextmanager
def opening(directory: Path, *, alone: bool) -> Iterator[int]:
    """While a store's file is being opened; gives its length, below which no map may be.

    To open a file with a shorter map than it is long would cut it off. So whoever opens looks first, while
    its owner, `alone`, does not make it longer.
    """
    descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        path = directory / "data.mdb"
        yield path.stat().st_size if path.exists() else 0
    finally:
        os.close(descriptor)
