"""Leases that are taken back: for those who wait for a worker, and when nobody uses them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from virgo.cpu import messages
from virgo.cpu.core import Crew, Ledger
from virgo.cpu.hiring import Hiring
from virgo.cpu.processes import WorkerProcess
from virgo.limits import LEASE_IDLE_S, LEASE_LOOK_S, LEASE_TURN_S, LEASE_UNUSED_S


class Called(Protocol):
    """A call, as far as it matters here."""

    hiring: Hiring | None
    since: float


class Recalls:
    """Takes leases of a pool back.

    Args:
        ledger, calls, workers: the pool's.

    Attributes:
        outside: the client that waits longest for a place here before it comes to the pool, and since when
            (in monotonic time, 0.0 if nobody does); to be set.
    """

    def __init__(
        self, ledger: Ledger, calls: Mapping[int, Called], workers: Mapping[int, WorkerProcess]
    ) -> None:
        self._ledger = ledger
        self._calls = calls
        self._workers = workers
        self._look: asyncio.TimerHandle | None = None
        self._stopped = False
        self.outside: Callable[[], tuple[Crew, float]] = lambda: (b"", 0.0)

    def __repr__(self) -> str:
        return f"<Recalls{'' if self._look is None else ' looking'}>"

    def stop(self) -> None:
        """Take none back any more."""
        self._stopped = True

    def press(self) -> None:
        """Somebody waits for a worker: recall leases for him as they are to be had, until nobody waits."""
        if self._look is None:
            self._look_for_leases()

    def idle(self) -> set[int]:
        """The leases whose workers do nothing."""
        now = time.monotonic()
        return {
            number
            for number, call in self._calls.items()
            if call.hiring is not None and call.hiring.idle_s(now) > LEASE_IDLE_S
        }

    def take_unused(self) -> None:
        """Take those back that nobody has used for long."""
        now = time.monotonic()
        for number, call in self._calls.items():
            if call.hiring is not None and call.hiring.idle_s(now) > LEASE_UNUSED_S:
                self._recall(number)

    def _look_for_leases(self) -> None:
        self._look = None
        call = self._calls.get(self._ledger.first or 0)
        if call is not None:
            crew, since = b"" if call.hiring is None else call.hiring.crew, call.since
        else:
            crew, since = self.outside()
        if self._stopped or not since:
            return
        turn = time.monotonic() - since > LEASE_TURN_S
        number = self._ledger.victim(crew, self.idle(), self._late(), turn=turn)
        if number is not None:
            self._recall(number)
        self._look = asyncio.get_running_loop().call_later(LEASE_LOOK_S, self._look_for_leases)

    def _late(self) -> set[int]:
        """Recalled leases whose workers are at a call that is longer than a turn."""
        past = time.monotonic() - LEASE_TURN_S
        return {
            number
            for number, call in self._calls.items()
            if call.hiring is not None and 0.0 < call.hiring.recalled < past
        }

    def _recall(self, number: int) -> None:
        hiring = self._calls[number].hiring
        worker = self._ledger.worker_of(number)
        if worker is not None and hiring is not None:
            self._ledger.recall(number)
            hiring.recall()
            self._workers[worker].send(*messages.WANTED)
