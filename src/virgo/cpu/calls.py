"""Calls on the client's side: what many have in common, each by itself, and who waits for them.

A `Task` is a function with its options, an `Item` one call of it, and a `Sink` gets outcomes by index: a
future (`futures.CpuFuture`) or the results of a `map` (`futures.Run`). Items travel by `crew` (leased
workers) or by `channel` (through a node); whoever has an outcome first sets it, and that once.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from virgo.context import Context
from virgo.cpu import messages
from virgo.cpu.apart import Apart
from virgo.cpu.landing import Place
from virgo.cpu.messages import Form, Options, Outcome, Parcel
from virgo.cpu.needs import PLAIN, Needs
from virgo.errors import NodeLost, NotLoaded, NotRunning, VirgoError
from virgo.limits import CALL_NODE_LOST_MAX


class Task:
    """What calls have in common.

    Args:
        form, label, name, digest: see `messages.Order`.
        function: the callable as bytes, b"" for one by name.
        node: where it must run, "" for anywhere.
        needs: what it must have there.
        near: where its data are, the name or number of a node, 0 for nowhere.
        timeout_ms: how long it may take, 0 for no limit.
        retries: how often it may be run again after the death of its worker.
        priority: the greatest of those that wait goes first.
        context: on whose behalf.
        write: takes what its one call writes, see `follow`.

    Attributes:
        deadline: in monotonic time, None for none.
    """

    __slots__ = (
        "_head", "context", "deadline", "digest", "form", "function", "key", "label", "name", "near",
        "needs", "node", "priority", "retries", "timeout_ms", "write",
    )  # fmt: skip

    def __init__(
        self,
        form: Form,
        label: str,
        name: str,
        function: bytes,
        digest: bytes,
        *,
        node: str = "",
        needs: Needs = PLAIN,
        near: int | str = 0,
        timeout_ms: int = 0,
        retries: int = 0,
        priority: int = 0,
        context: Context | None = None,
        write: Callable[[bytes], object] | None = None,
    ) -> None:
        self.form = form
        self.label = label
        self.name = name
        self.function = function
        self.digest = digest
        self.node = node
        self.needs = needs
        self.near = near
        self.priority = priority
        self.timeout_ms = timeout_ms
        self.deadline = time.monotonic() + timeout_ms / 1000 if timeout_ms else None
        if context is not None and context.deadline is not None:
            self.deadline = min(self.deadline or math.inf, context.deadline)
        self.retries = retries
        self.context = context
        self.write = write
        self.key = digest or name.encode()
        self._head = b""

    def __repr__(self) -> str:
        return f"<Task {self.label} {self.form}{' on ' + self.node if self.node else ''}>"

    @property
    def trusted(self) -> bool:
        """Whether outcomes may be unpickled."""
        return self.form == "pickle"

    def toward(self, near: int) -> Task:
        """The same, with its data at that node."""
        other = copy.copy(self)
        other.near = near
        return other

    def options(self, key: str = "", place: Place | None = None) -> bytes:
        """The options of one of its calls, for a node, and where its result may land."""
        return messages.encode_options(
            Options(
                key,
                self.label,
                self.node,
                self.timeout_ms,
                self.retries,
                self.form,
                near=self.near,
                priority=self.priority,
                needs=self.needs,
                land=None if place is None else place.address,
                followed=self.write is not None,
            )
        )

    def head(self) -> bytes:
        """The head of a parcel of its calls, sent now."""
        if self._head:
            return self._head
        left_ms = None if self.deadline is None else max(0, int((self.deadline - time.monotonic()) * 1000))
        cause = self.context.id if self.context is not None else ""
        head = messages.encode_order(Parcel(self.form, self.label, self.name, self.digest, left_ms, cause))
        if left_ms is None:
            self._head = head
        return head


class Sink(Protocol):
    """Who waits for outcomes."""

    def settle(self, index: int, outcome: Outcome) -> None:
        """The outcome of the call of that index, as bytes of `messages`."""

    def fail(self, index: int, error: VirgoError) -> None:
        """The call of that index has none."""


class Book:
    """The calls of a client that have no outcome yet.

    Attributes:
        open: those. Whoever takes a call out sets its outcome.
        waiting: how many wait for it to be empty, to be told.
    """

    def __init__(self) -> None:
        self.open: set[Item] = set()
        self.waiting = 0
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        return f"<Book {len(self.open)} open>"

    def add(self, items: Iterable[Item]) -> None:
        """These are on their way."""
        self.open.update(items)

    def tell(self) -> None:
        """None is open."""
        with self._changed:
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when none is open."""
        with self._changed:
            self.waiting += 1
            try:
                self._changed.wait_for(lambda: not self.open)
            finally:
                self.waiting -= 1


class Item:
    """One call.

    Attributes:
        task, arguments, sink, index: what it is, and for whom.
        key: by which its client and a node know it, if it goes through one.
        id: by which all know it then, as soon as the node has said so.
        place: where its result may land, if it goes through a node.
        repeated: how often it has been run again after its worker had died.
        lost: how often its node was lost.
    """

    key = id = ""
    repeated = lost = 0
    place: Place | None = None

    def __init__(self, task: Task, arguments: bytes | Apart, sink: Sink, index: int, book: Book) -> None:
        self.task = task
        self.arguments = arguments
        self.sink = sink
        self.index = index
        self.book = book

    def __repr__(self) -> str:
        return f"<Item {self.index} of {self.task.label}{'' if self.open else ' done'}>"

    @property
    def open(self) -> bool:
        """Whether it has no outcome yet."""
        return self in self.book.open

    def settle(self, outcome: Outcome) -> None:
        """It has this outcome, unless it has one already."""
        book = self.book
        try:
            book.open.remove(self)
        except KeyError:
            return
        # What may be large is not kept: a future keeps its call, which would keep the future.
        sink, self.sink, self.arguments, self.place = self.sink, _DONE, b"", None
        sink.settle(self.index, outcome)
        if book.waiting and not book.open:
            book.tell()

    def fail(self, error: VirgoError) -> None:
        """It has none, unless it has one already."""
        book = self.book
        try:
            book.open.remove(self)
        except KeyError:
            return
        sink, self.sink, self.arguments, self.place = self.sink, _DONE, b"", None
        sink.fail(self.index, error)
        if book.waiting and not book.open:
            book.tell()


def may_go_again(task: Task, error: VirgoError, lost: int) -> bool:
    """Whether a call may be handed in again when the node was lost that had it, and maybe is not back yet.

    Args:
        task, error: the call's.
        lost: how often that has happened already.
    """
    gone = isinstance(error, NodeLost | NotRunning) or (lost > 0 and isinstance(error, NotLoaded))
    return gone and bool(task.retries) and lost < CALL_NODE_LOST_MAX


def pause_s(lost: int) -> float:
    """How long to wait before that: a node is started again within seconds."""
    return min(0.05 * 2**lost, 1.0) if lost else 0.0


class Direct:
    """A sink for a caller who waits for one call himself.

    Attributes:
        outcome, error: what came.
    """

    __slots__ = ("error", "outcome")

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self.error: VirgoError | None = None

    def settle(self, _index: int, outcome: Outcome) -> None:
        """See Sink."""
        self.outcome = outcome

    def fail(self, _index: int, error: VirgoError) -> None:
        """See Sink."""
        self.error = error


_DONE: Final[Sink] = Direct()  # of calls for which nobody waits any more
