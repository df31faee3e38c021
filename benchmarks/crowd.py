"""Several client processes at once, each with a client of its own: started together, asked together.

All begin a task at the same moment of the monotonic clock, and count or time their own calls.
"""

from __future__ import annotations

import multiprocessing
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.timing import calls_until, quantile, samples_ns, undisturbed

Operations = Mapping[str, Callable[[], object]]
Joins = Callable[[ExitStack, int], Operations]
_SOON_S = 0.01  # until when a task has reached everybody
_WARM_S = 0.005
_ANSWER_S = 120.0


@dataclass(frozen=True, slots=True)
class Task:
    """What the clients of a crowd do together.

    Attributes:
        operation: one of theirs.
        time_s: for how long.
        timed: whether to time each call, or to count them.
        start_at: monotonic time.
    """

    operation: str
    time_s: float
    timed: bool
    start_at: float


class Crowd:
    """Client processes with a client each.

    Args:
        joins: makes a client in the process it is sent to, checks it, and gives its operations by name; its
            arguments are the stack that is to close the client, and the number of the process.
        count: how many.
        libraries: modules that are imported once for all.
    """

    def __init__(self, joins: Joins, count: int, libraries: Sequence[str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__, *libraries])
        self._members: list[tuple[Any, Connection]] = []
        try:
            for number in range(count):
                ours, theirs = context.Pipe()
                # No daemon: such a process must not have children, and a client may have a pool of its own.
                process = context.Process(target=_client, args=(theirs, joins, number))
                process.start()
                theirs.close()
                self._members.append((process, ours))
            for _, pipe in self._members:
                _answer(pipe)
        except BaseException:
            self._close()
            raise

    def __repr__(self) -> str:
        return f"<Crowd of {len(self._members)}>"

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        """End the clients: each ends when its pipe is closed."""
        for _, pipe in self._members:
            pipe.close()
        for process, _ in self._members:
            process.join(_ANSWER_S)

    def rate(self, operation: str, *, clients: int, time_s: float) -> float:
        """Calls per second of so many clients together."""
        counted = self._ask(operation, clients=clients, time_s=time_s, timed=False)
        return float(sum(count / taken_s for count, taken_s in counted))

    def p99_s(self, operation: str, *, clients: int, time_s: float) -> float:
        """The 99th percentile over all calls of so many clients."""
        samples: list[int] = []
        for one in self._ask(operation, clients=clients, time_s=time_s, timed=True):
            samples.extend(array("q", one))
        samples.sort()
        return quantile(samples, 0.99) / 1e9

    def _ask(self, operation: str, *, clients: int, time_s: float, timed: bool) -> list[Any]:
        pipes = [pipe for _, pipe in self._members[:clients]]
        task = Task(operation, time_s, timed, time.monotonic() + _SOON_S)
        for pipe in pipes:
            pipe.send(task)
        return [_answer(pipe) for pipe in pipes]


def _answer(pipe: Connection) -> Any:
    if not pipe.poll(_ANSWER_S):
        raise RuntimeError(f"a client does not answer within {_ANSWER_S:g} s")
    return pipe.recv()  # EOFError if it has died; what it said is in the output


def _client(pipe: Connection, joins: Joins, number: int) -> None:
    """One client: does tasks until the pipe is closed."""
    with ExitStack() as running:
        operations = joins(running, number)
        pipe.send("ready")
        while True:
            try:
                task: Task = pipe.recv()
            except EOFError:
                return
            pipe.send(_do(task, operations[task.operation]))


def _do(task: Task, call: Callable[[], object]) -> Any:
    with undisturbed():
        time.sleep(max(0.0, task.start_at - time.monotonic()))
        calls_until(call, _WARM_S)
        if task.timed:
            return array("q", samples_ns(call, task.time_s)).tobytes()
        return calls_until(call, task.time_s)
