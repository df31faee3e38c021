"""Many calls in flight at once through a node, by two threads: one hands them in, one collects outcomes.

See `mailbox` for the other side. The threads start with the first call and end when there is nothing more to
do. This is the way to other machines, and from them; on one machine calls go straight to workers, see `crew`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from virgo import context as contexts
from virgo.context import Context
from virgo.cpu.apart import Hand
from virgo.cpu.calls import Item, may_go_again, pause_s
from virgo.cpu.messages import arrived
from virgo.errors import CallFailed, Cancelled, NodeLost, NotRunning, VirgoError, from_line
from virgo.limits import (
    COLLECT_WAIT_S,
    REQUEST_DEADLINE_S,
    SUBMIT_BYTES_MAX,
    SUBMIT_CALLS_MAX,
)
from virgo.wire.call import Call, Runner, as_text

_IDLE_S = 1.0


@dataclass(frozen=True, slots=True)
class _Letter:
    """A call that is to be handed in."""

    item: Item
    verb: str
    payload: tuple[bytes, ...]
    context: Context | None


class Channel:
    """Calls of one client through one node.

    Args:
        runner: the client's connections.
        hand: takes arguments to that.
    """

    def __init__(self, runner: Runner, hand: Hand) -> None:
        self.pid = os.getpid()
        self._runner = runner
        self._hand = hand
        self._prefix = os.urandom(12).hex()  # keys are unguessable
        self._serial = 0
        self._changed = threading.Condition()
        self._outbox: deque[_Letter] = deque()
        self._items: dict[str, Item] = {}
        self._taken: set[str] = set()  # of these, those that the node has
        self._mailbox = self._prefix
        self._sender: threading.Thread | None = None
        self._collector: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<Channel {len(self._items)} outstanding, {len(self._outbox)} to be sent>"

    def send(self, items: Sequence[Item]) -> None:
        """Hand calls in; never waits."""
        with self._changed:
            empty = not self._outbox
            for item in items:
                self._serial += 1
                item.key = f"{self._prefix}-{self._serial:x}"
                self._items[item.key] = item
                verb = "CPU.CALL.SUBMIT" if item.task.form == "pickle" else "CPU.INVOKE.SUBMIT"
                arguments = self._hand.carry(item.arguments)
                item.place = self._hand.place() if item.task.trusted else None
                payload = item.task.options(item.key, item.place), item.task.function, arguments
                self._outbox.append(_Letter(item, verb, payload, item.task.context))
            if self._sender is None:
                self._sender = threading.Thread(target=self._send_all, name="virgo-submit", daemon=True)
                self._sender.start()
            elif empty:
                self._changed.notify_all()

    def cancel(self, items: list[Item], *, running: bool) -> None:
        """End calls, unless `running` those that are sent; returns when they have ended."""
        if self.pid != os.getpid():
            return
        with self._changed:
            wanted = {item.key for item in items if item.key}
            withdrawn = [one.item.key for one in self._outbox if one.item.key in wanted]
            if withdrawn:
                self._outbox = deque(one for one in self._outbox if one.item.key not in wanted)
            left = wanted.difference(withdrawn)
            # A batch on its way is waited for: the node must know a key before it can cancel it.
            self._changed.wait_for(lambda: self._known(left), REQUEST_DEADLINE_S)
        for key in withdrawn:
            self._finish(key, Cancelled("the call was cancelled before it was sent"))
        left = {key for key in left if key in self._items}
        if not left or not running:
            return
        try:
            self._runner.run(Call(("CPU.CANCEL", *left), int))
        except (NodeLost, NotRunning) as error:  # a node cancels what a client leaves; a dead one has done so
            self._lose(error)
            return
        if threading.current_thread() is not self._collector:  # it cannot wait for itself
            with self._changed:
                self._changed.wait_for(lambda: not left & self._items.keys(), REQUEST_DEADLINE_S)

    def _known(self, keys: set[str]) -> bool:
        """Whether each of these calls has ended, or is the node's."""
        return all(key in self._taken or key not in self._items for key in keys)

    def _finish(self, key: str, outcome: bytes | VirgoError) -> None:
        """Set the outcome of a call, unless it has one already."""
        with self._changed:
            item = self._items.pop(key, None)
            self._taken.discard(key)
        if item is None:
            return
        try:
            if not isinstance(outcome, VirgoError):
                item.settle(arrived(outcome, item.place))
                return
        except CallFailed as error:
            outcome = error
        if may_go_again(item.task, outcome, item.lost) and item.open:
            item.lost += 1
            self.send([item])
        else:
            item.fail(outcome)

    # --- the threads --------------------------------------------------------------------------

    def _send_all(self) -> None:
        """Hand in what is in the outbox, in batches, until nothing more comes."""
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._outbox, _IDLE_S):
                    self._sender = None
                    return
                batch, mailbox = self._next_batch(), self._mailbox
            time.sleep(pause_s(max(one.item.lost for one in batch)))
            calls: list[Call[str]]
            calls = [Call((one.verb, mailbox, *one.payload), as_text, REQUEST_DEADLINE_S) for one in batch]
            replies: list[Exception | str]
            try:
                with contexts.using(batch[0].context):
                    replies = self._runner.run_many(calls)
            except VirgoError as error:  # whether they run is unknown
                replies = [error] * len(batch)
            with self._changed:
                if mailbox != self._mailbox:  # it was closed meanwhile, and what was in it cancelled
                    replies = [_lost() for _ in batch]
                for letter, reply in zip(batch, replies, strict=True):
                    if isinstance(reply, str) and letter.item.key in self._items:
                        letter.item.id = reply
                        self._taken.add(letter.item.key)
                if self._collector is None:
                    self._collector = threading.Thread(
                        target=self._collect_all, name="virgo-collect", daemon=True
                    )
                    self._collector.start()
            for letter, reply in zip(batch, replies, strict=True):
                if not isinstance(reply, str):
                    self._finish(letter.item.key, _as_error(reply))
            with self._changed:
                self._changed.notify_all()

    def _next_batch(self) -> list[_Letter]:
        """Calls of one context, a bounded number of calls and bytes."""
        batch: list[_Letter] = []
        size = 0
        context = self._outbox[0].context
        while self._outbox and self._outbox[0].context is context and len(batch) < SUBMIT_CALLS_MAX:
            size += sum(map(len, self._outbox[0].payload))
            if batch and size > SUBMIT_BYTES_MAX:
                break
            batch.append(self._outbox.popleft())
        return batch

    def _collect_all(self) -> None:
        """Collect outcomes until there is nothing outstanding."""
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._taken, _IDLE_S):
                    self._collector = None
                    return
            try:
                found = self._runner.run(
                    Call(("CPU.COLLECT", self._mailbox), list, COLLECT_WAIT_S + REQUEST_DEADLINE_S)
                )
            except VirgoError as error:
                self._lose(error)
                found = []
            for position in range(0, len(found), 3):
                key, error_line, outcome = found[position : position + 3]
                error_text = error_line.decode("utf-8", "replace")
                self._finish(key.decode(), from_line(error_text) if error_text else outcome)
            with self._changed:
                self._changed.notify_all()

    def _lose(self, error: VirgoError) -> None:
        """The node is gone, or gave this client up: so is every call that it had taken."""
        with self._changed:
            lost = list(self._taken)
            self._mailbox = os.urandom(12).hex()
        for key in lost:
            self._finish(key, error)


def _lost() -> VirgoError:
    return NodeLost("the connection to the node broke; whether the call has ended there is unknown")


def _as_error(reply: Exception) -> VirgoError:
    return reply if isinstance(reply, VirgoError) else from_line(str(reply))
