"""Processors for asyncio: the same surface as `virgo.cpu.client`, with tasks in the place of futures.

    await cloud.cpu.clone(pow, 2, 10)
    task = cloud.cpu.submit(simulate, seed=7)
    async for image in cloud.cpu.map(render, frames, chunksize=8):
        ...

On the machine of the node calls go straight to workers that this client leases (see `crew`), else through the
node; callables go to another engine if one is configured (see `backends`). Cancelling a task that waits for a
call ends the call: what it ran is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from virgo.config import CpuConfig
from virgo.cpu import messages
from virgo.cpu.afollow import run_followed
from virgo.cpu.apart import Apart, Hand
from virgo.cpu.backends import backend_of
from virgo.cpu.calls import Book, Item, Task, may_go_again, pause_s
from virgo.cpu.client import (
    EXPORTS,
    TASKS,
    WORKERS,
    Export,
    by_node,
    kill_of,
    output_of,
    publish_of,
    unpublish_of,
)
from virgo.cpu.crew import Crew
from virgo.cpu.desk import Desk, Ticket
from virgo.cpu.follow import Output
from virgo.cpu.lessee import Lessee
from virgo.cpu.maps import Target, mapping, total_of
from virgo.cpu.near import Placed
from virgo.cpu.seen import TaskInfo, Written
from virgo.cpu.shipping import arguments_of
from virgo.cpu.tasks import CallOptions, task_of
from virgo.errors import VirgoError
from virgo.limits import ASYNC_CALLS_MAX
from virgo.wire.aclient import AsyncClient
from virgo.wire.call import AsyncRunner
from virgo.wire.client import Client

if TYPE_CHECKING:
    from virgo.cpu.backends.base import Backend


class AsyncCpuClient:
    """The processors of the cloud, for one event loop; at the end of an `async with` it waits for its tasks.

    Args:
        runner: connections to a node; at most ASYNC_CALLS_MAX are used at once.
        config: whether there is such an engine. Raises BadConfig if it is not installed.
    """

    def __init__(self, runner: AsyncRunner, config: CpuConfig | None = None) -> None:
        self._runner = runner
        self._book = Book()
        self._backend = backend_of(config or CpuConfig(), self._book)
        self._lessee: Lessee | None = None
        self._desk: Desk | None = None
        self._hand = Hand(runner.address.path if isinstance(runner, AsyncClient) else "")
        if isinstance(runner, AsyncClient) and runner.address.path:
            self._lessee = Lessee(Client(runner.address), self._book, self._send_back, own=True)
        self._lanes = asyncio.Semaphore(ASYNC_CALLS_MAX)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._shut = False

    def __repr__(self) -> str:
        return f"<AsyncCpuClient {self._outstanding} outstanding{' shut down' if self._shut else ''}>"

    async def __aenter__(self) -> AsyncCpuClient:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.shutdown()

    async def clone(
        self,
        target: Target,
        /,
        *args: Any,
        node: str = "",
        cpus: int = 1,
        gpus: int = 0,
        memory: int | str = 0,
        near: str | Placed | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - it travels to the node
        retries: int = 0,
        priority: int = 0,
        output: Output | None = None,
        **kwargs: Any,
    ) -> Any:
        """See `CpuClient.clone`."""
        task = task_of(
            target, args, node=node, cpus=cpus, gpus=gpus, memory=memory, near=near, timeout=timeout,
            retries=retries, priority=priority, output=output,
        )  # fmt: skip
        return await self._run(task, arguments_of(task, args, kwargs))

    async def _run(self, task: Task, arguments: bytes | Apart) -> Any:
        """Run a call, by a leased worker if one can, or by the engine that is to."""
        crew: Crew | Backend | None
        if self._backend is not None and task.trusted:
            crew = self._backend.crew_for(task)
        elif task.write is not None:
            async with self._lanes:
                found = await run_followed(
                    self._runner, self._follow, task, task.write, arguments, self._hand
                )
            return messages.as_result(found, trusted=task.trusted)
        else:
            crew = None if self._lessee is None else self._lessee.crew_for(task)
        if crew is None:
            return await self._run_by_node(task, arguments)
        if self._desk is None:
            self._desk = Desk(asyncio.get_running_loop())
        ticket = Ticket(self._desk)
        item = Item(task, arguments, ticket, 0, self._book)
        self._book.add((item,))
        crew.submit((item,))
        try:
            outcome = await ticket.outcome
        except asyncio.CancelledError:
            await self._desk.ended(crew, item)
            raise
        if outcome is None:
            return await self._run_by_node(task, arguments)
        return messages.as_result(outcome, trusted=task.trusted)

    async def _run_by_node(self, task: Task, arguments: bytes | Apart) -> Any:
        lost = 0
        while True:
            try:
                async with self._lanes:
                    return await self._runner.run(by_node(task, arguments, self._hand))
            except VirgoError as error:
                if not may_go_again(task, error, lost):
                    raise
            lost += 1
            await asyncio.sleep(pause_s(lost))

    def _send_back(self, items: list[Item]) -> None:
        """Calls that are not for leased workers; from the crew's thread."""
        for item in items:
            if item.open:
                self._book.open.discard(item)
                assert isinstance(item.sink, Ticket)
                item.sink.send_back()

    def submit(self, target: Target, /, *args: Any, **kwargs: Any) -> asyncio.Task[Any]:
        """The same as a task; `submit_to` takes the options. Raises RuntimeError after `shutdown`."""
        return self.submit_to(target, args, kwargs)

    def submit_to(
        self,
        target: Target,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> asyncio.Task[Any]:
        """`submit` with the options of `clone`."""
        self._check_open()
        call = task_of(target, args, **options)
        work = self._run(call, arguments_of(call, args, kwargs or {}))
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def map(
        self,
        fn: Target,
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        progress: bool | str = False,
    ) -> AsyncGenerator[Any, None]:
        """Results in the order of the arguments, as they come; the first failure cancels the rest.

        The first calls begin now. Further arguments are taken as results are, so `iterables` may be endless.

        Args:
            fn: a callable or a name.
            iterables: its arguments.
            timeout: seconds until `__anext__` raises TimeoutError; the calls outstanding are cancelled.
            chunksize: how many calls travel and run as one; only for a callable.
            buffersize: how many results may be outstanding at once, None for ASYNC_CALLS_MAX.
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
    ) -> AsyncGenerator[Any, None]:
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
    ) -> AsyncGenerator[Any, None]:
        """`map` with the results in the order in which the calls end."""
        return self._map(
            fn, zip(*iterables, strict=False), timeout, chunksize, buffersize, progress, total_of(iterables),
            ordered=False,
        )  # fmt: skip

    def _map(
        self,
        fn: Target,
        given: Iterable[tuple[Any, ...]],
        timeout: float | None,
        chunksize: int,
        buffersize: int | None,
        progress: bool | str,
        total: int | None,
        *,
        ordered: bool = True,
    ) -> AsyncGenerator[Any, None]:
        target, rows, chunked = mapping(fn, given, chunksize, buffersize)
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        self._check_open()
        first = itertools.islice(rows, buffersize or ASYNC_CALLS_MAX)
        tasks = deque(self.submit(target, *row) for row in first)
        results = self._results(target, rows, tasks, deadline, chunked, ordered=ordered)
        return _with_bar(results, progress, total) if progress else results

    async def _results(
        self,
        target: Target,
        rows: Iterator[tuple[Any, ...]],
        tasks: deque[asyncio.Task[Any]],
        deadline: float | None,
        chunked: bool,
        *,
        ordered: bool,
    ) -> AsyncGenerator[Any, None]:
        try:
            while tasks:
                async with asyncio.timeout_at(deadline):
                    if not ordered:
                        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                        ended = next(place for place, task in enumerate(tasks) if task.done())
                        tasks.rotate(-ended)
                    result = await tasks[0]
                tasks.popleft()
                for row in itertools.islice(rows, 1):
                    tasks.append(self.submit(target, *row))
                if chunked:
                    for part in result:
                        yield part
                else:
                    yield result
        finally:
            await _cancel(tasks)

    async def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; wait for the tasks outstanding, or cancel them."""
        self._shut = True
        tasks = list(self._tasks)
        if cancel_futures:
            await _cancel(tasks)
        elif wait and tasks:
            await asyncio.wait(tasks)
        for one in (self._lessee, self._backend):
            if one is not None and not self._book.open:
                await asyncio.to_thread(one.close)

    async def close(self) -> None:
        """Take no more calls, and cancel those outstanding."""
        await self.shutdown(wait=False, cancel_futures=True)

    async def publish(self, function: Callable[..., Any], *, name: str = "") -> int:
        """See `CpuClient.publish`."""
        return await self._runner.run(publish_of(function, name))

    async def unpublish(self, name: str) -> None:
        """See `CpuClient.unpublish`."""
        await self._runner.run(unpublish_of(name))

    async def exports(self) -> list[Export]:
        """See `CpuClient.exports`."""
        return await self._runner.run(EXPORTS)

    async def tasks(self) -> list[TaskInfo]:
        """See `CpuClient.tasks`."""
        return await self._runner.run(TASKS)

    async def _follow(self, task: str, offset: int) -> Written:
        return await self._runner.run(output_of(task, offset, follows=True))

    async def output(self, task: str, offset: int = 0) -> Written:
        """See `CpuClient.output`."""
        return await self._runner.run(output_of(task, offset))

    async def kill(self, task: str) -> None:
        """See `CpuClient.kill`."""
        await self._runner.run(kill_of(task))

    async def workers(self) -> int:
        """See `CpuClient.workers`."""
        if self._backend is not None:
            return await asyncio.wrap_future(self._backend.workers())
        return await self._runner.run(WORKERS)

    def stats(self) -> dict[str, Any]:
        """Tasks of this client without outcome."""
        engine = {} if self._backend is None else self._backend.stats()
        return {"outstanding": self._outstanding, "shut": self._shut, **engine}

    @property
    def _outstanding(self) -> int:
        return sum(not task.done() for task in self._tasks)

    def _check_open(self) -> None:
        if self._shut:
            raise RuntimeError("cannot schedule new futures after shutdown")


async def _with_bar(
    results: AsyncGenerator[Any, None], progress: bool | str, total: int | None
) -> AsyncGenerator[Any, None]:
    """The results, with a bar on standard error that shows how many there are so far."""
    from rich.console import Console
    from rich.progress import Progress

    async with contextlib.aclosing(results):
        with Progress(console=Console(file=sys.stderr)) as bar:
            task = bar.add_task(progress if isinstance(progress, str) else "", total=total)
            async for result in results:
                bar.advance(task)
                yield result


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended; what becomes of them is of no more interest."""
    left = [task for task in tasks if not task.done()]
    for task in left:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
