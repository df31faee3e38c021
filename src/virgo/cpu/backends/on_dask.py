"""Calls on a Dask cluster: `cpu.backend = "dask"`.

Dask runs a task again when its worker is lost, or the worker that has its result. So each call is claimed
at the scheduler before it begins (`claims`), by a plugin that the first client puts there: it runs at most
once.

Dask cannot kill what a worker's thread runs. A call that is to be stopped gets an exception into its thread,
which ends it at its next step in Python; while it is inside C (a long `time.sleep`, NumPy) it goes on, which
is waited for a moment only.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from typing import Any, Final

import dask
import distributed
from dask.utils import parse_bytes
from distributed import KilledWorker, get_worker
from distributed.client import FutureCancelledError
from distributed.comm import resolve_address
from distributed.diagnostics.plugin import SchedulerPlugin

from virgo.cpu import messages
from virgo.cpu.backends import remote
from virgo.cpu.backends.base import Ended
from virgo.cpu.backends.claims import Claims
from virgo.cpu.calls import Item, Task
from virgo.cpu.needs import PLAIN
from virgo.errors import BadConfig, CallFailed, Cancelled, NodeLost, NoNode, NotRunning, VirgoError
from virgo.limits import CALL_TERMINATE_S, REQUEST_DEADLINE_S

_CONNECT_S: Final = 5.0
_PLUGIN: Final = "virgo-claims"
_MARK: Final = "-virgo"
_LARGE: Final = "distributed.admin.large-graph-warning-threshold"


# --- at the scheduler -----------------------------------------------------------------------------


class ClaimsPlugin(SchedulerPlugin):  # type: ignore[misc]
    """Holds the claims of all calls of a cluster, for all clients."""

    name = _PLUGIN
    idempotent = True

    def start(self, scheduler: Any) -> None:
        """Serve at the scheduler."""
        self._scheduler = scheduler
        self._claims = Claims()
        scheduler.handlers.update(
            virgo_claim=self.claim,
            virgo_withdraw=self.withdraw,
            virgo_begun=self.begun,
            virgo_fits=self.fits,
        )

    def claim(self, key: str, runs_max: int, where: str) -> bytes:
        """See `Claims.claim`; a task that the scheduler has forgotten was taken back."""
        task = self._scheduler.tasks.get(key)
        if task is None:
            return messages.TAKEN
        instead, last = self._claims.claim(key, runs_max, where)
        # If its worker dies, Dask gives it up at once instead of handing it to another one.
        task.suspicious = self._scheduler.allowed_failures if last else 0
        return instead

    def withdraw(self, keys: Sequence[str]) -> list[str]:
        """See `Claims.withdraw`."""
        return self._claims.withdraw(keys)

    def begun(self, keys: Sequence[str]) -> dict[str, str]:
        """See `Claims.begun`."""
        return self._claims.begun(keys)

    def fits(self, resources: dict[str, float]) -> bool:
        """Whether some worker has all of these, or there is none yet."""
        workers = self._scheduler.workers.values()
        return not workers or any(
            all(worker.resources.get(name, 0) >= amount for name, amount in resources.items())
            for worker in workers
        )

    def transition(self, key: object, _start: str, finish: str, *_args: object, **_options: object) -> None:
        """A task has changed its state."""
        if not isinstance(key, str) or _MARK not in key:
            return
        if finish == "forgotten":
            self._claims.forget(key)
        elif finish == "processing" and not self._claims.runs(key):
            # Workers that died with it waiting in them say nothing of it.
            self._scheduler.tasks[key].suspicious = 0


# --- at a worker ----------------------------------------------------------------------------------


class _Stopped(BaseException):
    """Raised in a thread whose call is to end."""


class _Threads:
    """Which thread runs which call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[str, int] = {}
        self._stopped: set[str] = set()

    def stop(self, keys: Sequence[str]) -> None:
        """End those of these calls that run here."""
        for key in keys:
            with self._lock:
                if key in self._of and key not in self._stopped:
                    self._stopped.add(key)
                    _throw(self._of[key], _Stopped)

    def run(self, key: str, work: Callable[[], bytes]) -> bytes:
        """The outcome of a call in this thread, STOPPED if it was stopped before it had a result."""
        thread = threading.get_ident()
        with self._lock:
            self._of[key] = thread
        stopped = False
        try:
            try:
                outcome = work()
            finally:
                with self._lock:
                    self._of.pop(key, None)
                    stopped = key in self._stopped
                    self._stopped.discard(key)
                    _throw(thread, None)  # it may be on its way still
        except _Stopped:
            with self._lock:
                self._of.pop(key, None)
                self._stopped.discard(key)
            return remote.STOPPED
        return remote.STOPPED if stopped and outcome[:1] == messages.FAILED else outcome


