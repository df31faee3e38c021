"""Calls on a Ray cluster: `cpu.backend = "ray"`.

Each call is a task of Ray that may not be repeated, unless `retries=` says so. When it begins it makes a mark
in Ray's key-value store, where who takes back calls makes another: whoever is first has it. So a call that
runs is told from one that waits, and one that is to be taken back is not killed when it has just begun.

When the head of a cluster is gone its calls are lost within seconds. A minute later Ray ends the program that
was connected to it, unless it is back (RAY_gcs_rpc_server_reconnect_timeout_s).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Final

import ray
from ray import exceptions
from ray.experimental.internal_kv import internal_kv_get_gcs_client

from virgo.cpu import messages
from virgo.cpu.backends import remote
from virgo.cpu.backends.base import Ended
from virgo.cpu.calls import Item, Task
from virgo.cpu.ceiling import within
from virgo.cpu.needs import PLAIN, Grant
from virgo.errors import (
    BadArgument,
    BadConfig,
    CallFailed,
    Cancelled,
    NodeLost,
    NoNode,
    NotRunning,
    VirgoError,
)
from virgo.limits import CONNECT_S

_NAMESPACE: Final = b"virgo"
_BEGUN: Final = b"begun"
_WITHDRAWN: Final = b"withdrawn"
_ASK_S: Final = 2.0  # Ray adds a second
_FUNCTION_BYTES: Final = 64 * 1024  # larger functions are put into Ray's store once
_FUNCTIONS_MAX: Final = 32

_pid = os.getpid()
_session = threading.Lock()
_users = 0  # engines of this process that use its connection to Ray
_ours = False  # whether one of them has made it


def call(key: bytes, head: bytes, function: bytes, arguments: bytes, grant: tuple[int, int]) -> bytes:
    """In Ray's worker: run a call, if nobody has taken it back.

    Args:
        key: of its mark.
        head, function, arguments: see `remote.run`.
        grant: bytes of memory that it may hold, 0 for no limit, and how often it may be run again.
    """
    if _mark(key, _BEGUN):
        mark = internal_kv_get_gcs_client().internal_kv_get(key, _NAMESPACE, _ASK_S)
        if mark != _BEGUN:
            return messages.TAKEN
        if not grant[1]:
            return remote.LOST
    with within(Grant(memory=grant[0])):
        return remote.run(key.decode(), head, function, arguments)


def _mark(key: bytes, mark: bytes) -> bool:
    """Mark a call, unless it has a mark already; whether it has."""
    return not internal_kv_get_gcs_client().internal_kv_put(key, mark, False, _NAMESPACE, _ASK_S)


class RayEngine:
    """See `Engine`.

    Args:
        address: of the cluster; "" for the one that Ray finds.
    """

    title = "Ray"

    def __init__(self, address: str) -> None:
        self._address = address or "auto"
        self._prefix = b"virgo-" + os.urandom(12).hex().encode()
        self._serial = 0
        self._open = self._lost = False
        self._refs: dict[Item, tuple[bytes, Any]] = {}
        self._functions: dict[bytes, Any] = {}

    def __repr__(self) -> str:
        return f"<RayEngine {self._address}{'' if self._open else ', not connected'}>"

    def check(self, task: Task) -> None:
        """See Engine."""
        if task.priority:
            raise BadArgument(
                f"priority={task.priority}, but Ray knows no priorities",
                hint="Leave it out, or submit what is urgent first.",
            )

    def open(self) -> None:
        """See Engine; a connection that the program has made itself is used."""
        global _users, _ours  # noqa: PLW0603 - Ray has one connection a process
        if self._open:
            return
        with _session:
            if not ray.is_initialized():
                self._connect()
                _ours = True
            elif os.getpid() != _pid:
                raise NotRunning(
                    "this process was forked from one that is connected to Ray, and cannot use it",
                    hint="Start it anew (multiprocessing's `spawn`), or fork before the first call.",
                )
            _users += 1
            self._open = True

    def _connect(self) -> None:
        host, _, port = self._address.rpartition(":")
        if self._address != "auto" and ("/" in host or not host or not port.isdigit()):
            raise BadConfig(
                f"cpu.backend_address is {self._address}, which is no address of a Ray cluster",
                hint="It is the HOST:PORT that `ray start --head` has shown, 6379 by default.",
            )
        try:
            if host:  # Ray itself would try for a minute
                socket.create_connection((host, int(port)), CONNECT_S).close()
            ray.init(self._address, logging_level=logging.WARNING)
        except OSError as error:
            raise NotRunning(
                f"no Ray cluster is found at {self._address}: {error}",
                hint="`ray start --head` starts one; cpu.backend_address says where it is.",
            ) from error
        except (ValueError, RuntimeError, exceptions.RayError) as error:
            raise BadConfig(
                f"cannot connect to the Ray cluster at {self._address}: {error}",
                hint="cpu.backend_address is like HOST:6379; Ray and Python must be of its versions.",
            ) from error

    def begin(self, items: Sequence[Item], ended: Ended) -> None:
        """See Engine."""
        if self._lost or not ray.is_initialized():
            self.look()  # it may be back
        task = items[0].task
        needs = task.needs
        if needs != PLAIN:
            self._check_fits(task)
        run = ray.remote(call).options(
            name=task.label, num_cpus=needs.cpus, num_gpus=needs.gpus, memory=needs.memory or None,
            max_retries=task.retries, retry_exceptions=False,
        )  # fmt: skip
        head, function = task.head(), self._function(task)
        for item in items:
            self._serial += 1
            key = b"%b-%x" % (self._prefix, self._serial)
            ref = run.remote(key, head, function, item.arguments, (needs.memory, task.retries))
            self._refs[item] = key, ref
            ref.future().add_done_callback(partial(self._done, item, ended))

    def _function(self, task: Task) -> Any:
        """The function as an argument: its bytes, or where these are."""
        if len(task.function) < _FUNCTION_BYTES:
            return task.function
        found = self._functions.get(task.digest)
        if found is None:
            if len(self._functions) >= _FUNCTIONS_MAX:
                self._functions.clear()
            found = self._functions[task.digest] = ray.put(task.function)
        return found

    def _check_fits(self, task: Task) -> None:
        needs = task.needs
        wanted = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": needs.memory}
        for node in ray.nodes():
            has = node["Resources"] if node["Alive"] else {}
            if all(has.get(name, 0) >= amount for name, amount in wanted.items()):
                return
        raise NoNode(
            f"{task.label} needs {needs}, which no node of the Ray cluster has",
            hint="`ray status` shows what there is.",
        )

    def _done(self, item: Item, ended: Ended, future: Future[bytes]) -> None:
        """In a thread of Ray's."""
        error = future.exception()
        ended(item, future.result() if error is None else _failed(item.task, error))

    def withdraw(self, items: Sequence[Item]) -> list[Item]:
        """See Engine."""
        found = []
        for item in items:
            key, ref = self._refs[item]
            if not self._ask(partial(_mark, key, _WITHDRAWN)):
                ray.cancel(ref, force=True)
                found.append(item)
        return found

    def stop(self, items: Sequence[Item]) -> None:
        """See Engine; what they have begun themselves is ended too."""
        for item in items:
            ray.cancel(self._refs[item][1], force=True, recursive=True)

    def forget(self, item: Item) -> None:
        """See Engine."""
        found = self._refs.pop(item, None)
        if found is not None and not self._lost:
            with contextlib.suppress(NodeLost):  # then its mark is gone too
                self._ask(partial(_unmark, found[0]))

    def begun(self, item: Item) -> bool:
        """See Engine."""
        found = self._refs.get(item)
        return found is not None and self._ask(partial(_has_mark, found[0]))

    def look(self) -> None:
        """See Engine."""
        self._ask(partial(_has_mark, self._prefix))

    def workers(self) -> int:
        """See Engine."""
        return int(ray.cluster_resources().get("CPU", 0))

    def close(self) -> None:
        """See Engine."""
        global _users, _ours  # noqa: PLW0603 - see open
        if not self._open:
            return
        self._open = False
        with _session:
            _users -= 1
            if _ours and not _users:
                _ours = False
                ray.shutdown()

    def _ask(self, what: Callable[[], bool]) -> bool:
        """Ask the store at the cluster's head."""
        if not ray.is_initialized():
            raise NodeLost(
                "the program has ended its connection to Ray; whether its calls have ended is unknown",
                hint="Close the cloud before ray.shutdown().",
            )
        try:
            answer = what()
        except exceptions.RpcError as error:
            self._lost = True
            raise NodeLost(
                f"the head of the Ray cluster was lost; whether its calls have ended is unknown: {error}",
                hint="`ray status` shows whether it is back.",
            ) from error
        self._lost = False
        return answer


