"""Who waits for calls: a future for one, a run for those of a `map`, a stream if their order is none."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from virgo.cpu import messages
from virgo.cpu.calls import Item
from virgo.cpu.messages import Outcome
from virgo.errors import Cancelled, VirgoError

Cancel = Callable[[list[Item]], None]


class CpuFuture(Future[Any]):
    """A call in the cloud.

    Unlike other futures it can be cancelled while it runs: `cancel` has its process terminated, then
    killed, and returns when it is dead.

    Args:
        trusted: whether its outcome may be unpickled.
        cancel: ends calls; returns when they have ended.
        runs: whether a worker or a node has a call.
    """

    def __init__(self, trusted: bool, cancel: Cancel, runs: Callable[[Item], bool]) -> None:
        super().__init__()
        self.trusted = trusted
        self.item: Item | None = None
        self._end = cancel
        self._runs = runs

    def running(self) -> bool:
        """Whether a worker or a node has it."""
        item = self.item
        return item is not None and not self.done() and self._runs(item)

    def cancel(self) -> bool:
        """End it; True if it is cancelled, False if it had ended before, or is the parent process's."""
        if not self.done() and self.item is not None:
            self._end([self.item])
        return self.cancelled()

    def settle(self, _index: int, outcome: Outcome) -> None:
        """Set the result or exception that an outcome holds."""
        try:
            result = messages.as_result(outcome, trusted=self.trusted)
        except BaseException as error:  # noqa: BLE001 - it is handed to whoever waits for the result
            if self.set_running_or_notify_cancel():
                self.set_exception(error)
            return
        if self.set_running_or_notify_cancel():
            self.set_result(result)

    def fail(self, _index: int, error: VirgoError) -> None:
        """Set the exception; Cancelled makes it a cancelled future."""
        if isinstance(error, Cancelled):
            super().cancel()
            self.set_running_or_notify_cancel()
        elif self.set_running_or_notify_cancel():
            self.set_exception(error)


class Run:
    """The outcomes of many calls of one function, waited for in their order.

    Attributes:
        count: calls so far.
        items: those whose results nobody has taken, by index.
    """

    def __init__(self, trusted: bool) -> None:
        self.count = 0
        self.items: dict[int, Item] = {}
        self._trusted = trusted
        self._outcomes: dict[int, Outcome | VirgoError] = {}
        self._awaited = -1
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        return f"<Run of {self.count} calls>"

    def add(self, item: Item) -> None:
        """One more."""
        self.items[item.index] = item
        self.count += 1

    def result(self, index: int, timeout_s: float | None) -> Any:
        """The result of a call, which is forgotten. Raises what the call raised, TimeoutError."""
        if index not in self._outcomes:
            with self._changed:
                self._awaited = index
                if not self._changed.wait_for(lambda: index in self._outcomes, timeout_s):
                    raise TimeoutError
        del self.items[index]
        outcome = self._outcomes.pop(index)
        if isinstance(outcome, VirgoError):
            raise outcome
        return messages.as_result(outcome, trusted=self._trusted)

    def settle(self, index: int, outcome: Outcome) -> None:
        """See Sink."""
        self._outcomes[index] = outcome
        if index == self._awaited:
            with self._changed:
                self._changed.notify_all()

    def fail(self, index: int, error: VirgoError) -> None:
        """See Sink."""
        self._outcomes[index] = error
        if index == self._awaited:
            with self._changed:
                self._changed.notify_all()


class Stream:
    """The outcomes of many calls of one function, as they come.

    Attributes:
        count: calls so far.
        items: those without an outcome, by index.
    """

    def __init__(self, trusted: bool) -> None:
        self.count = 0
        self.items: dict[int, Item] = {}
        self._trusted = trusted
        self._outcomes: deque[Outcome | VirgoError] = deque()
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        return f"<Stream of {self.count} calls>"

    def add(self, item: Item) -> None:
        """One more."""
        self.items[item.index] = item
        self.count += 1

    def next_result(self, timeout_s: float | None) -> Any:
        """The next result. Raises what the call raised, TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._outcomes, timeout_s):
                raise TimeoutError
            outcome = self._outcomes.popleft()
        if isinstance(outcome, VirgoError):
            raise outcome
        return messages.as_result(outcome, trusted=self._trusted)

    def settle(self, index: int, outcome: Outcome) -> None:
        """See Sink."""
        self._put(index, outcome)

    def fail(self, index: int, error: VirgoError) -> None:
        """See Sink."""
        self._put(index, error)

    def _put(self, index: int, outcome: Outcome | VirgoError) -> None:
        del self.items[index]
        with self._changed:
            self._outcomes.append(outcome)
            self._changed.notify_all()