_threads = _Threads()


def _throw(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception in another thread of this process, or take one back."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error and ctypes.py_object(error))


def stop(keys: Sequence[str]) -> None:
    """End calls of this worker."""
    _threads.stop(keys)


def call(arguments: bytes, *, head: bytes, function: bytes, runs_max: int) -> bytes:
    """Run a call, if nobody has run it, or taken it back."""
    worker = get_worker()
    key = worker.get_current_task()
    claim = worker.scheduler.virgo_claim(key=key, runs_max=runs_max, where=worker.address)
    instead: bytes = asyncio.run_coroutine_threadsafe(claim, worker.loop.asyncio_loop).result()
    return instead or _threads.run(key, lambda: remote.run(key, head, function, arguments))


# --- at the client --------------------------------------------------------------------------------


class DaskEngine:
    """See `Engine`.

    Args:
        address: of the scheduler; "" for the one of Dask's own configuration.
    """

    title = "Dask"

    def __init__(self, address: str) -> None:
        self._address = address
        self._prefix = os.urandom(8).hex()
        self._serial = 0
        self._client: Any = None
        self._futures: dict[Item, Any] = {}

    def __repr__(self) -> str:
        return f"<DaskEngine {self._address}{'' if self._client else ', not connected'}>"

    def check(self, task: Task) -> None:
        """See Engine."""

    def open(self) -> None:
        """See Engine."""
        if self._client is not None:
            if self._client.status == "running":
                return
            self.close()  # a scheduler that was begun anew has no plugin yet
            self._client = None
        address = self._address or dask.config.get("scheduler-address", None)
        if not address:
            raise BadConfig(
                "cpu.backend is dask, but nothing says where its scheduler is",
                hint="Set cpu.backend_address, for example to tcp://HOST:8786, or DASK_SCHEDULER_ADDRESS.",
            )
        try:
            resolve_address(address)
            client = distributed.Client(address, set_as_default=False, name="virgo", timeout=_CONNECT_S)
        except ValueError as error:
            raise BadConfig(
                f"cpu.backend_address is {address}, which is no address of a Dask scheduler: {error}",
                hint="It is like tcp://HOST:8786.",
            ) from error
        except (OSError, TimeoutError) as error:
            raise NotRunning(
                f"no Dask scheduler answers at {address}",
                hint="`dask scheduler` starts one; cpu.backend_address says where it is.",
            ) from error
        try:
            client.register_plugin(ClaimsPlugin())
        except Exception as error:
            client.close()
            raise BadConfig(
                f"the Dask scheduler at {address} does not take VIRGO's plugin: {error}",
                hint="VIRGO must be installed there and at the workers; distributed.scheduler.pickle be on.",
            ) from error
        self._client = client

    def begin(self, items: Sequence[Item], ended: Ended) -> None:
        """See Engine."""
        task = items[0].task
        resources = self._resources(task)
        label = re.sub(r"\W+", "_", task.label)
        keys = []
        for _ in items:
            self._serial += 1
            keys.append(f"{label}{_MARK}{self._prefix}{self._serial:x}")
        size = len(task.function) + sum(len(item.arguments) for item in items)
        # Dask advises to leave large arguments at its workers, which its own users can.
        large = max(parse_bytes(dask.config.get(_LARGE)), 2 * size)
        with dask.config.set({_LARGE: large}):
            futures = self._client.map(
                call, [item.arguments for item in items],
                head=task.head(), function=task.function, runs_max=task.retries + 1,
                key=keys, pure=False, retries=0, priority=task.priority, resources=resources,
            )  # fmt: skip
        for item, future in zip(items, futures, strict=True):
            self._futures[item] = future
            self._client.loop.add_callback(self._follow, item, future, ended)

    def _resources(self, task: Task) -> dict[str, float] | None:
        needs = task.needs
        if needs == PLAIN:
            return None
        found: dict[str, float] = {"CPU": needs.cpus} if needs.cpus > 1 else {}
        found |= {"GPU": needs.gpus} if needs.gpus else {}
        found |= {"MEMORY": needs.memory} if needs.memory else {}
        if not self._ask(self._client.scheduler.virgo_fits, resources=found):
            raise NoNode(
                f"{task.label} needs {needs}, which no Dask worker says that it has",
                hint="They say it when they are started: dask worker --resources 'CPU=4,GPU=1,MEMORY=8e9'.",
            )
        return found

    async def _follow(self, item: Item, future: Any, ended: Ended) -> None:
        """Wait for what a call comes to; in Dask's loop."""
        try:
            outcome = await future
        except CancelledError as error:
            outcome = self._cancelled(error, item.task)
        except KilledWorker as error:
            outcome = CallFailed(
                f"{item.task.label} lost its worker {error.last_worker.address}; how it ended is unknown",
                hint="The log of that worker, or of its nanny, may say it.",
                cause="signal",
                node=error.last_worker.host,
                attempts=item.task.retries + 1,
            )
        except Exception as error:  # noqa: BLE001 - whatever kept our function from being run
            outcome = CallFailed(
                f"{item.task.label} could not be run by Dask's worker: {type(error).__name__}: {error}",
                hint="VIRGO must be installed where Dask's workers are, in the version that is here.",
            )
        ended(item, outcome)

    def _cancelled(self, error: BaseException, task: Task) -> VirgoError:
        lost = isinstance(error, FutureCancelledError) and error.reason == "scheduler-connection-lost"
        if lost or self._client.status != "running":
            return _lost(task.label)
        return Cancelled("the call was cancelled by somebody else")

    def withdraw(self, items: Sequence[Item]) -> list[Item]:
        """See Engine."""
        known = {self._futures[item].key: item for item in items if item in self._futures}
        if not known:
            return []
        found = [known[key] for key in self._ask(self._client.scheduler.virgo_withdraw, keys=list(known))]
        self._client.cancel([self._futures[item] for item in found])
        return found

    def stop(self, items: Sequence[Item]) -> None:
        """See Engine."""
        keys = [self._futures[item].key for item in items if item in self._futures]
        where: dict[str, list[str]] = {}
        for key, worker in self._ask(self._client.scheduler.virgo_begun, keys=keys).items():
            where.setdefault(worker, []).append(key)
        for worker, some in where.items():
            self._client.loop.add_callback(self._stop_at, worker, some)

    async def _stop_at(self, worker: str, keys: Sequence[str]) -> None:
        """Nobody waits for it: the calls end, or they do not; in Dask's loop."""
        await self._client.run(stop, keys, workers=[worker], on_error="ignore")

    def forget(self, item: Item) -> None:
        """See Engine."""
        future = self._futures.pop(item, None)
        if future is not None and not future.done() and self._client.status == "running":
            self._client.cancel([future])

    def begun(self, item: Item) -> bool:
        """See Engine."""
        future = self._futures.get(item)
        if future is None or future.done():
            return False
        return bool(self._ask(self._client.scheduler.virgo_begun, keys=[future.key]))

    def look(self) -> None:
        """See Engine; Dask says it by itself."""

    def workers(self) -> int:
        """See Engine."""
        return sum(self._ask(self._client.scheduler.ncores).values())

    def close(self) -> None:
        """See Engine."""
        if self._client is not None:
            self._client.close(timeout=CALL_TERMINATE_S)

    def _ask(self, what: Callable[..., Coroutine[Any, Any, Any]], **options: Any) -> Any:
        """Ask the scheduler."""
        try:
            return self._client.sync(what, **options, callback_timeout=REQUEST_DEADLINE_S)
        except (OSError, TimeoutError) as error:
            raise _lost("the call") from error


def _lost(label: str) -> NodeLost:
    return NodeLost(
        f"the Dask scheduler was lost; whether {label} has ended is unknown",
        hint="Once it is back, connect again.",
    )
