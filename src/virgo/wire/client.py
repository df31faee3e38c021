"""The blocking client: a pool of connections, and `Client`, which runs `Call`s.

Safe for use from several threads and after a fork (a child opens its own connections). Every request has
a deadline. A request is never sent twice: if the connection breaks after sending, the outcome is unknown
and NodeLost says so. While a node is silent it is asked whether it lives (see `life`), so that one that is
stopped or has vanished is NodeLost too, and a long call on one that lives goes on. An idle connection that
the node has closed meanwhile is noticed before it is used.
"""

from __future__ import annotations

import os
import ssl
import threading
import time
from typing import Any, TypeVar

from virgo.errors import DeadlineExceeded, NodeLost, VirgoError
from virgo.limits import (
    LIFE_ANSWER_S,
    LIFE_LOOK_S,
    LIFE_QUIET_S,
    NODE_LOST_S,
    POOL_IDLE_MAX,
    REQUEST_DEADLINE_S,
)
from virgo.wire.address import Address
from virgo.wire.call import Argument, Call
from virgo.wire.connection import Connection, Silence, Watch, readable
from virgo.wire.life import Answer, Witness, answer_of
from virgo.wire.pool import PING, Pool, as_is, failure, pack, pack_plain, result, results

__all__ = ["Client", "Connection", "failure", "pack", "pack_plain"]

T = TypeVar("T")
_SMALL_BYTES = 64 * 1024
_FRESH_S = 0.25  # a connection used this recently is not checked for life before use


