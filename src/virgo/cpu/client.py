"""What users hold: `cloud.cpu`, an executor whose workers are the cloud's processors.

    cloud.cpu.clone(pow, 2, 10)                     # run it on the least loaded node, wait for the result
    future = cloud.cpu.submit(simulate, seed=7)     # the same, without waiting
    list(cloud.cpu.map(render, frames, chunksize=8))
    cloud.cpu.clone("wordcount", "a b a")           # by name: an exported function or a program

A callable is shipped with cloudpickle: functions of `__main__` and lambdas by value, functions of modules
by reference, so the nodes must be able to import those modules (or call `register_pickle_by_value` of
cloudpickle on them). That needs the role `exec`; calls by name need only `write`, and neither side unpickles
anything for them.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import cloudpickle
import msgspec

from virgo.config import CpuConfig
from virgo.cpu import messages
from virgo.cpu.apart import Apart, Hand
from virgo.cpu.backends import backend_of
from virgo.cpu.calls import Book, Item, Sink, Task
from virgo.cpu.channel import Channel
from virgo.cpu.crew import Crew
from virgo.cpu.exports import check_name, summary_of
from virgo.cpu.follow import Follower, Output
from virgo.cpu.futures import CpuFuture
from virgo.cpu.lessee import Lessee
from virgo.cpu.maps import Maps, Target, mapping, shown, total_of
from virgo.cpu.near import Placed
from virgo.cpu.seen import TaskInfo, Written
from virgo.cpu.shipping import arguments_of
from virgo.cpu.tasks import CallOptions, task_of
from virgo.limits import CALL_TERMINATE_S
from virgo.wire.call import Call, Runner, as_nothing, as_text
from virgo.wire.client import Client

T = TypeVar("T")
# Time for a node to stop a call whose deadline has passed, and to say so.
_GRACE_S = CALL_TERMINATE_S + 3.0


@dataclass(frozen=True, slots=True)
class Export:
    """Something that can be called by name: `kind` is `function`, `program` or `published`."""

    name: str
    kind: str
    summary: str


def by_node(task: Task, arguments: bytes | Apart, hand: Hand) -> Call[Any]:
    """The call of a task as a request to the node."""
    trusted = task.trusted
    place = hand.place() if trusted else None
    verb = "CPU.CALL" if trusted else "CPU.INVOKE"
    return Call(
        (verb, task.options(place=place), task.function, hand.carry(arguments)),
        lambda outcome: messages.as_result(messages.arrived(outcome, place), trusted=trusted),
        task.timeout_ms / 1000 + _GRACE_S if task.timeout_ms else math.inf,
    )


def publish_of(function: Callable[..., Any], name: str) -> Call[int]:
    """Publish a function."""
    name = check_name(name or getattr(function, "__name__", ""))
    return Call(("CPU.PUBLISH", name, cloudpickle.dumps(function, 5), summary_of(function)), int)


EXPORTS: Call[list[Export]] = Call(
    ("CPU.EXPORTS",), lambda reply: [Export(*map(as_text, entry)) for entry in reply]
)

if TYPE_CHECKING:
    from virgo.cpu.backends.base import Backend


def _as_workers(reply: bytes) -> int:
    return sum(max(1, node["load"].get("workers", 1)) for node in msgspec.json.decode(reply))


WORKERS: Call[int] = Call(("NODES",), _as_workers)


TASKS: Call[list[TaskInfo]] = Call(("CPU.PS",), lambda reply: msgspec.json.decode(reply, type=list[TaskInfo]))


def output_of(task: str, offset: int, *, follows: bool = False) -> Call[Written]:
    """What a call has written; who follows it has read all before that."""
    request = ("CPU.LOG", task, offset, "FOLLOWS") if follows else ("CPU.LOG", task, offset)
    return Call(request, lambda reply: msgspec.msgpack.decode(reply, type=Written))


def kill_of(task: str) -> Call[None]:
    """End a call, whosever it is."""
    return Call(("CPU.KILL", task), as_nothing)


def unpublish_of(name: str) -> Call[None]:
    """Take a published function back."""
    return Call(("CPU.UNPUBLISH", name), as_nothing)


class CpuClient(Executor):
    """The processors of the cloud, as a `concurrent.futures.Executor`.

    On the machine of the node, calls go straight to workers that this client leases (see `crew`), else
    through the node (see `channel`); callables go to another engine if one is configured (see `backends`).

    Args:
        runner: connections to a node.
        config: whether there is such an engine. Raises BadConfig if it is not installed.
    """

    def __init__(self, runner: Runner, config: CpuConfig | None = None) -> None:
        self._runner = runner
        self._config = config or CpuConfig()
        self._shut = False
        self._begin()

    def _begin(self) -> None:
        """What a forked child must have of its own."""
        self._pid = os.getpid()
        self._book = Book()
        self._hand = Hand(self._runner.address.path if isinstance(self._runner, Client) else "")
        self._channel = Channel(self._runner, self._hand)
        self._follower = Follower(self._follow, self._cancel)
        self._backend = backend_of(self._config, self._book)
        self._lessee: Lessee | None = None
        if isinstance(self._runner, Client) and self._runner.address.path:
            self._lessee = Lessee(self._runner, self._book, self._channel.send)

    def __repr__(self) -> str:
        return f"<CpuClient {len(self._book.open)} outstanding{' shut down' if self._shut else ''}>"

    def clone(
        self,
        target: Target,
        /,
        *args: Any,
        node: str = "",
        cpus: int = 1,
        gpus: int = 0,
        memory: int | str = 0,
        near: str | Placed | None = None,
        timeout: float | None = None,
        retries: int = 0,
        priority: int = 0,
        output: Output | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run a callable, or an export by its name, on the least loaded node, and wait for its result.

        Args:
            target: a callable, or the name of an exported function or program; an `async def` is run to its
                end in the worker.
            args, kwargs: its arguments.
            node, cpus, gpus, memory, near, timeout, retries, priority, output: see `CallOptions`.

        Raises:
            Exception: the very exception that the function raised, caused by a CallFailed that holds the
                remote traceback.
            CallFailed: it ended otherwise, or the exception does not unpickle.
            DeadlineExceeded: it ran into `timeout`, and was stopped.
            NodeLost: its node was lost; whether it had ended there is unknown.
            NoNode: no node has what it needs.
            NotExported, Denied, Busy: it was not begun.
        """
        task = task_of(
            target, args, node=node, cpus=cpus, gpus=gpus, memory=memory, near=near, timeout=timeout,
            retries=retries, priority=priority, output=output,
        )  # fmt: skip
        arguments = arguments_of(task, args, kwargs)
        crew = self._crew_for(task)
        if crew is not None:
            outcome = crew.call(task, arguments)
            if outcome is not None:
                return messages.as_result(outcome, trusted=task.trusted)
        elif task.write is None and not task.retries:
            return self._runner.run(by_node(task, arguments, self._hand))
        future = self._submit(task, arguments)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # what nobody waits for any more, after Ctrl-C for example
            raise

    def submit(self, target: Target, /, *args: Any, **kwargs: Any) -> CpuFuture:
        """The same without waiting; `submit_to` takes the options. Raises RuntimeError after `shutdown`."""
        return self.submit_to(target, args, kwargs)

    def submit_to(
        self,
        target: Target,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> CpuFuture:
        """`submit` with the options of `clone`."""
        self._check_open()
        task = task_of(target, args, **options)
        return self._submit(task, arguments_of(task, args, kwargs or {}))

    def _submit(self, task: Task, arguments: bytes | Apart) -> CpuFuture:
        future = CpuFuture(task.trusted, self._cancel, self._runs)
        sink: Sink = future
        if task.write is not None:
            sink = self._follower.follow(future, task.write)
        item = future.item = Item(task, arguments, sink, 0, self._book)
        self._send(task, (item,))
        return future

    def _send(self, task: Task, items: Sequence[Item]) -> None:
        """Have calls run; they are of one task."""
        crew = self._crew_for(task)
        self._book.add(items)
        if crew is not None:
            crew.submit(items)
        else:
            self._channel.send(items)

    def map(
        self,
        fn: Target,
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        progress: bool | str = False,
    ) -> Iterator[Any]:
        """Results in the order of the arguments, as `Executor.map`.

        Calls travel many at once by themselves, as many as are run in a few milliseconds.

        Args:
            fn: a callable or a name.
            iterables: its arguments.
            timeout: seconds until `__next__` raises TimeoutError; the calls outstanding are cancelled.
            chunksize: how many calls run as one; only for a callable.
            buffersize: how many results may be outstanding at once, None for all.
            progress: show a bar on standard error, with this text if it is one.
        """
        return self._map(
            fn, zip(*iterables, strict=False), timeout, chunksize, buffersize, progress, total_of(iterables)
        )

    def starmap(
        self,
        fn: Target,
        rows: Iterable[Sequence[Any]],
        *,
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        progress: bool | str = False,
    ) -> Iterator[Any]:
        """`map` over rows that hold all arguments of a call each: `fn(*row)`."""
        return self._map(fn, map(tuple, rows), timeout, chunksize, buffersize, progress, total_of([rows]))

    def map_unordered(
        self,
        fn: Target,
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        progress: bool | str = False,
    ) -> Iterator[Any]:
        """`map` with the results as they come; the first exception ends it."""
        return self._map(
            fn, zip(*iterables, strict=False), timeout, chunksize, buffersize, progress, total_of(iterables),
            ordered=False,
        )  # fmt: skip

    def _map(
        self,
        fn: Target,
        rows: Iterable[tuple[Any, ...]],
        timeout: float | None,
        chunksize: int,
        buffersize: int | None,
        progress: bool | str,
        total: int | None,
        *,
        ordered: bool = True,
    ) -> Iterator[Any]:
        target, calls, chunked = mapping(fn, rows, chunksize, buffersize)
        self._check_open()
        maps = Maps(self._book, self._send, self._cancel)
        begin = maps.ordered if ordered else maps.unordered
        results = begin(task_of(target), calls, timeout, buffersize)
        return shown(_flat(results) if chunked else results, progress, total)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; wait for those outstanding; `cancel_futures` drops what has not begun."""
        self._shut = True
        if self._pid != os.getpid():  # forked: the calls are the parent's
            return
        if cancel_futures:
            self._cancel(list(self._book.open), running=False)
        if wait:
            self._book.wait()
        if self._book.open:
            return
        if self._lessee is not None:
            self._lessee.close()
        if self._backend is not None:
            self._backend.close()

    def close(self) -> None:
        """Take no more calls, and cancel those outstanding, also those that run."""
        self._shut = True
        if self._pid == os.getpid():
            self._cancel(list(self._book.open))
        self.shutdown(wait=False)

    def _cancel(self, items: list[Item], *, running: bool = True) -> None:
        """End calls, or those that do not run; returns when they have ended, by this or by themselves."""
        if self._pid != os.getpid() or not items:
            return
        if self._backend is not None:
            self._backend.cancel([item for item in items if item.task.trusted], running=running)
            items = [item for item in items if not item.task.trusted]
        if self._lessee is not None:
            self._lessee.cancel(items, running=running)
        left = [item for item in items if item.open and item.key]
        if left:
            self._channel.cancel(left, running=running)

    def _runs(self, item: Item) -> bool:
        """Whether a worker or a node has a call."""
        if self._backend is not None and item.task.trusted:
            return self._backend.runs(item)
        return item.key != "" or (self._lessee is not None and self._lessee.runs(item))

    def _crew_for(self, task: Task) -> Crew | Backend | None:
        """The leased workers, if they can run the task, or the engine that is to."""
        if self._pid != os.getpid():  # forked: threads, workers and futures are the parent's
            self._begin()
        if self._backend is not None and task.trusted:
            return self._backend.crew_for(task)
        return None if self._lessee is None else self._lessee.crew_for(task)

    def publish(self, function: Callable[..., Any], *, name: str = "") -> int:
        """Let a function be called by name on every node, until `unpublish`; returns its version.

        Raises:
            TooLarge: with what it captures it does not fit.
            BadArgument: a node offers something of that name itself.
        """
        return self._runner.run(publish_of(function, name))

    def unpublish(self, name: str) -> None:
        """Take a published function back. Raises NotExported."""
        self._runner.run(unpublish_of(name))

    def exports(self) -> list[Export]:
        """What can be called by name through this node."""
        return self._runner.run(EXPORTS)

    def tasks(self) -> list[TaskInfo]:
        """What runs and what waits, on all nodes that answer; what waits at a client is its own business."""
        return self._runner.run(TASKS)

    def _follow(self, task: str, offset: int) -> Written:
        return self._runner.run(output_of(task, offset, follows=True))

    def output(self, task: str, offset: int = 0) -> Written:
        """What a call has written, or writes: some of it, from an offset on.

        Args:
            task: its id, of `tasks`, or of `virgo.context` inside it.
            offset: bytes to leave out.

        Raises:
            BadArgument: it has written nothing that is kept.
            Denied: it is another identity's, and you are no admin.
        """
        return self._runner.run(output_of(task, offset))

    def kill(self, task: str) -> None:
        """End a call, and return when it is dead; who waits for it gets a CallFailed that says by whom.

        Args:
            task: its id, of `tasks`. One's own calls are cancelled by their futures.

        Raises:
            BadArgument: no such call runs, or waits at a node.
            Denied: it is another identity's, and you are no admin.
        """
        self._runner.run(kill_of(task))

    def workers(self) -> int:
        """Calls that the nodes of the cloud run at once, or the engine that runs callables."""
        if self._backend is not None:
            return self._backend.workers().result()
        return self._runner.run(WORKERS)

    @property
    def _max_workers(self) -> int:
        """What Dask asks an executor for, when it is given one as its scheduler."""
        return self.workers()

    def stats(self) -> dict[str, Any]:
        """Calls of this client without outcome."""
        leased = {} if self._lessee is None else self._lessee.stats()
        engine = {} if self._backend is None else self._backend.stats()
        return {"outstanding": len(self._book.open), "shut": self._shut, **leased, **engine}

    def _check_open(self) -> None:
        if self._shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self._pid != os.getpid():  # before calls are made that belong to the parent's book
            self._begin()


def _flat(results: Iterator[list[Any]]) -> Iterator[Any]:
    """The parts of results that are lists; closing it closes these."""
    with contextlib.closing(results):  # type: ignore[type-var]
        for result in results:
            yield from result
