"""Holds calls that write faster than their output is read, as a pipe that is full would.

Calls write to files, which take all there is. If somebody follows what a call writes (`output=`), what he has
not read yet is kept, so the worker is stopped when that is too much, and goes on when most of it is read.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping

from virgo.cpu.outputs import Outputs
from virgo.cpu.processes import WorkerProcess
from virgo.limits import OUTPUT_HOLD_LOOK_S, OUTPUT_UNREAD_BYTES_MAX


class Flow:
    """Of the workers of one pool.

    Args:
        outputs, workers: the pool's.
    """

    def __init__(self, outputs: Outputs, workers: Mapping[int, WorkerProcess]) -> None:
        self._outputs = outputs
        self._workers = workers
        self._held: set[int] = set()
        self._next: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Flow {len(self._held)} held>"

    def watch(self) -> None:
        """A call has begun whose output is followed."""
        if self._next is None:
            self._next = asyncio.get_running_loop().call_later(OUTPUT_HOLD_LOOK_S, self._look)

    def _look(self) -> None:
        self._next = None
        unread = self._outputs.unread()
        for number in self._held - unread.keys():
            self._let_go_on(number)
        for number, size in unread.items():
            if number in self._held:
                if size < OUTPUT_UNREAD_BYTES_MAX // 2:
                    self._let_go_on(number)
            elif size > OUTPUT_UNREAD_BYTES_MAX:
                self._hold(number)
        if unread:
            self.watch()

    def _hold(self, number: int) -> None:
        worker = self._workers.get(number)
        if worker is not None and not worker.ending:
            self._held.add(number)
            worker.signal(signal.SIGSTOP)

    def _let_go_on(self, number: int) -> None:
        self._held.discard(number)
        worker = self._workers.get(number)
        if worker is not None:
            worker.signal(signal.SIGCONT)
