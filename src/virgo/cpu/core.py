"""Which worker of a node runs which call: decisions only. No I/O, no clock.

The ledger knows calls and workers by number, and answers each event with the effects to bring about. A call
that waits for a call of its own lends its worker's place, so that a clone that clones cannot hold the last
place while it waits for it; and calls made by calls go first, the newest before the older, which keeps the
number of half-done ones small.

A lease is to the ledger a call that may run for ever, and can be recalled for others who wait: `victim` says
which lease, so that all clients have their turn.

Which node runs a call is decided in `placement`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from virgo.errors import Busy
from virgo.limits import CALLS_WAITING_MAX, WORKERS_MAX

Crew = bytes


@dataclass(frozen=True, slots=True)
class Start:
    """Give the call to the worker."""

    call: int
    worker: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Make a worker of that number."""

    worker: int


@dataclass(frozen=True, slots=True)
class Retire:
    """End an idle worker that is not needed."""

    worker: int


Effect = Start | Fork | Retire


class Ledger:
    """Calls and workers of one node.

    Args:
        target: workers that run at once when no call waits for another.
    """

    def __init__(self, *, target: int) -> None:
        self.target = max(1, min(target, WORKERS_MAX))
        self._waiting: OrderedDict[int, None] = OrderedDict()
        self._nested: OrderedDict[int, None] = OrderedDict()  # taken newest first
        self._starting: set[int] = set()
        self._idle: list[int] = []  # a stack: the last used first, its caches are warm
        self._running: dict[int, int] = {}  # call by worker
        self._workers: dict[int, int] = {}  # worker by call
        self._lent: Counter[int] = Counter()  # calls outstanding of each running call
        self._extra: set[int] = set()
        self._more: dict[int, int] = {}  # places beyond the first, of calls that need some
        self._leases: dict[int, Crew] = {}  # running ones, the longest first
        self._recalled: set[int] = set()
        self._last = 0

    def __repr__(self) -> str:
        return f"<Ledger target={self.target} running={self.running} waiting={self.waiting}>"

    @property
    def running(self) -> int:
        """Calls that a worker has."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Calls that no worker has yet."""
        return len(self._waiting) + len(self._nested)

    @property
    def workers(self) -> int:
        """Workers there are, being made included."""
        return len(self._starting) + len(self._idle) + len(self._running)

    @property
    def limit(self) -> int:
        """Workers there may be now."""
        return min(WORKERS_MAX, self.target + len(self._lent) + len(self._extra))

    @property
    def room(self) -> int:
        """Places that are free; negative if more calls wait than that."""
        free = self.limit - self.running - self.waiting
        return free if not self._more else free - sum(self._more.values()) + self._lent_more()

    def _lent_more(self) -> int:
        """Places beyond the first of those that wait for calls of their own."""
        return sum(self._more.get(call, 0) for call in self._lent)

    def _fits(self, call: int) -> bool:
        """Whether the call that comes next has the places that it needs; alone it always has."""
        if not self._more:
            return self.running < self.limit
        held = sum(more for one, more in self._more.items() if one in self._workers) - self._lent_more()
        needed = 1 + self._more.get(call, 0)
        alone = self.running - len(self._lent) <= 0 and self.running < WORKERS_MAX
        return self.running + held + needed <= self.limit or (alone and self.running < self.limit)

    @property
    def first(self) -> int | None:
        """The waiting call that comes next, None if none waits."""
        if self._nested:
            return next(reversed(self._nested))
        return next(iter(self._waiting), None)

    def worker_of(self, call: int) -> int | None:
        """The worker that runs the call, None if it waits or has ended."""
        return self._workers.get(call)

    def submit(
        self,
        call: int,
        *,
        nested: bool = False,
        extra: bool = False,
        crew: Crew | None = None,
        places: int = 1,
    ) -> list[Effect]:
        """A call has come.

        Args:
            call: its number.
            nested: another call waits for it: it goes first.
            extra: that one runs elsewhere, and its place cannot be lent: one more worker may be made.
            crew: it is a lease for this client.
            places: how many it takes, of the `target` that there are; if there are fewer, all.

        Raises:
            Busy: too many wait, or calls that wait for calls hold all workers there can be.
        """
        if self.waiting >= CALLS_WAITING_MAX:
            raise Busy(f"{self.waiting} calls wait for a worker already")
        if (nested or extra) and self.target + len(self._lent) + len(self._extra) > WORKERS_MAX:
            raise Busy(
                f"calls that wait for their own calls hold all {WORKERS_MAX} workers of this node",
                hint="The recursion is too deep for processes; call the function itself from some depth on.",
            )
        if extra:
            self._extra.add(call)
        if crew is not None:
            self._leases[call] = crew
        if places > 1:
            self._more[call] = places - 1
        (self._nested if nested or extra else self._waiting)[call] = None
        return self._go_on()

    def ready(self, worker: int) -> list[Effect]:
        """A worker that was asked for is there."""
        if worker in self._starting:
            self._starting.discard(worker)
            self._idle.append(worker)
        return self._go_on()

    def done(self, worker: int) -> list[Effect]:
        """A worker has ended its call and is free."""
        self._release(worker)
        self._idle.append(worker)
        return self._go_on()

    def gone(self, worker: int) -> list[Effect]:
        """A worker has ended, or is being ended; what it ran is no longer its."""
        self._starting.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        self._release(worker)
        return self._go_on()

    def withdraw(self, call: int) -> bool:
        """Take back a call that still waits; False if it does not."""
        self._extra.discard(call)
        self._more.pop(call, None)
        self._leases.pop(call, None)
        for place in (self._waiting, self._nested):
            if call in place:
                del place[call]
                return True
        return False

    def lend(self, call: int) -> list[Effect]:
        """A running call waits for a call of its own from now on."""
        if call in self._workers:
            self._lent[call] += 1
        return self._go_on()

    def reclaim(self, call: int) -> None:
        """One of the calls that it waited for has ended."""
        if call in self._lent:
            self._lent[call] -= 1
            if not self._lent[call]:
                del self._lent[call]

    def victim(self, crew: Crew, idle: set[int], late: Collection[int] = (), *, turn: bool) -> int | None:
        """The lease to be recalled for a client who waits for a worker; None if none may be.

        Args:
            crew: the client, b"" if it is for a single call.
            idle: leases whose workers do nothing.
            late: recalled ones whose workers are at a long call: nobody waits for these alone.
            turn: whether it has waited for so long that it is its turn.
        """
        if not self._recalled.issubset(late):  # one at a time: it is on its way
            return None
        held = {
            call: who
            for call, who in self._leases.items()
            if call in self._workers and call not in self._recalled
        }
        for call, who in held.items():
            if call in idle and who != crew:
                return call
        if not held:
            return None
        counts = Counter(held.values())
        own = counts[crew] if crew else self.running - len(held) - len(self._recalled)
        most, count = counts.most_common(1)[0]
        if count > own + 1:
            return next(call for call in reversed(held) if held[call] == most)
        if turn and (own == 0 or not crew):
            return next((call for call in held if held[call] != crew), None)
        return None

    def recall(self, call: int) -> None:
        """The lease, which is held, has been recalled."""
        self._recalled.add(call)

    def retarget(self, target: int) -> list[Effect]:
        """The share of this node has changed."""
        self.target = max(1, min(target, WORKERS_MAX))
        return self._go_on()

    def trim(self) -> list[Effect]:
        """Some time has passed: end idle workers beyond the target, the longest unused first."""
        surplus = min(self.workers - self.limit, len(self._idle))
        retired, self._idle = self._idle[: max(0, surplus)], self._idle[max(0, surplus) :]
        return [Retire(worker) for worker in retired]

    def warm(self, count: int) -> list[Effect]:
        """Have at least so many workers, before any call comes."""
        return [self._fork() for _ in range(min(count, self.limit) - self.workers)]

    def _release(self, worker: int) -> None:
        call = self._running.pop(worker, None)
        if call is not None:
            del self._workers[call]
            self._lent.pop(call, None)
            self._extra.discard(call)
            self._more.pop(call, None)
            self._leases.pop(call, None)
            self._recalled.discard(call)

    def _go_on(self) -> list[Effect]:
        effects: list[Effect] = []
        while (first := self.first) is not None and self._idle and self._fits(first):
            worker = self._idle.pop()
            call, _ = self._nested.popitem() if self._nested else self._waiting.popitem(last=False)
            self._running[worker] = call
            self._workers[call] = worker
            effects.append(Start(call, worker))
        missing = self.waiting - len(self._starting) - len(self._idle)
        while missing > 0 and self.workers < self.limit:
            effects.append(self._fork())
            missing -= 1
        return effects

    def _fork(self) -> Fork:
        self._last += 1
        self._starting.add(self._last)
        return Fork(self._last)
