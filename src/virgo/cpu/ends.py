"""How calls end otherwise than by themselves: deadlines, cancelling, dead workers, lost nodes."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable

from virgo.cpu import messages
from virgo.cpu.bench import Bench, errand
from virgo.cpu.calls import Item, Task
from virgo.cpu.contact import Contact
from virgo.cpu.lane import Lane
from virgo.errors import CallFailed, Cancelled, DeadlineExceeded, NodeLost, NotRunning, VirgoError
from virgo.limits import CALL_NODES_LOST_MAX, LEASE_LOOK_S


class Ends:
    """Ends calls of a crew. To be used by its thread, but `settle_end`.

    Args:
        bench: its workers and calls.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._timed: list[tuple[float, int, Item]] = []

    def __repr__(self) -> str:
        return f"<Ends {len(self._timed)} deadlines>"

    # --- deadlines ----------------------------------------------------------------------------

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline, in monotonic time."""
        return self._timed[0][0] if self._timed else None

    def time(self, items: Iterable[Item]) -> None:
        """Heed the deadline of calls."""
        for item in items:
            assert item.task.deadline is not None
            heapq.heappush(self._timed, (item.task.deadline, id(item), item))

    def look(self, now: float) -> None:
        """End calls whose deadline has passed."""
        while self._timed and (self._timed[0][0] <= now or not self._timed[0][2].open):
            item = heapq.heappop(self._timed)[2]
            if item.open:
                self._expire(item)

    def _expire(self, item: Item) -> None:
        lane = next((lane for lane in list(self._bench.busy.values()) if item in lane.items()), None)
        if lane is not None and item in lane.begun():
            self._stop(lane, late(item.task, lane), lambda: None)
            return
        if lane is not None:
            taken = lane.take_back()
            self._bench.put_back(one for one in taken if one is not item)
            if item not in taken:  # it may have begun just now
                heapq.heappush(self._timed, (time.monotonic() + LEASE_LOOK_S, id(item), item))
                return
        self._bench.cancelled += 1
        item.fail(DeadlineExceeded(f"{item.task.label} was not begun before its deadline"))

    # --- cancelling ---------------------------------------------------------------------------

    def cancel(self, items: Iterable[Item], ended: Callable[[], None], *, running: bool) -> None:
        """End calls, unless `running` those that do not run, and say when they have ended."""
        bench = self._bench
        wanted = {item for item in items if item.open and not item.key}
        at = {lane: wanted.intersection(lane.items()) for lane in list(bench.busy.values())}
        for item in wanted.difference(*at.values()):
            bench.cancelled += 1
            item.fail(_not_begun())
        lanes = [lane for lane, held in at.items() if held and self._is_at(lane, held)]
        left = len(lanes)
        if not left or not running:
            ended()
            return

        def stopped() -> None:
            nonlocal left
            left -= 1
            if not left:
                ended()

        for lane in lanes:
            self._stop(lane, "", stopped)

    def _is_at(self, lane: Lane, wanted: set[Item]) -> bool:
        """Whether a worker is at one of these calls; those that it has not begun are ended."""
        self._bench.settle(lane, lane.finished())
        taken = lane.take_back()
        self._bench.put_back(item for item in taken if item not in wanted)
        for item in wanted.intersection(taken):
            item.fail(_not_begun())
        return any(item.open for item in wanted)

    def _stop(self, lane: Lane, why: str, stopped: Callable[[], None]) -> None:
        """Stop a worker with the call that it runs; `why`: its deadline has passed, or "" for cancelled."""
        lane.after.append(stopped)
        if lane.stopping:
            return
        self._bench.put_back(lane.take_back())
        lane.stopping = why or "cancelled"
        contact = self._bench.lanes[lane]

        def dead() -> None:
            if lane in self._bench.lanes:
                self.over(lane)
            for item in lane.victims:
                item.fail(DeadlineExceeded(why) if why else _stopped())
            for then in lane.after:
                then()

        def stop() -> None:
            contact.stop(lane.lease)
            self._bench.tell(dead)

        errand(stop)

    # --- workers that end ---------------------------------------------------------------------

    def over(self, lane: Lane) -> None:
        """A worker has given its lease back, or died."""
        bench = self._bench
        bench.unwatch(lane)
        contact = bench.lanes.pop(lane)
        rest = lane.rest()
        bench.settle(lane, rest.ended)
        bench.put_back(rest.fresh)
        if lane.stopping:
            lane.victims += rest.begun
            return
        for item in rest.begun:
            errand(self.settle_end, item, contact, lane)

    def settle_end(self, item: Item, contact: Contact, lane: Lane) -> None:
        """Give a call that had begun its outcome: how its worker ended. It waits, so not in the thread."""
        label = item.task.label
        try:
            outcome = contact.end(lane.lease)
        except (NodeLost, NotRunning) as error:
            if item.task.retries and item.lost < CALL_NODES_LOST_MAX:
                # Not among the repetitions that it may have: it is not the call's doing.
                item.lost += 1
                self._bench.tell(lambda: self._bench.put_back([item]))
                return
            lost = NodeLost(
                f"node {lane.node} was lost while it ran {label}; whether that has ended is unknown"
            )
            lost.__cause__ = error
            item.fail(lost)
        except VirgoError as error:
            item.fail(error)
        else:
            if outcome[:1] == messages.FAILED:
                if item.repeated < item.task.retries and messages.has_died(outcome):
                    item.repeated += 1
                    self._bench.tell(lambda: self._bench.put_back([item]))
                else:
                    item.settle(messages.after(outcome, item.repeated + 1))
            else:
                item.fail(CallFailed(f"the outcome of {label} on node {lane.node} was lost", cause="lost"))


def late(task: Task, lane: Lane) -> str:
    """What is said of a call whose deadline has passed."""
    return f"{task.label} on node {lane.node} ran into its deadline and was stopped"


def _not_begun() -> Cancelled:
    return Cancelled("the call was cancelled before it began")


def _stopped() -> Cancelled:
    return Cancelled("the call was cancelled, and what it had started is dead")
