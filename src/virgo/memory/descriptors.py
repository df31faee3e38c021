"""Descriptors that carry locks of the kernel's: open in this process only, whoever forks.

A lock on an open file is dropped when the last descriptor of that opening is closed. A child that was forked
meanwhile has such a descriptor too, without knowing, and would keep the lock when its parent is long dead. So
the descriptors are listed here, and a child closes them before it does anything else.
"""

from __future__ import annotations

import contextlib
import os
import threading

_open: set[int] = set()
_forks = [0]
_mutex = threading.RLock()  # so that no fork comes between opening and listing


def opened(path: str, flags: int) -> int:
    """Open a file for this process, and not for its children. Raises OSError."""
    with _mutex:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        _open.add(descriptor)
    return descriptor


def shut(descriptor: int) -> None:
    """Close one of them, and so drop its locks."""
    with _mutex:
        if descriptor in _open:
            _open.remove(descriptor)
            os.close(descriptor)


def forks() -> int:
    """How often this process was forked since its first ancestor: what was opened before that is not open."""
    return _forks[0]


def give_away(descriptor: int) -> int:
    """Let the caller close it."""
    with _mutex:
        _open.discard(descriptor)
    return descriptor


def _after_fork_in_child() -> None:
    for descriptor in _open:
        with contextlib.suppress(OSError):  # somebody has closed what was ours
            os.close(descriptor)
    _open.clear()
    _forks[0] += 1
    _mutex.release()


os.register_at_fork(
    before=_mutex.acquire, after_in_parent=_mutex.release, after_in_child=_after_fork_in_child
)
