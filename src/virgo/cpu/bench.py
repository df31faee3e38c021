"""What the parts of a crew share: the workers that a client leases, and the calls that wait for them.

All of it belongs to the crew's thread, but what is said to be for any thread.
"""

from __future__ import annotations

import contextlib
import select
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from threading import Thread
from typing import Final

from virgo.cpu import messages
from virgo.cpu.calls import Book, Item, Task
from virgo.cpu.contact import Contact
from virgo.cpu.durations import Durations
from virgo.cpu.lane import Lane
from virgo.cpu.messages import Outcome
from virgo.limits import LEASE_AHEAD_BYTES_MAX, LEASE_AHEAD_CALLS_MAX, LEASE_AHEAD_S

_READ: Final = select.EPOLLIN


class Bench:
    """Leased workers, and calls that wait.

    Args:
        book: the calls of the client.
        elsewhere: takes calls that are not for workers of this machine.
        tell: has the crew's thread do something; for any thread.

    Attributes:
        lanes: the workers, each with the node that it is leased from.
        idle: those with nothing to do. Whoever takes one out has it alone; for any thread.
        busy: the others that the thread looks after, by descriptor; any thread may add one.
        queues: calls that wait, by the node that they must run on, "" for any; any thread may add some.
        ranked: whether calls have priorities; then only the thread adds some, by `rank`.
        cancelled: how many of these have been cancelled.
        durations: how long calls of a function take.
        closed: no idle worker is kept.
    """

    def __init__(
        self,
        book: Book,
        elsewhere: Callable[[list[Item]], None],
        tell: Callable[[Callable[[], None]], None],
    ) -> None:
        self.book = book
        self.elsewhere = elsewhere
        self.tell = tell
        self.lanes: dict[Lane, Contact] = {}
        self.idle: list[Lane] = []
        self.busy: dict[int, Lane] = {}
        self.queues: dict[str, deque[Item]] = {"": deque()}
        self.ranked = self.closed = False
        self.cancelled = 0
        self.durations: Durations[bytes] = Durations()
        self.epoll = select.epoll()

    def __repr__(self) -> str:
        return f"<Bench of {len(self.lanes)} workers, {self.waiting} calls waiting>"

    @property
    def waiting(self) -> int:
        """Calls that wait for a worker."""
        return sum(map(len, self.queues.values()))

    def put_back(self, items: Iterable[Item]) -> None:
        """Let calls that have not begun wait again, before the others."""
        if self.ranked:
            self.rank([item for item in items if item.open], first=True)
            return
        for item in reversed(list(items)):
            if item.open:
                self.queues[item.task.node].appendleft(item)

    def rank(self, items: Sequence[Item], *, first: bool = False) -> None:
        """Let calls wait before those of less priority; before or behind those of the same."""
        for node, group in groupby(items, lambda item: item.task.node):
            queue = self.queues[node]
            new, old = list(group), taken(queue)
            waiting = [*new, *old] if first else [*old, *new]
            waiting.sort(key=lambda item: -item.task.priority)  # it keeps the order among equals
            queue.extendleft(reversed(waiting))

    def sift(self) -> None:
        """Forget the calls that have ended while they waited, once they are a good part of all.

        One by one they would take as long as all that wait; see also `first`.
        """
        if self.cancelled * 2 > self.waiting:
            self.cancelled = 0
            for queue in list(self.queues.values()):
                queue.extendleft([item for item in reversed(taken(queue)) if item.open])

    def settle(self, lane: Lane, found: list[tuple[Item, Outcome]]) -> None:
        """Give calls the outcomes that a worker has sent."""
        again: list[Item] = []
        for item, outcome in found:
            if len(outcome) > 1:
                item.settle(outcome)
            elif outcome == messages.NOT_EXPORTED:
                self.elsewhere([item])
            else:  # TAKEN, or UNKNOWN
                lane.forget(item.task)
                again.append(item)
        self.put_back(again)

    def let_go(self) -> None:
        """Give the idle workers back; for any thread."""
        with contextlib.suppress(IndexError):
            while True:
                self.idle.pop().close()

    # --- which worker, which calls ------------------------------------------------------------

    def room(self, task: Task, waiting: int) -> tuple[Lane | None, int]:
        """A worker that may have more calls of the task, and how many; an idle one is taken out."""
        took_s = self.durations.expect(task.key)
        ahead = 1 if took_s is None else max(1, min(LEASE_AHEAD_CALLS_MAX, int(LEASE_AHEAD_S / took_s)))
        share = -(-waiting // max(1, len(self.lanes)))
        for place in range(len(self.idle) - 1, -1, -1):
            with contextlib.suppress(IndexError):  # a caller was faster
                lane = self.idle.pop(place)
                if not task.node or lane.node == task.node:
                    return lane, min(ahead, share)
                self.idle.append(lane)
        for lane in list(self.busy.values()):  # any thread may add one meanwhile
            room = ahead - lane.flying
            able = not (lane.slow or lane.stopping or lane.sending or (task.node and lane.node != task.node))
            if able and room > ahead // 2 and lane.bytes < LEASE_AHEAD_BYTES_MAX:
                return lane, min(room, share)
        return None, 0

    def watch(self, lane: Lane) -> None:
        """Wake the thread when the worker answers; for any thread."""
        descriptor = lane.fileno()
        wanted = _READ | select.EPOLLOUT if lane.sending else _READ
        if descriptor not in self.busy:
            self.busy[descriptor] = lane
            self.epoll.register(descriptor, wanted)
        elif lane.sending:
            self.epoll.modify(descriptor, wanted)

    def sent(self, lane: Lane) -> None:
        """All that waited to be sent to a worker has been."""
        self.epoll.modify(lane.fileno(), _READ)

    def unwatch(self, lane: Lane) -> None:
        """The worker has nothing to do, or has ended; its connection must still be open."""
        if self.busy.pop(lane.fileno(), None) is not None:
            self.epoll.unregister(lane.fileno())


def first(queue: deque[Item]) -> Item | None:
    """The call that comes next, those that have ended dropped; None if there is none."""
    while queue:
        if queue[0].open:
            return queue[0]
        queue.popleft()
    return None


def taken(queue: deque[Item]) -> list[Item]:
    """Take all out of a queue that are there now; others may come behind them meanwhile."""
    return [queue.popleft() for _ in range(len(queue))]


def batch(queue: deque[Item], key: bytes, count: int, size: int) -> list[Item]:
    """Take the next calls of a function out of a queue, at least one.

    Args:
        queue: the calls.
        key: of the function.
        count: how many at most.
        size: bytes of arguments that the worker has already.
    """
    calls = [queue.popleft()]
    size += len(calls[0].arguments)
    while len(calls) < count and (item := first(queue)) is not None:
        size += len(item.arguments)
        if size > LEASE_AHEAD_BYTES_MAX or item.task.key != key:
            break
        calls.append(queue.popleft())
    return calls


def errand(work: Callable[..., None], *arguments: object) -> None:
    """Do something that waits for a node, beside the thread."""
    Thread(target=partial(work, *arguments), name="virgo-errand", daemon=True).start()
