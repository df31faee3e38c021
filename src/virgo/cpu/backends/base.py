"""Has the calls of a client run by an engine, whichever it is: Ray or Dask.

It stands where a crew of leased workers stands otherwise (`crew`). One thread talks to the engine and sets
outcomes; others tell it what to do. It starts with the first call, which connects to the engine, and ends
when there has been nothing to do for a while.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from virgo.cpu import messages
from virgo.cpu.apart import Apart
from virgo.cpu.backends.remote import LOST, STOPPED
from virgo.cpu.calls import Book, Item, Task
from virgo.cpu.messages import Outcome
from virgo.errors import (
    BadArgument,
    CallFailed,
    Cancelled,
    DeadlineExceeded,
    InternalFault,
    NodeLost,
    VirgoError,
)
from virgo.limits import CALL_TERMINATE_S

_IDLE_S: Final = 1.0
_LOOK_S: Final = 0.02

Ended = Callable[[Item, bytes | VirgoError], None]


class Engine(Protocol):
    """What an engine has to do. All but `check` and `begun` is called by one thread.

    Attributes:
        title: what it is called.
    """

    title: str

    def check(self, task: Task) -> None:
        """Raise BadArgument for options that it cannot heed. No I/O; from any thread."""

    def open(self) -> None:
        """Connect, if that is not done. Raises BadConfig, NotRunning."""

    def begin(self, items: Sequence[Item], ended: Ended) -> None:
        """Have calls of one task run. Raises VirgoError: none of them is run.

        `ended` gets what each comes to, from any thread, and an error if it comes to nothing by itself.
        """

    def withdraw(self, items: Sequence[Item]) -> list[Item]:
        """Those that have not begun; now they never will, and nothing comes of them. Raises NodeLost."""

    def stop(self, items: Sequence[Item]) -> None:
        """End calls that run, as far as it can; `ended` gets them then. Raises NodeLost."""

    def forget(self, item: Item) -> None:
        """Its end is of no more interest."""

    def begun(self, item: Item) -> bool:
        """Whether it runs. Raises NodeLost."""

    def look(self) -> None:
        """See whether it is still there, once a second while it has calls. Raises NodeLost."""

    def workers(self) -> int:
        """Calls that it runs at once. Raises NodeLost."""

    def close(self) -> None:
        """Let go of the engine."""


@dataclass(slots=True)
class _Stop:
    """Why a call is stopped, and until when that is waited for."""

    late: bool
    until: float


class Backend:
    """Calls of one client at an engine. For any thread, but not after a fork.

    Args:
        engine: that one.
        book: the calls of the client.
    """

    def __init__(self, engine: Engine, book: Book) -> None:
        self._engine = engine
        self._book = book
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._told: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._flying: set[Item] = set()
        self._looked_at = 0.0
        self._serial = itertools.count()
        self._timed: list[tuple[float, int, Item]] = []
        self._stopping: dict[Item, _Stop] = {}
        self._waiting: list[tuple[set[Item], Callable[[], None]]] = []

    def __repr__(self) -> str:
        return f"<Backend {self._engine.title}, {len(self._flying)} calls>"

    # --- for any thread -----------------------------------------------------------------------

    def crew_for(self, task: Task) -> Backend:
        """Itself, for calls of a task. Raises BadArgument, and RuntimeError once this is closed."""
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        title = self._engine.title
        for name, value in (("node", task.node), ("near", task.near)):
            if value and isinstance(value, str):
                raise BadArgument(
                    f"{name}={value!r} names a node of VIRGO, but cpu.backend has callables run by {title}",
                    hint=f"Leave {name}= out, or cpu.backend; calls by name go to VIRGO's nodes anyway.",
                )
        if task.write is not None:
            raise BadArgument(
                f"output= is not to be had of {title}, by which cpu.backend has callables run",
                hint=f"Leave output= out, and see the logs of {title}; or leave cpu.backend out.",
            )
        self._engine.check(task)
        return self

    def call(self, _task: Task, _arguments: bytes | Apart) -> Outcome | None:
        """None: a call has to be submitted, as a crew says when no worker is idle."""
        return None

    def submit(self, items: Sequence[Item]) -> None:
        """Have calls run; they are of one task."""
        self._tell(partial(self._begin, items))

    def runs(self, item: Item) -> bool:
        """Whether a worker of the engine has a call."""
        try:
            return item in self._flying and self._engine.begun(item)
        except NodeLost:
            return False

    def cancel(self, items: Sequence[Item], *, running: bool) -> None:
        """End calls, unless `running` those that do not run; returns when they have ended."""
        if not items:
            return
        ended = threading.Event()
        self.end(items, running=running, ended=ended.set)
        if threading.current_thread() is not self._thread:  # it cannot wait for itself
            while not ended.wait(_IDLE_S) and self._thread is not None:
                continue

    def end(self, items: Sequence[Item], *, running: bool, ended: Callable[[], None]) -> None:
        """The same without waiting: `ended` is called then, by another thread."""
        self._tell(partial(self._cancel, items, running, ended))

    def workers(self) -> Future[int]:
        """Calls that the engine runs at once. It raises BadConfig, NotRunning, NodeLost."""
        found: Future[int] = Future()

        def count() -> None:
            try:
                self._engine.open()
                found.set_result(self._engine.workers())
            except VirgoError as error:
                found.set_exception(error)

        self._tell(count)
        return found

    def close(self) -> None:
        """Let go of the engine; nothing may be outstanding, and nothing more may come."""
        if self._pid != os.getpid() or self._closed:
            return
        self._closed = True
        with self._changed:
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(CALL_TERMINATE_S)
        self._engine.close()

    def stats(self) -> dict[str, int]:
        """Calls that the engine has."""
        return {self._engine.title.lower(): len(self._flying)}

    def _tell(self, what: Callable[[], None]) -> None:
        """Have the thread do something."""
        with self._changed:
            self._told.append(what)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="virgo-backend", daemon=True)
                self._thread.start()
            else:
                self._changed.notify_all()

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                while self._told:
                    self._told.popleft()()
                self._look(time.monotonic())
        except BaseException as error:
            self._thread = None
            self._lose(InternalFault(f"the thread of calls at {self._engine.title} has failed: {error!r}"))
            raise

    def _wait(self) -> bool:
        """Until there is something to do; False if that may be never."""
        with self._changed:
            limit_s = self._limit_s(time.monotonic())
            self._changed.wait_for(lambda: self._told or self._over, limit_s)
            if self._told or self._flying or self._waiting:
                return True
            self._thread = None
            return False

    @property
    def _over(self) -> bool:
        """Whether nothing comes any more."""
        return self._closed and not self._flying

    def _limit_s(self, now: float) -> float:
        if self._waiting or self._stopping:
            return _LOOK_S
        return max(0.0, min(_IDLE_S, self._timed[0][0] - now)) if self._timed else _IDLE_S

    def _begin(self, items: Sequence[Item]) -> None:
        items = [item for item in items if item.open]  # some may be cancelled already
        if not items:
            return
        task = items[0].task
        try:
            self._engine.open()
            for item in items:
                if isinstance(item.arguments, Apart):
                    item.arguments = item.arguments.along()
            self._flying.update(items)
            self._engine.begin(items, self._ended)
        except VirgoError as error:
            for item in items:
                self._flying.discard(item)
                item.fail(error)
            return
        if task.deadline is not None:
            for item in items:
                heapq.heappush(self._timed, (task.deadline, next(self._serial), item))

    def _ended(self, item: Item, outcome: bytes | VirgoError) -> None:
        """From any thread."""
        self._tell(partial(self._set, item, outcome))

    def _set(self, item: Item, outcome: bytes | VirgoError) -> None:
        """A call has come to this, unless it is over already."""
        if item not in self._flying:
            return
        self._flying.discard(item)
        stop = self._stopping.pop(item, None)
        self._engine.forget(item)
        if isinstance(outcome, bytes) and outcome not in (messages.TAKEN, STOPPED, LOST):
            item.settle(outcome)
        elif stop is not None:
            item.fail(_stopped(item, stop))
        elif outcome == LOST:
            item.fail(self._lost(item.task))
        elif isinstance(outcome, VirgoError):
            item.fail(outcome)
        else:
            item.fail(Cancelled("the call was cancelled by somebody else"))

    def _drop(self, item: Item, error: VirgoError) -> None:
        """A call has this end, whatever still comes of it."""
        self._flying.discard(item)
        self._stopping.pop(item, None)
        self._engine.forget(item)
        item.fail(error)

    def _lose(self, error: VirgoError) -> None:
        """The engine is gone, and all calls with it."""
        for item in list(self._flying):
            self._drop(item, error)

    def _lost(self, task: Task) -> CallFailed:
        return CallFailed(
            f"{task.label} had begun at {self._engine.title}, and its outcome was lost with a worker",
            hint="It may have ended there; retries= lets it be run again.",
            cause="lost",
        )

    # --- ends ---------------------------------------------------------------------------------

    def _cancel(self, items: Sequence[Item], running: bool, ended: Callable[[], None]) -> None:
        wanted = [item for item in items if item in self._flying]
        try:
            for item in self._engine.withdraw(wanted) if wanted else ():
                self._drop(item, Cancelled("the call was cancelled before it began"))
            if running:
                self._stop([item for item in wanted if item in self._flying], late=False)
        except NodeLost as error:
            self._lose(error)
        left = {item for item in wanted if item in self._flying}
        if running and left:
            self._waiting.append((left, ended))
        else:
            ended()

    def _stop(self, items: Iterable[Item], *, late: bool) -> None:
        until = time.monotonic() + CALL_TERMINATE_S
        fresh = [item for item in items if item not in self._stopping]
        if fresh:
            self._stopping.update((item, _Stop(late, until)) for item in fresh)
            self._engine.stop(fresh)

    def _look(self, now: float) -> None:
        """What is due: deadlines, calls that do not let themselves be stopped, and who waits for that."""
        try:
            while self._timed and (self._timed[0][0] <= now or self._timed[0][2] not in self._flying):
                item = heapq.heappop(self._timed)[2]
                if item in self._flying:
                    self._expire(item)
            if self._flying and now - self._looked_at > _IDLE_S:
                self._looked_at = now
                self._engine.look()
        except NodeLost as error:
            self._lose(error)
        for item, stop in list(self._stopping.items()):
            if stop.until <= now:
                self._drop(item, _goes_on(item, stop, self._engine.title))
        still = [(left, ended) for left, ended in self._waiting if not left.isdisjoint(self._flying)]
        over = [ended for left, ended in self._waiting if left.isdisjoint(self._flying)]
        self._waiting = still
        for ended in over:
            ended()

    def _expire(self, item: Item) -> None:
        if self._engine.withdraw([item]):
            self._drop(item, DeadlineExceeded(f"{item.task.label} was not begun before its deadline"))
        else:
            self._stop([item], late=True)


def _stopped(item: Item, stop: _Stop) -> VirgoError:
    if stop.late:
        return DeadlineExceeded(f"{item.task.label} ran into its deadline and was stopped")
    return Cancelled("the call was cancelled, and stopped")


def _goes_on(item: Item, stop: _Stop, title: str) -> VirgoError:
    what = f"{title} has not stopped it: it may go on until it ends by itself"
    if stop.late:
        return DeadlineExceeded(f"{item.task.label} ran into its deadline, but {what}")
    return Cancelled(f"the call was cancelled, but {what}")
