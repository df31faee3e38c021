"""A memory barrier for other processes: `membarrier(2)`.

Two processes that share memory may each write a word and then read the other's. Either needs a barrier
between the two, or both may read what was there before. Where one side does it all the time and the other
seldom, the seldom one can have the kernel run the barrier for both: then the busy side pays nothing (source:
the manual page of membarrier; the pattern is Dekker's).
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Final

_NUMBERS: Final = {"x86_64": 324, "aarch64": 283, "riscv64": 283}
_GLOBAL_EXPEDITED: Final = 1 << 1
_REGISTER_GLOBAL_EXPEDITED: Final = 1 << 2

_libc = ctypes.CDLL(None, use_errno=True)
_number = _NUMBERS.get(platform.machine(), -1)


def register() -> bool:
    """Let the barriers of other processes reach this one; False if the kernel does not offer it."""
    return _membarrier(_REGISTER_GLOBAL_EXPEDITED)


def everywhere() -> bool:
    """Run a barrier on each processor that runs a registered process; False if there is no such thing."""
    return _membarrier(_GLOBAL_EXPEDITED)


def _membarrier(command: int) -> bool:
    if _number < 0:
        return False
    return bool(_libc.syscall(_number, command, os.O_RDONLY) == 0)
