"""The workers that a client leases, and the calls that it gives them.

Calls wait in queues of the client, by the node that they must run on. A thread sends them ahead to leased
workers, as many as these will be through with in LEASE_AHEAD_S by what such calls have taken so far, asks for
further workers while there is work for them, and sets outcomes as they come. A call that turns out to be slow
does not keep those behind it: they are taken back for other workers. While some worker is idle, a caller
gives it his call without the thread, and if he waits for the outcome he reads that himself (`call`).

The thread starts with the first call and ends when there has been nothing to do for a while. Others tell it
what to do by `_tell`, and wake it by `_ring` when they have added calls.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from virgo.context import Identity
from virgo.cpu import messages
from virgo.cpu.apart import Apart
from virgo.cpu.bench import Bench, batch, errand, first
from virgo.cpu.calls import Book, Direct, Item, Task
from virgo.cpu.ends import Ends, late
from virgo.cpu.hires import Hires
from virgo.cpu.lane import Lane, LaneOver
from virgo.cpu.messages import Outcome
from virgo.cpu.segments import drop_spare
from virgo.errors import DeadlineExceeded, InternalFault
from virgo.limits import CALL_TERMINATE_S, LEASE_LOOK_S, LEASE_SLOW_S
from virgo.wire.client import Client

_IDLE_S: Final = 1.0
_QUEUE_LOOK_S: Final = 0.02
# So soon after a call that woke it the thread looks for more by itself: they come thick and fast, and need
# not wake it one by one.
_BURST_S: Final = 0.001
_ODD: Final = (messages.UNKNOWN, messages.NOT_EXPORTED, messages.TAKEN)


class Crew:
    """Leased workers of one client, and the calls for them. For any thread, but not after a fork.

    Args:
        client: connections to the node.
        book: the calls of the client.
        elsewhere: takes calls that are not for workers of this machine.
        identity: on whose behalf all calls are, None for who the connections are.
    """

    def __init__(
        self,
        client: Client,
        book: Book,
        elsewhere: Callable[[list[Item]], None],
        identity: Identity | None = None,
    ) -> None:
        self.pid = os.getpid()
        self._bench = Bench(book, elsewhere, self._tell)
        self._hires = Hires(self._bench, client, identity)
        self._ends = Ends(self._bench)
        self._told: deque[Callable[[], None]] = deque()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._bench.epoll.register(self._bell, select.EPOLLIN)
        self._rung_at = 0.0
        self._news = self._sleeping = False
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<Crew of {len(self._bench.lanes)} workers, {self._bench.waiting} calls waiting>"

    def __del__(self) -> None:
        self._bench.epoll.close()
        os.close(self._bell)

    def stats(self) -> dict[str, int]:
        """Leased workers, and calls that wait for one."""
        return {"leases": len(self._bench.lanes), "waiting": self._bench.waiting}

    @property
    def busy(self) -> bool:
        """Whether calls wait, or are run, as far as can be told from outside."""
        return self._at_work() or len(self._bench.idle) < len(self._bench.lanes)

    # --- for any thread -----------------------------------------------------------------------

    def at_hand(self, number: int) -> bool:
        """Whether a node is of this machine, as far as is known."""
        return self._hires.at_hand(number)

    def submit(self, items: Sequence[Item]) -> None:
        """Have calls run; they are of one task."""
        task, bench = items[0].task, self._bench
        if len(items) == 1 and self._push_now(items[0]):
            return
        queue = bench.queues.setdefault(task.node, deque())
        if task.priority or bench.ranked:
            bench.ranked = True
            self._told.append(partial(bench.rank, items))
        else:
            queue.extend(items)
        if task.deadline is not None:
            self._told.append(partial(self._ends.time, items))
        self._news = True
        self._ring()

    def _push_now(self, item: Item) -> bool:
        """Send a call from the caller's thread to an idle worker, if there is one and nobody waits."""
        task, bench = item.task, self._bench
        if task.deadline is not None or task.node or not bench.idle or bench.queues[""]:
            return False
        try:
            lane = bench.idle.pop()
        except IndexError:  # another one was faster
            return False
        try:
            lane.push((item,))
        except LaneOver:
            self._tell(lambda: self._ends.over(lane))
            return True
        bench.watch(lane)
        if self._thread is None:
            self._start()
        return True

    def call(self, task: Task, arguments: bytes | Apart) -> Outcome | None:
        """Have a call run by an idle worker, and wait for its outcome; None if it has to be submitted.

        Raises:
            DeadlineExceeded, NodeLost, CallFailed: as its future would.
        """
        if task.retries:
            return None
        try:
            lane = self._bench.idle.pop()
        except IndexError:
            return None
        if task.node and lane.node != task.node:
            self._give_back(lane)
            return None
        sink, book = Direct(), Book()
        item = Item(task, arguments, sink, 0, book)
        book.add((item,))
        try:
            outcome = lane.call(item, task.deadline)
        except LaneOver:
            return self._recover(lane, item, sink)
        except BaseException:
            errand(self._discard, lane)
            raise
        if outcome is None:
            self._bench.lanes[lane].stop(lane.lease)
            lane.stopping = late(task, lane)
            return self._recover(lane, item, sink)
        if outcome in _ODD:
            lane.forget(task)
            outcome = None
        book.open.clear()  # it has the call and the call has it: what was sent would stay for long
        self._give_back(lane)
        return outcome

    def runs(self, item: Item) -> bool:
        """Whether a worker has a call."""
        return any(item in lane.items() for lane in list(self._bench.busy.values()))

    def cancel(self, items: list[Item], *, running: bool) -> None:
        """End calls, unless `running` those that do not run; returns when they have ended."""
        ended = threading.Event()
        self.end(items, running=running, ended=ended.set)
        if threading.current_thread() is not self._thread:  # it cannot wait for itself
            while not ended.wait(_IDLE_S) and self._is_alive():
                continue

    def end(self, items: list[Item], *, running: bool, ended: Callable[[], None]) -> None:
        """The same without waiting: `ended` is called then, by another thread."""
        self._tell(lambda: self._ends.cancel(items, ended, running=running))

    def close(self) -> None:
        """Give all workers back, once they have ended what they are at; nothing more may come."""
        if self.pid != os.getpid() or self._bench.closed:
            return
        self._bench.closed = True
        self._ring()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(CALL_TERMINATE_S)

    def _give_back(self, lane: Lane) -> None:
        self._bench.idle.append(lane)
        if self._bench.closed:
            self._bench.let_go()
        elif self._bench.waiting:
            self._news = True
            self._ring()

    def _recover(self, lane: Lane, item: Item, sink: Direct) -> Outcome | None:
        """The outcome of a call that a caller waited for himself, after its lane has ended."""
        contact = self._bench.lanes.pop(lane)
        rest = lane.rest()
        if rest.ended:
            return rest.ended[0][1]
        if rest.fresh:
            return None
        if lane.stopping:
            raise DeadlineExceeded(lane.stopping)
        self._ends.settle_end(item, contact, lane)
        if sink.error is not None:
            raise sink.error
        return sink.outcome

    def _discard(self, lane: Lane) -> None:
        """Stop what a caller does not wait for any more."""
        self._bench.lanes.pop(lane).stop(lane.lease)
        lane.close()

    def _tell(self, what: Callable[[], None]) -> None:
        """Have the thread do something."""
        self._told.append(what)
        self._ring()

    def _ring(self) -> None:
        if self._sleeping:
            self._sleeping = False
            os.eventfd_write(self._bell, 1)
        elif self._thread is None:
            self._start()

    def _is_alive(self) -> bool:
        thread = self._thread
        return thread is not None and thread.is_alive()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="virgo-cpu", daemon=True)
                self._thread.start()

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            defect = InternalFault(f"the thread of leased workers has failed: {error!r}")
            self._thread = None
            for item in list(self._bench.book.open):
                item.fail(defect)
            raise

    def _serve(self) -> None:
        quiet_since = time.monotonic()
        while True:
            while self._told:
                self._told.popleft()()
            self._news = False
            self._assign()
            now = time.monotonic()
            if self._at_work():
                quiet_since = now
            elif self._bench.closed or now - quiet_since > _IDLE_S:
                closed = self._bench.closed
                if closed:
                    self._close()
                drop_spare()
                self._thread = None
                if not (self._at_work() or self._bench.closed != closed) or self._is_replaced():
                    return
            if self._bench.busy and now - self._rung_at < _BURST_S:
                limit_s = _BURST_S / 2
            else:
                self._sleeping = True
                limit_s = 0.0 if self._told or self._news else self._limit_s(now)
            events = self._bench.epoll.poll(limit_s)
            self._sleeping = False
            for descriptor, event in events:
                self._on_event(descriptor, event)
            self._look(time.monotonic())

    def _at_work(self) -> bool:
        bench = self._bench
        return bool(self._told or bench.busy or bench.waiting or self._hires)

    def _is_replaced(self) -> bool:
        """Somebody came when the thread was about to end: whether he has started another one."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.current_thread()
            return self._thread is not threading.current_thread()

    def _on_event(self, descriptor: int, event: int) -> None:
        lane = self._bench.busy.get(descriptor)
        if lane is not None:
            self._on_lane(lane, event)
        elif descriptor == self._bell:
            os.eventfd_read(self._bell)
            self._rung_at = time.monotonic()
        else:
            self._hires.on_event(descriptor)

    def _limit_s(self, now: float) -> float:
        """How long to sleep at most."""
        limit_s = _IDLE_S
        deadline = self._ends.next_deadline
        if deadline is not None:
            limit_s = min(limit_s, deadline - now)
        if self._hires:
            limit_s = min(limit_s, LEASE_LOOK_S)
        if self._bench.waiting:
            limit_s = min(limit_s, _QUEUE_LOOK_S)
        if any(lane.flying > 1 and not lane.slow for lane in list(self._bench.busy.values())):
            limit_s = min(limit_s, LEASE_SLOW_S)
        return max(0.0, limit_s)

    def _look(self, now: float) -> None:
        """What is due: deadlines, slow calls, workers that are asked for."""
        self._ends.look(now)
        for lane in list(self._bench.busy.values()):
            if lane.flying > 1 and not lane.slow and lane.stands(now) > LEASE_SLOW_S:
                self._look_at_slow(lane, now)
        self._hires.look(now)

    def _look_at_slow(self, lane: Lane, now: float) -> None:
        """A worker has begun no call for a while: see what it has finished, and take back the rest."""
        at = lane.begun()[-1:]
        if at and lane.stands(now) < 4 * (self._bench.durations.expect(at[0].task.key) or 0.0):
            return
        self._bench.settle(lane, lane.finished())
        self._bench.put_back(lane.take_back())
        lane.slow = True

    def _assign(self) -> None:
        """Give calls to workers as far as these have room; ask for more workers for those left over."""
        bench = self._bench
        bench.sift()
        for node, queue in sorted(bench.queues.items(), reverse=True):  # those with less choice first
            while (item := first(queue)) is not None:
                task = item.task
                lane, count = bench.room(task, len(queue))
                if lane is None:
                    self._hires.want(node, queue)
                    break
                self._hires.enough()
                self._push(lane, batch(queue, task.key, count, lane.bytes))

    def _push(self, lane: Lane, calls: list[Item]) -> None:
        try:
            lane.push(calls)
        except LaneOver:
            self._ends.over(lane)
        else:
            self._bench.watch(lane)

    def _on_lane(self, lane: Lane, event: int) -> None:
        """A worker has sent outcomes, or takes more, or has ended."""
        bench = self._bench
        try:
            if event & select.EPOLLOUT:
                lane.send()
                if not lane.sending:
                    bench.sent(lane)
            since = lane.busy_since
            found = lane.receive() if event & ~select.EPOLLOUT else []
        except LaneOver:
            self._ends.over(lane)
            return
        if found:
            bench.durations.learn(found[-1][0].task.key, (time.monotonic() - since) / len(found))
            bench.settle(lane, found)
        if not lane.flying and not lane.stopping:
            bench.unwatch(lane)
            self._give_back(lane)

    def _close(self) -> None:
        self._bench.let_go()
        self._hires.close()
