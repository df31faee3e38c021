"""What a mount has done, counted in a file in memory: each worker has a row, whoever looks adds them up.

Behind the rows stands what the workers tell each other of the nodes on other machines: until when each is
silent.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any, Final

from virgo.kernel.fuse.protocol import OPERATIONS, Operation
from virgo.limits import MOUNT_WORKERS_MAX, NODES_MAX

_FIELDS: Final = ("faults", "passed_through", "served", "invalidations", "restarts")
_ROW: Final = OPERATIONS + 16
_ROWS: Final = MOUNT_WORKERS_MAX + 1  # the last is of the process that looks after the workers
_COUNTS_BYTES: Final = _ROW * _ROWS * 8
_BYTES: Final = _COUNTS_BYTES + NODES_MAX * 8
FAULTS, PASSED_THROUGH, SERVED, INVALIDATIONS, RESTARTS = range(OPERATIONS, OPERATIONS + len(_FIELDS))


def create(path: Path) -> None:
    """Make the file, all zeros."""
    path.write_bytes(bytes(_BYTES))


def row(path: Path, worker: int) -> memoryview[int]:
    """The numbers of one worker, to be counted up: by `Operation`, then the constants of this module."""
    return _mapped(path, os.O_RDWR)[:_COUNTS_BYTES].cast("Q")[worker * _ROW : (worker + 1) * _ROW]


def silences(path: Path) -> memoryview[float]:
    """A number for each node on another machine, in the order of their names; see `far.FarNode`."""
    return _mapped(path, os.O_RDWR)[_COUNTS_BYTES:].cast("d")


def read(path: Path) -> dict[str, Any]:
    """The sums of all: `upcalls` by operation, those that were made at all, and each field.

    Raises:
        FileNotFoundError: the mount is gone.
    """
    numbers = _mapped(path, os.O_RDONLY)[:_COUNTS_BYTES].cast("Q")
    sums = [sum(numbers[index::_ROW]) for index in range(_ROW)]
    upcalls = {operation.name.lower(): sums[operation] for operation in Operation if sums[operation]}
    fields = dict(zip(_FIELDS, sums[OPERATIONS:], strict=False))
    return {"upcalls": upcalls, **fields}


def _mapped(path: Path, flags: int) -> memoryview[int]:
    file = os.open(path, flags | os.O_CLOEXEC)
    try:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if flags & os.O_RDWR else 0)
        return memoryview(mmap.mmap(file, _BYTES, prot=protection))
    finally:
        os.close(file)