class Client(Pool[Connection]):
    """A pool of connections to one node, running `Call`s (a `Runner`). Arguments as `Pool`."""

    def __init__(
        self,
        address: Address,
        *,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        timeout_s: float = REQUEST_DEADLINE_S,
    ) -> None:
        super().__init__(address, token=token, tls=tls, timeout_s=timeout_s)
        self._begin()

    def _begin(self) -> None:
        """What a forked child must have of its own."""
        self._idle = []
        self._asking = threading.Lock()
        self._pid = os.getpid()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def take(self) -> Connection:
        """A connection for the caller alone; give it back with `give`, or close it."""
        self._check_open()
        if self._pid != os.getpid():
            self._begin()
        while (connection := self._pop()) is not None:
            if time.monotonic() - connection.used < _FRESH_S or connection.alive():
                return connection
            connection.close()
        return Connection(self.address, tls=self._tls, token=self._token)

    def give(self, connection: Connection) -> None:
        """Give a connection back that has no reply outstanding."""
        connection.used = time.monotonic()
        if connection.fileno() >= 0:
            # Looked at afterwards, so that no lock is needed.
            self._idle.append(connection)
            if self._closed or len(self._idle) > POOL_IDLE_MAX:
                surplus = self._pop()
                if surplus is not None:
                    surplus.close()

    def run(self, call: Call[T]) -> T:
        """Send, wait, decode. Raises what the node answered, NotRunning, NodeLost, DeadlineExceeded."""
        return result(call, self.exchange(call))

    def exchange(self, call: Call[Any]) -> Any:
        """Send and wait; the reply as it came, so that an error is seen to be the node's (see `failure`).

        Raises:
            NotRunning, NodeLost, DeadlineExceeded: there was no reply.
        """
        timeout_s = self._limit((call,))
        connection = self.take()
        try:
            connection.send(pack(call.request, timeout_s), timeout_s, watch=self._watch)
            reply = connection.receive(timeout_s, watch=self._watch)
        except BaseException:
            connection.close()
            raise
        self.give(connection)
        return reply

    def run_many(self, calls: list[Call[T]]) -> list[T | Exception]:
        """Send all on one connection at once; failures take their place in the list."""
        if not calls:
            return []
        timeout_s = self._limit(calls)
        connection = self.take()
        sender = _Sender(connection, [pack(call.request, timeout_s) for call in calls], timeout_s)
        try:
            sender.start(self._watch)
            replies = [connection.receive(timeout_s, watch=self._watch) for _ in calls]
            sender.finish()
        except BaseException as error:
            connection.close()
            sender.check(error)
            raise
        self.give(connection)
        return results(calls, replies)

    def execute(self, *request: Argument, timeout_s: float | None = None) -> Any:
        """Run a command and return its reply as it is (bytes, int, list, None)."""
        return self.run(Call(request, as_is, timeout_s))

    def close(self) -> None:
        """Close all idle connections; later calls raise NotRunning."""
        self._closed = True
        self._drop()

    def _pop(self) -> Connection | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _drop(self) -> None:
        """Close the idle connections."""
        while (connection := self._pop()) is not None:
            connection.close()

    # --- silence ------------------------------------------------------------------------------

    def _watch(self, silence: Silence) -> float:
        """The `Watch` of this client's connections: one thread asks the node, the others look on."""
        pulse = self._pulse
        pulse.check(silence.since)
        due_s = pulse.due_s(silence.since, time.monotonic())
        if due_s > 0:
            return due_s
        if not self._asking.acquire(blocking=False):
            return LIFE_LOOK_S
        try:
            asked = time.monotonic()
            witness = Witness(self.address, silence.connection.peer_pid)
            answer = self._ask(silence, asked)
            if answer is None:
                return LIFE_LOOK_S
            loss = witness.verdict(answer)
            if loss is None:
                pulse.beat(time.monotonic())
                return LIFE_QUIET_S
            pulse.lose(asked, loss)
        finally:
            self._asking.release()
        self._drop()
        raise pulse.loss()

    def _ask(self, silence: Silence, asked: float) -> Answer | None:
        """Send PING on a second connection; None if there was no telling, or there is no need to any more."""
        until = min(asked + LIFE_ANSWER_S, silence.deadline)
        answer = Answer.NONE
        while not silence.over and (left_s := until - time.monotonic()) > 0:
            try:
                answered = self._ping(silence, left_s)
            except DeadlineExceeded:
                answer, answered = Answer.NONE, False
            except VirgoError as error:
                answer = answer_of(error)
                answered = answer is Answer.GIVEN
                if not answered:
                    time.sleep(max(0.0, min(LIFE_LOOK_S, until - time.monotonic())))
            if answered:
                return Answer.GIVEN
        # If we come late we were stopped ourselves, and have not listened for as long as it seems.
        late = time.monotonic() > until + LIFE_QUIET_S
        return None if late or until == silence.deadline or silence.over else answer

    def _ping(self, silence: Silence, limit_s: float) -> bool:
        """One PING; False if the silence ended before it was answered.

        Raises:
            DeadlineExceeded: it was not answered. VirgoError: it could not be asked.
        """
        began = time.monotonic()
        probe = self._pop()
        # One that has been idle for long may lead nowhere, and we would blame the node for it.
        if probe is not None and (began - probe.used > NODE_LOST_S or not probe.alive()):
            probe.close()
            probe = None
        if probe is None:
            place = silence.connection.place
            probe = Connection(self.address, tls=self._tls, token=self._token, limit_s=limit_s, place=place)
        try:
            probe.send(PING, limit_s)
            waiting = () if silence.sending else (silence.connection,)
            readable(limit_s - (time.monotonic() - began), probe, *waiting)
            if silence.over:
                probe.close()
                return False
            probe.receive(max(0.0, limit_s - (time.monotonic() - began)))
        except BaseException:
            probe.close()
            raise
        self.give(probe)
        return True


class _Sender:
    """Sends at once what fits the socket's buffers, else from a thread, so that neither side waits."""

    def __init__(self, connection: Connection, packed: list[bytes], timeout_s: float | None) -> None:
        self._connection = connection
        self._data = b"".join(packed)
        self._timeout_s = timeout_s
        self._thread: threading.Thread | None = None
        self._failure: VirgoError | None = None

    def start(self, watch: Watch) -> None:
        """Send, or begin to. Raises as `Connection.send`."""
        if len(self._data) <= _SMALL_BYTES:
            self._connection.send(self._data, self._timeout_s, watch=watch)
            return
        self._thread = threading.Thread(target=self._send, args=(watch,), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until all is sent."""
        if self._thread is not None:
            self._thread.join()

    def check(self, error: BaseException) -> None:
        """Raise why sending failed, if that is why receiving did."""
        if self._failure is not None and isinstance(error, NodeLost):
            raise self._failure from error

    def _send(self, watch: Watch) -> None:
        try:
            self._connection.send(self._data, self._timeout_s, watch=watch)
        except VirgoError as error:  # whoever receives raises it: the connection is closed
            self._failure = error
