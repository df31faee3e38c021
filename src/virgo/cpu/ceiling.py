"""What a worker may use while it runs calls: as much as they were granted, see `needs`.

The ceiling of memory is one of the kernel, RLIMIT_DATA: it counts the heap and private mappings that can be
written, each as it is asked for, and neither code nor the mapped memory pool. Beyond it an allocation fails,
so that a call gets MemoryError and goes on, instead of being killed with all that it has done.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from virgo.cpu.needs import Grant

_PAGE_BYTES: Final = resource.getpagesize()
_PLAIN: Final = Grant()
# What libraries for numbers ask before they start threads.
_THREADS: Final = "OMP_NUM_THREADS"
_GPUS: Final = "CUDA_VISIBLE_DEVICES"


@contextlib.contextmanager
def within(grant: Grant) -> Iterator[None]:
    """Use no more than this inside the block."""
    if grant == _PLAIN:
        yield
        return
    before = {name: os.environ.get(name) for name in (_THREADS, _GPUS)}
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        if grant.cpus > 1:
            os.environ[_THREADS] = str(grant.cpus)
        if grant.gpus:
            os.environ[_GPUS] = ",".join(map(str, grant.gpus))
        if grant.memory:
            ceiling = _held_bytes() + grant.memory
            resource.setrlimit(resource.RLIMIT_DATA, (ceiling if soft < 0 else min(ceiling, soft), hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _held_bytes() -> int:
    """What counts against the ceiling already."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5]) * _PAGE_BYTES
