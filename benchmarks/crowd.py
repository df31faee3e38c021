"""Several client processes at once, each with a client of its own: started together, asked together.

All begin a task at the same moment of the monotonic clock, and count or time their own calls. Before it each
has made a call, and goes on making calls until all have: what some start for their first one is not counted,
and nobody is idle meanwhile and loses what it has.
"""

from __future__ import annotations

import multiprocessing
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.timing import calls_until, quantile, samples_ns, undisturbed

Operations = Mapping[str, Callable[[], object]]
Joins = Callable[[ExitStack, int], Operations]
_SOON_S = 0.01  # until when a task has reached everybody
_ANSWER_S = 120.0


@dataclass(frozen=True, slots=True)
class Task:
    """What the clients of a crowd do together.

    Attributes:
        operation: one of theirs.
        time_s: for how long.
        timed: whether to time each call, or to count them.
    """

    operation: str
    time_s: float
    timed: bool


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
        return self.rate_and_p99_s(operation, clients=clients, time_s=time_s)[1]

    def rate_and_p99_s(self, operation: str, *, clients: int, time_s: float) -> tuple[float, float]:
        """Both, of the same calls; the clock's reads between them are small beside calls of many µs alone."""
        taken = self._ask(operation, clients=clients, time_s=time_s, timed=True)
        by_client = [array("q", samples) for samples in taken]
        rate = sum(len(samples) / sum(samples) for samples in by_client) * 1e9
        return rate, quantile(sorted(chain.from_iterable(by_client)), 0.99) / 1e9

    def _ask(self, operation: str, *, clients: int, time_s: float, timed: bool) -> list[Any]:
        pipes = [pipe for _, pipe in self._members[:clients]]
        task = Task(operation, time_s, timed)
        _tell(pipes, task)  # each answers once it has made a call
        return _tell(pipes, time.monotonic() + _SOON_S)


def _tell(pipes: Sequence[Connection], what: Any) -> list[Any]:
    """Tell all; their answers."""
    for pipe in pipes:
        pipe.send(what)
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
        with suppress(EOFError):
            while True:
                task: Task = pipe.recv()
                call = operations[task.operation]
                call()
                pipe.send("has made a call")
                while not pipe.poll():
                    call()
                pipe.send(_do(task, call, start_at=pipe.recv()))


def _do(task: Task, call: Callable[[], object], *, start_at: float) -> Any:
    with undisturbed():
        time.sleep(max(0.0, start_at - time.monotonic()))
        if task.timed:
            return array("q", samples_ns(call, task.time_s)).tobytes()
        return calls_until(call, task.time_s)
