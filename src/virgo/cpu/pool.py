"""The workers of a node: hands them calls, ends them, and says how they ended.

Promises: a call is handed to one worker, once. A call whose deadline passes or that is cancelled has its
worker's process group terminated, then killed, and `run` returns when that is dead. A worker that dies
takes its own call with it and no other. `stop`, and the death of this process however sudden, leave none.

Which call goes where is decided by `core.Ledger`; `processes` makes the processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from virgo.cpu import messages
from virgo.cpu.core import Effect, Fork, Ledger, Retire, Start
from virgo.cpu.deaths import Deaths
from virgo.cpu.flow import Flow
from virgo.cpu.hiring import Hiring
from virgo.cpu.kills import Kills
from virgo.cpu.messages import Order, Work
from virgo.cpu.needs import Grant
from virgo.cpu.outputs import Entry, Outputs
from virgo.cpu.processes import TemplateProcess, WorkerProcess
from virgo.cpu.recalls import Recalls
from virgo.cpu.running import Call
from virgo.cpu.seen import TaskInfo
from virgo.cpu.stock import Stock
from virgo.errors import Busy, DeadlineExceeded, NodeLost, NotLoaded, VirgoError
from virgo.limits import (
    CALL_TERMINATE_S,
    FUNCTIONS_CACHED_MAX,
    WORKER_LOG_BYTES_MAX,
)

log = logging.getLogger("virgo.cpu")

_TRIM_S: Final = 1.0
_FORK_AGAIN_S: Final = 0.1


class WorkerPool:
    """The workers of one node. Use from one event loop.

    Args:
        node: the node's name, for messages and for the functions themselves.
        directory: where the workers' log file goes.
        target: workers that run at once when no call waits for another.
        imports: modules to import before workers are forked.
        environment: environment variables for the workers, beside those of this process.
        stock: what it has of other things than processors.
        memory_bytes: what a call that asks for no memory may hold, 0 for no limit.

    Attributes:
        stock: what it has of other things than processors.
        recalls: takes leases back for who waits.
        kills: ends calls for others than their callers.
        outputs: what its calls have written.
    """

    def __init__(
        self,
        *,
        node: str,
        directory: Path,
        target: int,
        imports: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        stock: Stock | None = None,
        memory_bytes: int = 0,
    ) -> None:
        self.node = node
        self.stock = stock or Stock(gpus=0, memory=0)
        self._memory_bytes = memory_bytes
        self._log_path = directory / "workers.log"
        self.outputs = Outputs(directory / "output")
        self._ledger = Ledger(target=target)
        self._template = TemplateProcess(
            self,
            node=node,
            imports=imports,
            log_path=self._log_path,
            environment={**os.environ, **(environment or {}), "VIRGO_NODE": node},
        )
        self._workers: dict[int, WorkerProcess] = {}
        self._calls: dict[int, Call] = {}
        self.recalls = Recalls(self._ledger, self._calls, self._workers)
        self._flow = Flow(self.outputs, self._workers)
        self.kills = Kills(node, self._ledger, self._calls, self._workers)
        self._at: dict[int, Call] = {}  # by worker
        self._serial = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._deaths = Deaths(node)
        self.done = self.failed = 0

    def __repr__(self) -> str:
        return f"<WorkerPool {self.node} {self._ledger!r}>"

    def stats(self) -> dict[str, Any]:
        """Workers and calls, now and so far."""
        return {
            "workers": self._ledger.workers,
            "workers_target": self._ledger.target,
            "busy": self._ledger.running,
            "waiting": self._ledger.waiting,
            "done": self.done,
            "failed": self.failed,
            "template_restarts": self._template.restarts,
        }

    @property
    def exports(self) -> dict[str, str]:
        """Names that its workers can call, each with a summary."""
        return self._template.exports

    @property
    def outstanding(self) -> int:
        """Places of calls running or waiting; a lease counts while its worker works."""
        return sum(call.work.needs.cpus for call in self._calls.values()) - len(self.recalls.idle())

    @property
    def at_work(self) -> bool:
        """Whether it has any calls or leases."""
        return bool(self._calls)

    @property
    def room(self) -> int:
        """Calls that would not have to wait for a worker, or but for a moment."""
        return self._ledger.room + len(self.recalls.idle())

    @property
    def target(self) -> int:
        """Workers that run at once when no call waits for another."""
        return self._ledger.target

    def tasks(self) -> list[TaskInfo]:
        """What its workers are at, and what waits for one."""
        now = time.monotonic()
        found = []
        for number, call in self._calls.items():
            worker = self._workers.get(self._ledger.worker_of(number) or 0)
            if worker is not None or call.hiring is None:  # a client who waits for a worker is no call
                found.append(call.describe(self.node, worker, now))
        return found

    def send_on(self, number: int) -> None:
        """Let a call be run elsewhere if no worker has it yet: its outcome is TAKEN."""
        if self._ledger.worker_of(number) is None and self._ledger.withdraw(number):
            self._calls[number].future.set_result(messages.TAKEN)

    def output(self, task: str) -> Entry | None:
        """What a call has written, or is writing; None if that is nothing that is kept."""
        found = self.outputs.find(task)
        if found is not None:
            return found
        for worker, call in self._at.items():
            if call.hiring is not None and not call.hiring.resting and call.task == task:
                return Entry(worker, call.label, call.owner, call.output_from)
        return None

    def pids(self) -> list[int]:
        """The processes: the template's first, then the workers'."""
        return [self._template.pid, *(worker.pid for worker in self._workers.values() if worker.pid)]

    async def start(self) -> None:
        """Start the template and one worker. Raises BadConfig, NotLoaded."""
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self.outputs.start()
        await self._template.start()
        self._spawn(self._tidy())
        self._apply(self._ledger.warm(1))

    async def stop(self) -> None:
        """End all workers and what their calls have started; outstanding calls fail with NodeLost."""
        self._stopping = True
        self.recalls.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for call in self._calls.values():
            if not call.future.done():
                call.future.set_exception(NodeLost(f"node {self.node} is stopping"))
        workers = list(self._workers.values())  # those of an earlier template among them
        for worker in workers:
            worker.kill("the node is stopping")
        await self._template.stop()
        if workers:
            await asyncio.wait([worker.gone for worker in workers], timeout=CALL_TERMINATE_S)
        self.outputs.close()

    def retarget(self, target: int) -> None:
        """Set how many workers run at once."""
        if target != self._ledger.target:
            self._apply(self._ledger.retarget(target))

    def lend(self, call: int) -> None:
        """The running call waits for a call of its own."""
        self._apply(self._ledger.lend(call))

    def reclaim(self, call: int) -> None:
        """A call that the running call waited for has ended."""
        self._ledger.reclaim(call)

    async def run(
        self,
        work: Work,
        *,
        deadline: float | None = None,
        nested: bool = False,
        extra: bool = False,
        started: Callable[[int], None] = lambda _number: None,
        hiring: Hiring | None = None,
    ) -> bytes:
        """Run a call on a worker and return its outcome; or lease a worker, and return when that is over.

        Args:
            work: the call.
            deadline: monotonic time at which it is stopped.
            nested, extra: see `core.Ledger.submit`.
            started: told the call's number here, for `lend` and `reclaim`.
            hiring: the lease.

        Raises:
            Busy: a bound is reached; nothing was started.
            DeadlineExceeded: it was stopped, and what it had started is dead.
            asyncio.CancelledError: the same.
            NoNode: it needs more than this node has.
            NodeLost: this node is stopping.
        """
        # Before a place, so that nobody holds one while he waits for what others hold who wait for a place.
        grant = await self._take(work, deadline)
        try:
            return await self._run(work, grant, deadline, nested, extra, started, hiring)
        finally:
            self.stock.give(grant)

    async def _take(self, work: Work, deadline: float | None) -> Grant:
        try:
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return await self.stock.take(work.needs)
        except TimeoutError:
            raise DeadlineExceeded(
                f"{work.label} was not begun on node {self.node} before its deadline"
            ) from None

    async def _run(
        self, work: Work, grant: Grant, deadline: float | None, nested: bool, extra: bool,
        started: Callable[[int], None], hiring: Hiring | None,
    ) -> bytes:  # fmt: skip
        if self._stopping:
            raise NotLoaded(f"the processor pool of node {self.node} is stopping")
        if not grant.memory and self._memory_bytes:
            grant = msgspec.structs.replace(grant, memory=self._memory_bytes)
        call = Call(next(self._serial), work, hiring, grant)
        started(call.number)
        self._calls[call.number] = call
        try:
            crew = None if hiring is None else hiring.crew
            places = work.needs.cpus
            self._apply(
                self._ledger.submit(call.number, nested=nested, extra=extra, crew=crew, places=places)
            )
            if self._ledger.waiting:
                self.recalls.press()
            await self._until_done(call, deadline)
            outcome = call.future.result()
            ok = outcome[:1] != messages.FAILED
        except BaseException:
            ok = False
            raise
        finally:
            del self._calls[call.number]
            if hiring is None:  # one that is sent on counts as done
                self.done += ok
                self.failed += not ok
        return outcome

    async def _until_done(self, call: Call, deadline: float | None) -> None:
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            await asyncio.wait([call.future], timeout=left_s)
        except asyncio.CancelledError:
            await self._abandon(call, "was cancelled")
            raise
        if not call.future.done():
            ran = await self._abandon(call, "ran into its deadline")
            raise DeadlineExceeded(
                f"{call.work.label} on node {self.node} ran into its deadline and was stopped"
                if ran
                else f"{call.work.label} was not begun on node {self.node} before its deadline"
            )

    async def _abandon(self, call: Call, reason: str) -> bool:
        """End a call, with its worker if it has one, and wait until that is dead."""
        number = self._ledger.worker_of(call.number)
        if number is None:
            self._ledger.withdraw(call.number)
            return False
        worker = self._workers[number]
        worker.terminate(f"{call.work.label} {reason}")
        cancelled = False
        while not worker.gone.done():
            try:
                await asyncio.shield(worker.gone)
            except asyncio.CancelledError:  # it takes CALL_TERMINATE_S and a moment: finish
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError
        return True

    # --- what workers say ---------------------------------------------------------------------

    def answered(self, worker: WorkerProcess, flags: bytes, outcome: bytes) -> None:
        """A worker has ended its call."""
        call = self._at.get(worker.number)
        if call is None:
            return
        if flags == messages.WROTE:
            number, label, start, end = messages.unpack(outcome)
            self.outputs.wrote(call.task_of(number), worker.number, label, call.owner, start, end)
            call.output_from = end
            return
        if worker.ending:
            return
        if outcome[:1] == messages.UNKNOWN:
            worker.known.clear()
            self._hand(worker, call)
            return
        del self._at[worker.number]
        self.outputs.ended(call.task)
        if not call.future.done():
            call.future.set_result(outcome)
        if messages.RETIRE in flags:
            worker.kill("its last call left processes behind")
            self._apply(self._ledger.gone(worker.number))
        else:
            self._apply(self._ledger.done(worker.number))

    def ended(self, worker: WorkerProcess) -> None:
        """A worker is dead: tell its call, and make another if there is work."""
        self._workers.pop(worker.number, None)
        call = self._at.pop(worker.number, None)
        if call is not None and call.hiring is not None:  # what it was at cannot say any more what it wrote
            end = self.outputs.size(worker.number)
            self.outputs.wrote(call.task, worker.number, call.label, call.owner, call.output_from, end)
        self.outputs.gone(worker.number)
        if call is not None and not call.future.done() and (call.killed or not worker.ending):
            died = call.killed or messages.failed(self._deaths.explain(call.label, worker.status))
            call.future.set_result(died)
        if not self._stopping:
            self._apply(self._ledger.gone(worker.number))

    # --- effects ------------------------------------------------------------------------------

    def _apply(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Start):
                call = self._at[effect.worker] = self._calls[effect.call]
                self._hand(self._workers[effect.worker], call)
            elif isinstance(effect, Fork):
                self._spawn(self._fork(effect.worker))
            elif isinstance(effect, Retire):
                self._workers[effect.worker].kill("it was not needed any more")

    def _hand(self, worker: WorkerProcess, call: Call) -> None:
        """Send a call to a worker; the function only if the worker does not have it."""
        work = call.work
        if call.hiring is not None:
            self._hand_over(worker, call, call.hiring)
            return
        call.began = time.monotonic()
        self.outputs.began(call.task, worker.number, work.label, call.owner, followed=work.followed)
        if work.followed:
            self._flow.watch()
        digest = function = b""
        if work.function:
            digest = hashlib.sha256(work.function).digest()
            if digest not in worker.known:
                function = work.function
            worker.known[digest] = None
            worker.known.move_to_end(digest)
            if len(worker.known) > FUNCTIONS_CACHED_MAX:
                worker.known.popitem(last=False)
        order = Order(
            work.form, work.label, work.name, digest, work.program, work.context, call.grant, work.land
        )
        worker.send(messages.encode_order(order), function, *work.arguments)

    def _hand_over(self, worker: WorkerProcess, call: Call, hiring: Hiring) -> None:
        """Give a worker the connection of the client who leases it."""
        call.output_from = self.outputs.size(worker.number)
        order = messages.encode_order(Order(call.work.form, call.work.label, context=call.work.context))
        try:
            worker.hand(hiring.start(), order)
        except (OSError, VirgoError) as error:
            call.future.set_exception(Busy(f"node {self.node} cannot hand a worker over: {error}"))
            call.future.exception()  # which nobody may be there to hear
            del self._at[worker.number]
            self._apply(self._ledger.done(worker.number))
            return
        if not hiring.handed.done():
            hiring.handed.set_result(None)

    async def _fork(self, number: int) -> None:
        """Make a worker; out of descriptors or without a template, try until there is one."""
        worker: WorkerProcess | None = None
        told = ""
        while worker is None:
            try:
                worker = await self._template.fork(number, self.outputs)
            except (OSError, NotLoaded) as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("worker %d cannot be made yet: %s", number, told)
                await asyncio.sleep(_FORK_AGAIN_S)
        if worker.gone.done():
            self._apply(self._ledger.gone(number))
        else:
            self._workers[number] = worker
            self._apply(self._ledger.ready(number))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tidy(self) -> None:
        """Once a second: end surplus workers, and keep the log file within its bound."""
        while True:
            await asyncio.sleep(_TRIM_S)
            self._apply(self._ledger.trim())
            self.recalls.take_unused()
            self.outputs.trim()
            with contextlib.suppress(FileNotFoundError):
                if self._log_path.stat().st_size > WORKER_LOG_BYTES_MAX:
                    os.truncate(self._log_path, 0)  # all write to it in append mode
