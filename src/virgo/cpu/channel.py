"""Many calls in flight at once, by two threads: one hands them in, one collects their outcomes.

See `mailbox` for the other side. The threads start with the first call and end when there is nothing more to
do. A future leaves the table of those outstanding exactly once, and whoever takes it out sets its outcome.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from virgo import context as contexts
from virgo.context import Context
from virgo.cpu import messages
from virgo.errors import Cancelled, NodeLost, NotRunning, VirgoError, from_line
from virgo.limits import COLLECT_WAIT_S, REQUEST_DEADLINE_S, SUBMIT_BYTES_MAX, SUBMIT_CALLS_MAX
from virgo.wire.call import Call, Runner, as_nothing

_IDLE_S = 1.0


class CpuFuture(Future[Any]):
    """A call in the cloud.

    Unlike other futures it can be cancelled while it runs: `cancel` has its process terminated, then
    killed, and returns when it is dead.
    """

    def __init__(self, channel: Channel, key: str) -> None:
        super().__init__()
        self.key = key
        self.trusted = False  # whether its outcome may be unpickled
        self.sent = False  # whether the node has taken it
        self._channel = channel

    def running(self) -> bool:
        """Whether a node has it."""
        return self.sent and not self.done()

    def cancel(self) -> bool:
        """End it; True if it is cancelled, False if it had ended before, or is the parent process's."""
        if not self.done() and self._channel.pid == os.getpid():
            self._channel.cancel([self])
        return self.cancelled()

    def settle(self, outcome: bytes) -> None:
        """Set the result or exception that an outcome holds."""
        try:
            result = messages.as_result(outcome, trusted=self.trusted)
        except BaseException as error:  # noqa: BLE001 - it is handed to whoever waits for the result
            self.fail(error)
            return
        if self.set_running_or_notify_cancel():
            self.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Set the exception; Cancelled makes it a cancelled future."""
        if isinstance(error, Cancelled):
            super().cancel()
            self.set_running_or_notify_cancel()
        elif self.set_running_or_notify_cancel():
            self.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Letter:
    """A call that is to be handed in."""

    future: CpuFuture
    verb: str
    payload: tuple[bytes, ...]
    context: Context | None


class Channel:
    """Calls of one client through one node.

    Args:
        runner: the client's connections.
    """

    def __init__(self, runner: Runner) -> None:
        self.pid = os.getpid()
        self._runner = runner
        self._prefix = os.urandom(12).hex()
        self._serial = 0
        self._changed = threading.Condition()
        self._outbox: deque[_Letter] = deque()
        self._futures: dict[str, CpuFuture] = {}
        self._taken = 0  # futures in the table that the node has taken
        self._mailbox = self._prefix
        self._sender: threading.Thread | None = None
        self._collector: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<Channel {len(self._futures)} outstanding, {len(self._outbox)} to be sent>"

    @property
    def outstanding(self) -> int:
        """Calls without outcome."""
        return len(self._futures)

    def outstanding_futures(self) -> list[CpuFuture]:
        """The calls without outcome."""
        with self._changed:
            return list(self._futures.values())

    def wait(self) -> None:
        """Return when nothing is outstanding."""
        with self._changed:
            self._changed.wait_for(lambda: not self._futures)

    def future(self) -> CpuFuture:
        """A future for a call that is about to be sent; its key is unguessable."""
        with self._changed:
            self._serial += 1
            return CpuFuture(self, f"{self._prefix}-{self._serial:x}")

    def send(self, future: CpuFuture, verb: str, *payload: bytes) -> None:
        """Hand a call in; never waits."""
        letter = _Letter(future, verb, payload, contexts.current())
        with self._changed:
            self._outbox.append(letter)
            self._futures[future.key] = future
            if self._sender is None:
                self._sender = threading.Thread(target=self._send_all, name="virgo-submit", daemon=True)
                self._sender.start()
            elif len(self._outbox) == 1:
                self._changed.notify_all()

    def cancel(self, futures: list[CpuFuture]) -> None:
        """End calls; returns when they have ended, by this or by themselves."""
        with self._changed:
            wanted = {future.key for future in futures}
            withdrawn = {one.future.key: one.future for one in self._outbox if one.future.key in wanted}
            if withdrawn:
                self._outbox = deque(one for one in self._outbox if one.future.key not in wanted)
            left = [one for one in futures if one.key not in withdrawn]
            # A batch on its way is waited for: the node must know a key before it can cancel it.
            self._changed.wait_for(lambda: all(one.sent or one.done() for one in left), REQUEST_DEADLINE_S)
        for key in withdrawn:
            self._finish(key, Cancelled("the call was cancelled before it was sent"))
        left = [future for future in left if not future.done()]
        if not left:
            return
        try:
            self._runner.run(Call(("CPU.CANCEL", *(future.key for future in left)), int))
        except (NodeLost, NotRunning) as error:  # a node cancels what a client leaves; a dead one has done so
            self._lose(error)
            return
        if threading.current_thread() is not self._collector:  # it cannot wait for itself
            with self._changed:
                self._changed.wait_for(lambda: all(one.done() for one in left), REQUEST_DEADLINE_S)

    def _finish(self, key: str, outcome: bytes | VirgoError) -> None:
        """Set the outcome of a call, unless it has one already."""
        with self._changed:
            future = self._futures.get(key)
            if future is None:
                return
            del self._futures[key]
            self._taken -= future.sent
        if isinstance(outcome, VirgoError):
            future.fail(outcome)
        else:
            future.settle(outcome)

    # --- the threads --------------------------------------------------------------------------

    def _send_all(self) -> None:
        """Hand in what is in the outbox, in batches, until nothing more comes."""
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._outbox, _IDLE_S):
                    self._sender = None
                    return
                batch, mailbox = self._next_batch(), self._mailbox
            calls: list[Call[None]]
            calls = [Call((one.verb, mailbox, *one.payload), as_nothing, REQUEST_DEADLINE_S) for one in batch]
            replies: list[Exception | None]
            try:
                with contexts.using(batch[0].context):
                    replies = self._runner.run_many(calls)
            except VirgoError as error:  # whether they run is unknown
                replies = [error] * len(batch)
            with self._changed:
                if mailbox != self._mailbox:  # it was closed meanwhile, and what was in it cancelled
                    replies = [_lost() for _ in batch]
                for letter, reply in zip(batch, replies, strict=True):
                    if reply is None:
                        letter.future.sent = True
                        self._taken += letter.future.key in self._futures
                if self._collector is None:
                    self._collector = threading.Thread(
                        target=self._collect_all, name="virgo-collect", daemon=True
                    )
                    self._collector.start()
            for letter, reply in zip(batch, replies, strict=True):
                if reply is not None:
                    self._finish(letter.future.key, _as_error(reply))
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
            lost = [future.key for future in self._futures.values() if future.sent]
            self._mailbox = os.urandom(12).hex()
        for key in lost:
            self._finish(key, error)


def _lost() -> VirgoError:
    return NodeLost("the connection to the node broke; whether the call has ended there is unknown")


def _as_error(reply: Exception) -> VirgoError:
    return reply if isinstance(reply, VirgoError) else from_line(str(reply))