def _has_mark(key: bytes) -> bool:
    return bool(internal_kv_get_gcs_client().internal_kv_exists(key, _NAMESPACE, _ASK_S))


def _unmark(key: bytes) -> bool:
    return bool(internal_kv_get_gcs_client().internal_kv_del(key, False, _NAMESPACE, _ASK_S))


def _failed(task: Task, error: BaseException) -> VirgoError:
    """What it means that Ray has no outcome of a call."""
    if isinstance(error, exceptions.TaskCancelledError):
        return Cancelled("the call was cancelled by somebody else")
    attempts = task.retries + 1
    if isinstance(error, exceptions.OutOfMemoryError):
        return CallFailed(
            f"{task.label} was killed by Ray because memory ran out",
            hint="Let it hold less at once, or say how much it needs: memory=.",
            cause="memory",
            attempts=attempts,
        )
    if isinstance(error, exceptions.WorkerCrashedError):
        return CallFailed(
            f"{task.label} lost its worker; how it ended is unknown",
            hint="Ray's logs may say it, by default below /tmp/ray/session_latest/logs.",
            cause="signal",
            attempts=attempts,
        )
    if isinstance(error, exceptions.RayTaskError):
        return CallFailed(
            f"{task.label} could not be run by Ray's worker: {error.cause}",
            hint="VIRGO must be installed where Ray's workers are, in the version that is here.",
            remote_traceback=str(error),
        )
    return NodeLost(
        f"Ray has lost {task.label}; whether it has ended is unknown: {type(error).__name__}: {error}",
        hint="`ray status` shows which nodes are up.",
    )
