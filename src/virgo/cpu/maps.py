"""One function over many arguments: its calls, and their results in order or as they come.

As in the standard library, the calls begin when they are asked for, not when the first result is; with a
`buffersize` only so many are outstanding, and further arguments are taken as results are.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

from virgo.cpu.calls import Book, Item, Task
from virgo.cpu.futures import Run, Stream
from virgo.cpu.near import near_arguments
from virgo.cpu.shipping import arguments_of
from virgo.limits import SUBMIT_CALLS_MAX

R = TypeVar("R", Run, Stream)
Target = Callable[..., Any] | str
Rows = Iterator[tuple[Any, ...]]


class Maps:
    """Has the calls of a client run.

    Args:
        book: the calls of the client.
        send: has calls of one task run.
        cancel: ends calls.
    """

    def __init__(
        self,
        book: Book,
        send: Callable[[Task, Sequence[Item]], None],
        cancel: Callable[[list[Item]], None],
    ) -> None:
        self._book = book
        self._send = send
        self._cancel = cancel

    def __repr__(self) -> str:
        return f"<Maps of {self._book!r}>"

    def ordered(
        self, task: Task, rows: Rows, timeout_s: float | None, buffersize: int | None
    ) -> Iterator[Any]:
        """Begin the calls; their results in the order of the arguments."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        run = Run(task.trusted)
        self._begin(task, run, rows, buffersize)
        return self._in_order(task, run, rows, deadline, more=buffersize is not None)

    def _in_order(
        self, task: Task, run: Run, rows: Rows, deadline: float | None, *, more: bool
    ) -> Iterator[Any]:
        index = 0
        try:
            while index < run.count:
                result = run.result(index, _left_s(deadline))
                index += 1
                if more:
                    self._begin(task, run, rows, 1)
                yield result
        finally:
            if run.items:
                self._cancel(list(run.items.values()))

    def unordered(
        self, task: Task, rows: Rows, timeout_s: float | None, buffersize: int | None
    ) -> Iterator[Any]:
        """Begin the calls; their results as they come."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        stream = Stream(task.trusted)
        self._begin(task, stream, rows, buffersize)
        return self._as_they_come(task, stream, rows, deadline, more=buffersize is not None)

    def _as_they_come(
        self, task: Task, stream: Stream, rows: Rows, deadline: float | None, *, more: bool
    ) -> Iterator[Any]:
        count = 0
        try:
            while count < stream.count:
                result = stream.next_result(_left_s(deadline))
                count += 1
                if more:
                    self._begin(task, stream, rows, 1)
                yield result
        finally:
            left = list(stream.items.values())
            if left:
                self._cancel(left)

    def _begin(self, task: Task, sink: R, rows: Rows, count: int | None) -> None:
        """Begin so many calls, or all."""
        while True:
            batches: dict[int, list[Item]] = {}  # by the node where their arguments lie
            for row in itertools.islice(rows, count or SUBMIT_CALLS_MAX):
                near = near_arguments(row)
                batch = batches.setdefault(near, [])
                own = task if not near else batch[0].task if batch else task.toward(near)
                item = Item(own, arguments_of(own, row, {}), sink, sink.count, self._book)
                sink.add(item)
                batch.append(item)
            for batch in batches.values():
                self._send(batch[0].task, batch)
            if not batches or count is not None:
                return


def mapping(
    fn: Target, rows: Iterable[tuple[Any, ...]], chunksize: int, buffersize: int | None
) -> tuple[Target, Rows, bool]:
    """The calls of a map: what to run, arguments of each, and whether each result is a list of results."""
    if chunksize < 1 or (buffersize is not None and buffersize < 1):
        raise ValueError("chunksize and buffersize must be 1 or more")
    if chunksize == 1 or isinstance(fn, str):
        return fn, iter(rows), False
    return _run_chunk, ((fn, chunk) for chunk in _chunks(rows, chunksize)), True


def shown(results: Iterator[Any], progress: bool | str, total: int | None) -> Iterator[Any]:
    """The results, with a bar on standard error that shows how many there are so far, if it is wanted."""
    return _with_bar(results, progress if isinstance(progress, str) else "", total) if progress else results


def total_of(iterables: Sequence[Iterable[Any]]) -> int | None:
    """How many rows there will be, if that is known."""
    sizes = [len(one) for one in iterables if isinstance(one, Sized)]
    return min(sizes) if len(sizes) == len(iterables) and sizes else None


def _with_bar(results: Iterator[Any], text: str, total: int | None) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import track

    try:
        yield from track(results, description=text, total=total, console=Console(file=sys.stderr))
    finally:
        close = getattr(results, "close", None)
        if close is not None:
            close()


def _left_s(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _chunks(rows: Iterable[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    source = iter(rows)
    while chunk := list(itertools.islice(source, size)):
        yield chunk


def _run_chunk(function: Callable[..., Any], rows: list[tuple[Any, ...]]) -> list[Any]:
    """In the worker: several calls as one."""
    from virgo.cpu.outcomes import finished

    return [finished(function(*row)) for row in rows]
