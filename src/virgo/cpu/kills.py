"""Calls that somebody ends who is not their caller: an operator, or their owner from elsewhere."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping
from typing import Final

import psutil

from virgo.cpu import messages
from virgo.cpu.core import Ledger
from virgo.cpu.messages import Failure
from virgo.cpu.processes import WorkerProcess
from virgo.cpu.running import Call

_STOP_S: Final = 1.0  # in which a process that is not in the midst of a disk's work has stopped
_LOOK_S: Final = 0.001


class Kills:
    """Ends calls of a pool.

    Args:
        node: its name.
        ledger, calls, workers: the pool's.
    """

    def __init__(
        self, node: str, ledger: Ledger, calls: Mapping[int, Call], workers: Mapping[int, WorkerProcess]
    ) -> None:
        self._node = node
        self._ledger = ledger
        self._calls = calls
        self._workers = workers

    def __repr__(self) -> str:
        return f"<Kills on {self._node}>"

    def find(self, task: str) -> Call | None:
        """The call of that id, if it runs or waits here."""
        return next((call for call in self._calls.values() if self._is_at(call, task)), None)

    async def kill(self, call: Call, task: str, by: str) -> bool:
        """End a call, and return when it is dead; False if it had ended before.

        Args:
            call: as found.
            task: its id.
            by: who wants that, for those who wait for it.
        """
        worker = self._workers.get(self._ledger.worker_of(call.number) or 0)
        if worker is None:
            if not self._ledger.withdraw(call.number):
                return False
            call.future.set_result(self._failure(call.label, f"was cancelled by {by} before it began"))
            return True
        try:
            # A leased worker goes from call to call by itself: it is held while we see which one it is at.
            if call.hiring is not None and not await self._hold(worker, call, task):
                return False
            call.killed = self._failure(call.label, f"was cancelled by {by}")
            worker.terminate(f"{call.label} was cancelled by {by}")
        finally:  # also if whoever wants that goes away meanwhile
            worker.signal(signal.SIGCONT)
        await asyncio.shield(worker.gone)
        return True

    async def _hold(self, worker: WorkerProcess, call: Call, task: str) -> bool:
        """Stop a worker, and say whether it is at that call."""
        worker.signal(signal.SIGSTOP)
        until = time.monotonic() + _STOP_S
        try:
            process = psutil.Process(worker.pid)
            while process.status() != psutil.STATUS_STOPPED and time.monotonic() < until:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_S)  # the kernel tells its parent only, and that is the template
        except psutil.NoSuchProcess:
            return False
        return self._is_at(call, task)

    @staticmethod
    def _is_at(call: Call, task: str) -> bool:
        slate = None if call.hiring is None else call.hiring.slate
        return call.task == task and (call.hiring is None or (slate is not None and slate.running))

    def _failure(self, label: str, what: str) -> bytes:
        return messages.failed(
            Failure(f"{label} on node {self._node} {what}", cause="cancelled", node=self._node)
        )
