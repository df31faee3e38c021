"""Several client processes at once, each with a client of its own: started together, asked together.

All begin a task at the same moment of the monotonic clock, and count or time their own calls.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.keepers import Values
from benchmarks.timing import calls_until, quantile, samples_ns, undisturbed

Opener = Callable[[ExitStack], Values]
SETS_EVERY = {"get": 0, "set": 1, "90/10": 10}  # of so many calls one is a set; 0 for none
_CLIENT_LIBRARIES = ("virgo.memory.client", "redis", "pymemcache.client.base")
_SOON_S = 0.01  # until when a task has reached everybody
_WARM_S = 0.005
_ANSWER_S = 60.0
_CHECKED = 64  # keys that each client checks before it begins


@dataclass(frozen=True, slots=True)
class Task:
    """What the clients of a crowd do together.

    Attributes:
        operation: of SETS_EVERY.
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
        opener: makes a client; is sent to the processes.
        count: how many.
        keys: what they get and set, each all of them.
        value: of every key.
    """

    def __init__(self, opener: Opener, count: int, keys: Sequence[str], value: bytes) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__, *_CLIENT_LIBRARIES])  # imported once for all
        self._members: list[tuple[Any, Connection]] = []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_client, args=(theirs, opener, keys, value, number), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))
        for _, pipe in self._members:
            _answer(pipe)

    def __repr__(self) -> str:
        return f"<Crowd of {len(self._members)}>"

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for process, pipe in self._members:
            pipe.close()
            process.join(_ANSWER_S)

    def rate(self, operation: str, *, clients: int, time_s: float) -> float:
        """Calls per second of so many clients together."""
        counted = self._ask(operation, clients=clients, time_s=time_s, timed=False)
        return sum(count / taken_s for count, taken_s in counted)

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


def _client(pipe: Connection, opener: Opener, keys: Sequence[str], value: bytes, number: int) -> None:
    """One client: does tasks until the pipe is closed."""
    with ExitStack() as running:
        values = opener(running)
        if any(values.get(key) != value for key in keys[:: len(keys) // _CHECKED]):
            raise RuntimeError("a client gets wrong values")
        first = number * len(keys) // 8  # so that not all are at the same key
        following = itertools.cycle([*keys[first:], *keys[:first]]).__next__
        pipe.send("ready")
        while True:
            try:
                task: Task = pipe.recv()
            except EOFError:
                return
            pipe.send(_do(task, _call(values, task.operation, following, value)))


def _call(values: Values, operation: str, following: Callable[[], str], value: bytes) -> Callable[[], object]:
    every = SETS_EVERY[operation]
    if every == 0:
        return lambda: values.get(following())
    if every == 1:
        return lambda: values.set(following(), value)
    sets = itertools.cycle([False] * (every - 1) + [True]).__next__
    return lambda: values.set(following(), value) if sets() else values.get(following())


def _do(task: Task, call: Callable[[], object]) -> Any:
    with undisturbed():
        time.sleep(max(0.0, task.start_at - time.monotonic()))
        calls_until(call, _WARM_S)
        if task.timed:
            return array("q", samples_ns(call, task.time_s)).tobytes()
        return calls_until(call, task.time_s)
