"""What a user asks for, as a task: the target, and the options of `clone`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypedDict

from virgo import context as contexts
from virgo.cpu.calls import Task
from virgo.cpu.follow import Output, writer
from virgo.cpu.maps import Target
from virgo.cpu.messages import Form
from virgo.cpu.near import Placed, near_arguments, place_of
from virgo.cpu.needs import PLAIN, needs_of
from virgo.cpu.shipping import ship
from virgo.errors import BadArgument
from virgo.limits import CALL_PRIORITY_MAX, CALL_RETRIES_MAX, CALL_TIMEOUT_MS_MAX


class CallOptions(TypedDict, total=False):
    """How a call is to be run.

    Attributes:
        node: name of the node that must run it.
        cpus: places among the workers of its node that it takes.
        gpus: GPUs that it has for itself.
        memory: what it may hold, in bytes or as `"2 GiB"`; beyond that it gets MemoryError.
        near: where its data are, a node's name or what lies on one (a region, a shared array): that node is
            preferred. Arguments that lie on a node say so themselves.
        timeout: seconds after which it is stopped.
        retries: how often it may be run again if its worker dies; 0 is at most once. If it may be, it is
            run again too when its node is lost, which is not counted.
        priority: of the calls that wait the greatest goes first, -1000 to 1000.
        output: where what it writes to standard output and standard error goes as it comes: a file, of text
            or bytes, or a function of bytes. All of it is there before the result is. If that raises, the
            call is stopped, and the error is what its caller gets.
    """

    node: str
    cpus: int
    gpus: int
    memory: int | str
    near: str | Placed | None
    timeout: float | None
    retries: int
    priority: int
    output: Output | None


def task_of(
    target: Target,
    args: Iterable[Any] = (),
    *,
    node: str = "",
    cpus: int = 1,
    gpus: int = 0,
    memory: int | str = 0,
    near: str | Placed | None = None,
    timeout: float | None = None,
    retries: int = 0,
    priority: int = 0,
    output: Output | None = None,
) -> Task:
    """A callable or a name, with options, as a task.

    Args:
        target: the callable or name.
        args: its arguments, to see where they lie.
        node, cpus, gpus, memory, near, timeout, retries, priority, output: see CallOptions.

    Raises:
        BadArgument: an option makes no sense; or what pickling raises.
    """
    _check(timeout, retries, priority)
    needs = PLAIN if (cpus, gpus, memory) == (1, 0, 0) else needs_of(cpus, gpus, memory)
    timeout_ms = 0 if timeout is None else max(1, math.ceil(timeout * 1000))
    place = place_of(near) if near is not None else near_arguments(args)
    context = contexts.current()
    given = node or timeout_ms or retries or place or priority or output is not None
    plain = not given and needs is PLAIN and context is None
    if isinstance(target, str):
        form: Form = "data"
        label, name, function, digest = target, target, target.encode(), b""
    elif not callable(target):
        raise BadArgument(
            f"clone needs a callable or a name, not {type(target).__name__}",
            hint="Give the function itself, and its arguments behind it: clone(pow, 2, 10).",
        )
    else:
        shipped = ship(target)
        if plain and shipped.task is not None:
            known: Task = shipped.task
            return known
        label = (getattr(target, "__qualname__", None) or type(target).__qualname__)[:80]
        form, name, function, digest = "pickle", "", shipped.data, shipped.digest
    task = Task(
        form, label, name, function, digest,
        node=node, needs=needs, near=place, timeout_ms=timeout_ms, retries=retries, priority=priority,
        context=context, write=None if output is None else writer(output),
    )  # fmt: skip
    if plain and not isinstance(target, str):
        shipped.task = task
    return task


def _check(timeout: float | None, retries: int, priority: int) -> None:
    if timeout is None and retries == 0 == priority:
        return
    for name, value in (("timeout", timeout), ("retries", retries), ("priority", priority)):
        if not isinstance(value, int | float | None) or (name != "timeout" and not isinstance(value, int)):
            raise BadArgument(
                f"{name} is {value!r}, but must be a number",
                hint="timeout is in seconds; retries and priority are whole numbers.",
            )
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
    if not abs(priority) <= CALL_PRIORITY_MAX:
        raise BadArgument(
            f"priority is {priority!r}, but must be {-CALL_PRIORITY_MAX} to {CALL_PRIORITY_MAX}",
            hint="0 is that of all others; the greater go first.",
        )
