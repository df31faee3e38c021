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

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import cloudpickle

from virgo.cpu import messages
from virgo.cpu.channel import Channel, CpuFuture
from virgo.cpu.exports import check_name, summary_of
from virgo.cpu.messages import Options
from virgo.cpu.shipping import ship, ship_arguments
from virgo.errors import BadArgument
from virgo.limits import CALL_RETRIES_MAX, CALL_TERMINATE_S, CALL_TIMEOUT_MS_MAX
from virgo.wire.call import Call, Runner, as_nothing, as_text

T = TypeVar("T")
Target = Callable[..., Any] | str

# Time for a node to stop a call whose deadline has passed, and to say so.
_GRACE_S = CALL_TERMINATE_S + 3.0


@dataclass(frozen=True, slots=True)
class Export:
    """Something that can be called by name: `kind` is `function`, `program` or `published`."""

    name: str
    kind: str
    summary: str


def call_of(
    target: Target,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    node: str = "",
    timeout: float | None = None,
    retries: int = 0,
) -> Call[Any]:
    """One call, to be run by either client."""
    options, function, arguments = _payload(target, args, kwargs, node=node, timeout=timeout, retries=retries)
    trusted = options.form == "pickle"
    return Call(
        ("CPU.CALL" if trusted else "CPU.INVOKE", messages.encode_options(options), function, arguments),
        lambda outcome: messages.as_result(outcome, trusted=trusted),
        math.inf if timeout is None else timeout + _GRACE_S,
    )


def publish_of(function: Callable[..., Any], name: str) -> Call[int]:
    """Publish a function."""
    name = check_name(name or getattr(function, "__name__", ""))
    return Call(("CPU.PUBLISH", name, cloudpickle.dumps(function, 5), summary_of(function)), int)


EXPORTS: Call[list[Export]] = Call(
    ("CPU.EXPORTS",), lambda reply: [Export(*map(as_text, entry)) for entry in reply]
)


def unpublish_of(name: str) -> Call[None]:
    """Take a published function back."""
    return Call(("CPU.UNPUBLISH", name), as_nothing)


