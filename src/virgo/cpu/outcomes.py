"""What running a call comes to, as bytes: for the workers of nodes, and for those of other engines.

Whatever a call does, short of ending its process, becomes an outcome of `messages`: its result, or a failure
with the exception and its traceback.
"""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Final

import cloudpickle

from virgo.cpu import messages
from virgo.cpu.apart import Received
from virgo.cpu.arguments import load_arguments, unpack_arguments, word
from virgo.cpu.landing import Address
from virgo.cpu.messages import Failure, Form, Order, Parcel, Sent, failed
from virgo.cpu.segments import Mapping
from virgo.errors import VirgoError
from virgo.limits import ERROR_TEXT_CHARS_MAX

_MEMORY_HINT: Final = "Let it hold less at once, or ask for more: memory=, or cpu.memory_bytes for all calls."
_ENCODERS: Final[dict[Form, Callable[[Any], bytes]]] = {
    "data": messages.packed,
    "text": messages.texted,
}
_RESULT_HINTS: Final[dict[Form, str]] = {
    "pickle": "Return something that pickles: data, not open files, locks or generators.",
    "data": "A call by name returns None, numbers, text, bytes, lists and dictionaries.",
    "text": "A call by name returns None, numbers, text, bytes, and what JSON can hold.",
}
# Files whose frames say nothing to who reads a traceback.
_OURS: Final = frozenset(
    os.path.join(os.path.dirname(__file__), name)  # noqa: PTH118, PTH120 - as code objects have them
    for name in ("outcomes.py", "worker.py", "leased.py", os.path.join("backends", "remote.py"))  # noqa: PTH118
)


def outcome_of(
    order: Order | Parcel,
    function: Callable[..., Any],
    arguments: Sequence[bytes | Received],
    *,
    node: str,
    segments: bool = False,
    came: Mapping | None = None,
    land: Address | None = None,
) -> Sent:
    """Run a call: its outcome, whatever happens short of the end of the process.

    Args:
        order: how; its label and form count.
        function: what to call.
        arguments: one payload, or words.
        node: the name of the node, for messages.
        segments: whether descriptors can go with the outcome.
        came: what its arguments lie in.
        land: where large buffers of the result may be laid.
    """
    try:
        args, kwargs = _arguments(order.form, arguments)
    except BaseException as error:  # noqa: BLE001 - unpickling runs code: anything may come
        return not_loaded(order, error, node=node)
    del arguments
    try:
        result = finished(function(*args, **kwargs))
    except SystemExit as error:
        message = f"{order.label} on node {node} left by sys.exit({_shown(error)})"
        return failed(Failure(message, cause="exit", node=node))
    except BaseException as error:  # noqa: BLE001 - every exception of the function is its outcome
        return _raised(order, error, node)
    try:
        if order.form == "pickle":
            return messages.pickled(result, segments=segments, came=came, land=land)
        return _ENCODERS[order.form](result)
    except BaseException as error:  # noqa: BLE001 - __reduce__ of a result may raise anything
        return failed(
            Failure(
                f"the result of {order.label} on node {node}, of type {type(result).__name__}, "
                f"cannot be sent back: {_shown(error)}",
                hint=_RESULT_HINTS[order.form],
                cause="result",
                node=node,
            )
        )


def not_loaded(order: Order | Parcel, error: BaseException, *, node: str) -> bytes:
    """The outcome of a call that cannot be loaded."""
    hint = ""
    if isinstance(error, ImportError):
        hint = (
            "The nodes must be able to import the function's module; "
            "or ship it: cloudpickle.register_pickle_by_value(module)."
        )
    return failed(
        Failure(
            f"{order.label} or its arguments cannot be loaded on node {node}: "
            f"{type(error).__name__}: {_shown(error)}",
            hint=hint,
            node=node,
            traceback=_traceback(error),
        )
    )


def finished(result: Any) -> Any:
    """What a call returned; a coroutine, as of an `async def`, is run to its end in a loop of its own."""
    if not inspect.iscoroutine(result):
        return result
    import asyncio  # which few calls need, and which takes a while to import

    return asyncio.run(result)


def _raised(order: Order | Parcel, error: BaseException, node: str) -> bytes:
    pickled = b""
    if order.form == "pickle":
        try:
            pickled = cloudpickle.dumps(error, 5)
        except Exception:  # noqa: BLE001 - it does not pickle: its text must do
            pickled = b""
    kind, hint, cause = type(error).__name__, "", "exception"
    if isinstance(error, VirgoError):
        hint = error.hint
    elif isinstance(error, MemoryError):
        hint, cause = _MEMORY_HINT, "memory"
    return failed(
        Failure(
            f"{order.label} on node {node} raised {kind}: {_shown(error)}",
            hint=hint,
            cause=cause,
            node=node,
            traceback=_traceback(error),
            exception=pickled,
        )
    )


def _arguments(form: Form, words: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    if form == "text":
        return [word(one) for one in words], {}
    if form == "data":
        return unpack_arguments(words[0])
    return load_arguments(words[0])


def _shown(error: BaseException) -> str:
    """The text of an exception, bounded, whatever its __str__ does."""
    try:
        text = error.message if isinstance(error, VirgoError) else str(error)
    except Exception as broken:  # noqa: BLE001 - it is the function's own class
        text = f"(its text raised {type(broken).__name__})"
    return text if len(text) <= ERROR_TEXT_CHARS_MAX else text[:ERROR_TEXT_CHARS_MAX] + " ..."


def _traceback(error: BaseException) -> str:
    """The traceback without our own frames in front, bounded there."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename in _OURS:
        frame = frame.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, frame))
    except Exception as broken:  # noqa: BLE001 - it is the function's own class
        text = f"(the traceback could not be formatted: {type(broken).__name__})"
    return text[-16 * ERROR_TEXT_CHARS_MAX :]
