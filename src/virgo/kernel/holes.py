"""Holes in files: what lies there is given back to the file system; positions stay as they are."""

from __future__ import annotations

import ctypes
from typing import Final

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_fallocate: Final = ctypes.CDLL(None, use_errno=True).fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch(descriptor: int, start: int, size: int) -> None:
    """Give back so many bytes from there on, if the file system can; reading them gives zeros."""
    _fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, start, size)