class CpuClient(Executor):
    """The processors of the cloud, as a `concurrent.futures.Executor`.

    Args:
        runner: connections to a node.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._channel = Channel(runner)
        self._shut = False

    def __repr__(self) -> str:
        return f"<CpuClient {self._channel.outstanding} outstanding{' shut down' if self._shut else ''}>"

    def clone(
        self,
        target: Target,
        /,
        *args: Any,
        node: str = "",
        timeout: float | None = None,
        retries: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Run a callable, or an export by its name, on the least loaded node, and wait for its result.

        Args:
            target: a callable, or the name of an exported function or program; an `async def` is run to its
                end in the worker.
            args, kwargs: its arguments.
            node: name of the node that must run it.
            timeout: seconds after which it is stopped.
            retries: how often it may be run again if its node is lost; 0 is at most once.

        Raises:
            Exception: the very exception that the function raised, caused by a CallFailed that holds the
                remote traceback.
            CallFailed: it ended otherwise, or the exception does not unpickle.
            DeadlineExceeded: it ran into `timeout`, and was stopped.
            NodeLost: its node was lost; whether it had ended there is unknown.
            NoNode, NotExported, Denied, Busy: it was not begun.
        """
        return self._runner.run(call_of(target, args, kwargs, node=node, timeout=timeout, retries=retries))

    def submit(self, target: Target, /, *args: Any, **kwargs: Any) -> CpuFuture:
        """The same without waiting; `submit_to` takes the options. Raises RuntimeError after `shutdown`."""
        return self.submit_to(target, args, kwargs)

    def submit_to(
        self,
        target: Target,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        node: str = "",
        timeout: float | None = None,
        retries: int = 0,
    ) -> CpuFuture:
        """`submit` with the options of `clone`."""
        channel = self._open_channel()
        future = channel.future()
        options, function, arguments = _payload(
            target, args, kwargs or {}, node=node, timeout=timeout, retries=retries, key=future.key
        )
        future.trusted = options.form == "pickle"
        verb = "CPU.CALL.SUBMIT" if future.trusted else "CPU.INVOKE.SUBMIT"
        channel.send(future, verb, messages.encode_options(options), function, arguments)
        return future

    def map(
        self,
        fn: Target,
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """Results in the order of the arguments, as `Executor.map`.

        Args:
            fn: a callable or a name.
            iterables: its arguments.
            timeout: seconds until `__next__` raises TimeoutError; the calls outstanding are cancelled.
            chunksize: how many calls travel and run as one; only for a callable.
            buffersize: how many results may be outstanding at once, None for all.
        """
        target, rows, chunked = mapping(fn, iterables, chunksize, buffersize)
        deadline = None if timeout is None else time.monotonic() + timeout
        self._open_channel()
        results = self._results(target, rows, deadline, buffersize)
        return itertools.chain.from_iterable(results) if chunked else results

    def _results(
        self, fn: Target, rows: Iterable[tuple[Any, ...]], deadline: float | None, buffersize: int | None
    ) -> Iterator[Any]:
        # As in the standard library, the calls begin now, not when the first result is asked for.
        source = iter(rows)
        futures = [self.submit(fn, *row) for row in itertools.islice(source, buffersize)]
        futures.reverse()

        def results() -> Iterator[Any]:
            try:
                while futures:
                    left_s = None if deadline is None else deadline - time.monotonic()
                    result = futures[-1].result(left_s)
                    futures.pop()
                    yield result
                    if buffersize is not None:
                        futures[:0] = [self.submit(fn, *row) for row in itertools.islice(source, 1)]
            finally:
                if futures:
                    self._channel.cancel(futures)

        return results()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; wait for those outstanding, or cancel them."""
        self._shut = True
        if self._channel.pid != os.getpid():  # forked: the calls are the parent's
            return
        outstanding = self._channel.outstanding_futures()
        if cancel_futures and outstanding:
            self._channel.cancel(outstanding)
        if wait:
            self._channel.wait()

    def close(self) -> None:
        """Take no more calls, and cancel those outstanding."""
        self.shutdown(wait=False, cancel_futures=True)

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

    def stats(self) -> dict[str, Any]:
        """Calls of this client without outcome."""
        return {"outstanding": self._channel.outstanding, "shut": self._shut}

    def _open_channel(self) -> Channel:
        if self._shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self._channel.pid != os.getpid():  # forked: the threads and futures are the parent's
            self._channel = Channel(self._runner)
        return self._channel


def _payload(
    target: Target,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    node: str,
    timeout: float | None,
    retries: int,
    key: str = "",
) -> tuple[Options, bytes, bytes]:
    """Options, function and arguments of a call. Raises BadArgument, or what pickling raises."""
    if timeout is not None and not 0 < timeout <= CALL_TIMEOUT_MS_MAX / 1000:
        raise BadArgument(
            f"timeout is {timeout}, but must be more than 0 s and at most {CALL_TIMEOUT_MS_MAX // 1000} s",
            hint="timeout=None sets no limit.",
        )
    if not 0 <= retries <= CALL_RETRIES_MAX:
        raise BadArgument(
            f"retries is {retries}, but must be 0 to {CALL_RETRIES_MAX}",
            hint="0 runs the call at most once; more only if running it twice does no harm.",
        )
    timeout_ms = 0 if timeout is None else max(1, math.ceil(timeout * 1000))
    if isinstance(target, str):
        options = Options(key, target, node, timeout_ms, retries, "data")
        return options, target.encode(), messages.pack_arguments(args, kwargs)
    if not callable(target):
        raise BadArgument(
            f"clone needs a callable or a name, not {type(target).__name__}",
            hint="Give the function itself, and its arguments behind it: clone(pow, 2, 10).",
        )
    label = getattr(target, "__qualname__", None) or type(target).__qualname__
    options = Options(key, label[:80], node, timeout_ms, retries, "pickle")
    return options, ship(target), ship_arguments(args, kwargs)


def mapping(
    fn: Target, iterables: tuple[Iterable[Any], ...], chunksize: int, buffersize: int | None
) -> tuple[Target, Iterator[tuple[Any, ...]], bool]:
    """The calls of a `map`: what to run, arguments of each, and whether each result is a list of results."""
    if chunksize < 1 or (buffersize is not None and buffersize < 1):
        raise ValueError("chunksize and buffersize must be 1 or more")
    rows = zip(*iterables, strict=False)
    if chunksize == 1 or isinstance(fn, str):
        return fn, rows, False
    return _run_chunk, ((fn, chunk) for chunk in _chunks(rows, chunksize)), True


def _chunks(rows: Iterable[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    source = iter(rows)
    while chunk := list(itertools.islice(source, size)):
        yield chunk


def _run_chunk(function: Callable[..., Any], rows: list[tuple[Any, ...]]) -> list[Any]:
    """In the worker: several calls as one."""
    from virgo.cpu.worker import finished

    return [finished(function(*row)) for row in rows]
