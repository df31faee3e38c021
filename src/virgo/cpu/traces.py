"""What calls leave in a worker's process, which whoever has it next must not meet.

A worker goes from one program to the next. What the calls of the one have set for the process is set back:
directory, environment, umask, signals and timers, limits, priority, streams. A process whose limits cannot be
set back, or that has children, is of no use any more. What is in Python's modules stays, and so does where
these are looked for: one that was imported may need it later.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from _signal import getsignal  # type: ignore[import-not-found]  # that of `signal` takes ten times as long
from typing import Any, Final

_LIMITS: Final = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
_TIMERS: Final = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_FIXED: Final = (signal.SIGKILL, signal.SIGSTOP)
_SIGNALS: Final = [int(one) for one in signal.Signals if one < signal.SIGRTMIN and one not in _FIXED]
_STREAMS: Final = ("stdin", "stdout", "stderr", "excepthook")


class Setting:
    """How a process is set up, as of now."""

    def __init__(self) -> None:
        self._directory = os.open(".", os.O_PATH | os.O_CLOEXEC)
        self._place = _place()
        self._environment = _environment().copy()
        self._umask = _umask()
        self._handlers = [getsignal(number) for number in _SIGNALS]
        self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._limits = [resource.getrlimit(one) for one in _LIMITS]
        self._priority = os.getpriority(os.PRIO_PROCESS, 0)
        self._processors = os.sched_getaffinity(0)
        self._python = _python()

    def __repr__(self) -> str:
        return f"<Setting in {self._place}>"

    def restore(self) -> bool:
        """Set the process up like that again; False if it cannot be, or has children."""
        try:
            self._restore()
        except (OSError, ValueError):  # a limit that cannot be raised again, a priority
            return False
        return not has_children()

    def _restore(self) -> None:
        for timer in _TIMERS:
            if signal.getitimer(timer) != (0.0, 0.0):
                signal.setitimer(timer, 0.0)
        for number, handler in zip(_SIGNALS, self._handlers, strict=True):
            if getsignal(number) != handler:
                if handler is None:
                    raise ValueError(f"the handler of signal {number} was not Python's")
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
        if _place() != self._place:
            os.fchdir(self._directory)
        if _environment() != self._environment:
            os.environb.clear()
            os.environb.update(self._environment)
        os.umask(self._umask)
        for one, limit in zip(_LIMITS, self._limits, strict=True):
            if resource.getrlimit(one) != limit:
                resource.setrlimit(one, limit)
        if os.getpriority(os.PRIO_PROCESS, 0) != self._priority:
            os.setpriority(os.PRIO_PROCESS, 0, self._priority)
        if os.sched_getaffinity(0) != self._processors:
            os.sched_setaffinity(0, self._processors)
        if _python() != self._python:
            self._restore_python()

    def _restore_python(self) -> None:
        streams, depth = self._python
        for name, stream in zip(_STREAMS, streams, strict=True):
            setattr(sys, name, stream)
        sys.setrecursionlimit(depth)


def has_children() -> bool:
    """Whether processes that this one has started run; those that have ended are buried."""
    try:
        while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG) is not None:
            continue
    except ChildProcessError:
        return False
    return True


def _place() -> tuple[int, int]:
    """The directory, by the numbers of the kernel: its name may be another's by now."""
    found = os.stat(".")  # noqa: PTH116 - a Path of it takes longer than that
    return found.st_dev, found.st_ino


def _environment() -> dict[bytes, bytes]:
    """The environment as it is kept, which takes a tenth of the time of reading it."""
    return os.environ._data  # type: ignore[attr-defined,no-any-return]


def _umask() -> int:
    found = os.umask(0o077)
    os.umask(found)
    return found


def _python() -> tuple[list[Any], int]:
    return [getattr(sys, name) for name in _STREAMS], sys.getrecursionlimit()
