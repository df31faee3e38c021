"""Watches over the right to write a store, which clients of the machine take for microseconds at a time.

The kernel gives it back for a client that is killed. One that is stopped (Ctrl-Z, SIGSTOP) in the middle of a
change keeps it, and the node would wait without end. So a thread looks whether the node waits for it; then
it lets stopped clients go on, one after the other, until the node has the right, and stops them again before
the node gives it up, so that none of them stands in the middle of its next change. A client that cannot be
let go on, in a debugger for example, is killed before anybody is told that the node is lost.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import Final

from virgo.errors import Denied, NotRunning
from virgo.kernel.process import ProcessMark, vitals
from virgo.limits import MEMORY_WRITER_KILL_S, MEMORY_WRITER_WAIT_S
from virgo.memory.tables import Tables
from virgo.memory.writers import writers

log = logging.getLogger("virgo.memory")
_LOOK_S: Final = 0.05
_GO_ON_S: Final = 0.2  # for a client to finish its change, which takes it microseconds of work, and to stop
_POLL_S: Final = 0.001


class Guard:
    """Guards one store; `start`, then `stop`.

    Attributes:
        helped: clients that were let go on.
        killed: clients that had to be killed.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
        self.helped = self.killed = 0

    def __repr__(self) -> str:
        return f"<Guard of {self._tables!r}, {self.helped} helped, {self.killed} killed>"

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End; the store may be closed then."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_LOOK_S):
            since = self._tables.waiting_since
            if since and time.monotonic() - since > MEMORY_WRITER_WAIT_S:
                self._help(since)

    def _help(self, since: float) -> None:
        """The node has waited since then."""
        for mark in self._stopped():
            if self._tables.waiting_since != since:
                return
            with contextlib.suppress(Denied):  # it is another user's, who does not write
                if time.monotonic() - since > MEMORY_WRITER_KILL_S:
                    log.error("pid %d is stopped, keeps the right to write, and is killed for it", mark.pid)
                    self.killed += mark.signal(signal.SIGKILL)
                else:
                    self._let_finish(mark, since)

    def _let_finish(self, mark: ProcessMark, since: float) -> None:
        """Have a stopped process go on until the node has the right."""
        tables = self._tables
        tables.helped = True  # from now on the node keeps the right once it has it
        try:
            if tables.waiting_since != since or not mark.signal(signal.SIGCONT):
                return
            _until(lambda: tables.waiting_since != since)
            mark.signal(signal.SIGSTOP)
            _until(lambda: _is_still(mark.pid))
        finally:
            tables.helped = False
        if tables.waiting_since != since:
            self.helped += 1
            log.warning("pid %d was stopped in the middle of a change, and was let finish it", mark.pid)

    def _stopped(self) -> list[ProcessMark]:
        """Stopped processes that may be writing."""
        found = []
        for pid in writers(self._tables.directory):
            seen = vitals(pid)
            if seen is not None and seen.stopped:
                with contextlib.suppress(NotRunning):
                    found.append(ProcessMark.of(pid))
        return found


def _is_still(pid: int) -> bool:
    """Whether a process can take nothing: it has been stopped, or has ended."""
    seen = vitals(pid)
    return seen is None or seen.stopped or seen.ended


def _until(condition: Callable[[], bool]) -> None:
    """Wait for it, for _GO_ON_S at most."""
    deadline = time.monotonic() + _GO_ON_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
