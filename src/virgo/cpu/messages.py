"""Calls and outcomes as bytes, shared by clients, nodes and workers.

A call has one of three forms. `pickle`: a cloudpickled callable with pickled arguments, for callers with
the role `exec`. `data`: a name with MessagePack arguments, for Python callers without it. `text`: a name
with words, for every other language. (`lease` is no call: it hands a worker over, see `leased`.)

An outcome is one byte that says what it is, and its content. A node reads that byte and never unpickles
what follows; a `Failure` is MessagePack, with a pickled exception only in that form. See also `apart`.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any, Final, Literal

import cloudpickle
import msgspec

from virgo.context import Identity
from virgo.cpu import apart
from virgo.cpu.apart import ALONG, LANDED, Apart, Received
from virgo.cpu.landing import Address, Place
from virgo.cpu.needs import PLAIN as PLAIN_NEEDS
from virgo.cpu.needs import Grant, Needs
from virgo.cpu.segments import Mapping
from virgo.errors import BadArgument, BadRequest, CallFailed, Denied
from virgo.limits import CALL_PRIORITY_MAX, CALL_RETRIES_MAX, CALL_TIMEOUT_MS_MAX

Outcome = bytes | Received  # as it comes
Sent = bytes | Apart  # as it is sent
Form = Literal["pickle", "data", "text", "lease"]

PICKLED: Final = b"P"  # a pickled result
PACKED: Final = b"M"  # a MessagePack result
FAILED: Final = b"F"  # a Failure
UNKNOWN: Final = b"N"  # the worker does not have the function: send it along
NOT_EXPORTED: Final = b"E"  # no function of that name is exported there
TAKEN: Final = b"T"  # taken back before it began
INTEGER: Final = b"i"
BULK: Final = b"b"
NOTHING: Final = b"n"
TRUE: Final = b"t"
FALSE: Final = b"f"
DOUBLE: Final = b"d"

# Types whose values are packed as they are; no subclasses.
PLAIN: Final = frozenset({type(None), bool, int, float, str, bytes})

# From a pool to a worker, instead of an order: it wants the lease back.
WANTED: Final = [b"wanted"]

# From a worker to its pool, beside the outcome.
RETIRE: Final = b"R"  # do not use me again: something of the call is left in me
# Instead of it, from a leased one: number and label of a call, from where to where of the output it wrote.
WROTE: Final = b"W"


class Options(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a call is to be run.

    Attributes:
        key: the caller's name for this call, to cancel it by; unguessable.
        label: what to call it in messages.
        node: name of the node that must run it, "" for the least loaded.
        timeout_ms: time from its arrival until it is stopped, 0 for none.
        retries: how often it may be run again after the death of its worker.
        form: see the module.
        nested: another call waits for it, so it goes before those that nobody waits for.
        extra: it must not wait for a free worker, since what it is part of may hold the last one.
        crew: it is for a lease of this client.
        at_hand: it may not leave the machine.
        near: name or number of the node at which its data are, 0 for none: it is preferred.
        priority: of those that wait the greatest goes first.
        needs: what it must have.
        cause: of the call, from the node that had it before.
        land: where large buffers of the result may be laid.
        afar: who asks is another machine's node, and takes them himself; see `freight`.
        followed: somebody reads what it writes as it comes.
        bounces: if it has to wait for long it is not begun, and the outcome is TAKEN.
    """

    key: str = ""
    label: str = ""
    node: str = ""
    timeout_ms: int = 0
    retries: int = 0
    form: Form = "pickle"
    nested: bool = False
    extra: bool = False
    crew: bytes = b""
    at_hand: bool = False
    near: int | str = 0
    priority: int = 0
    needs: Needs = PLAIN_NEEDS
    cause: str = ""
    land: Address | None = None
    afar: bool = False
    followed: bool = False
    bounces: bool = False


class Work(msgspec.Struct, frozen=True):
    """One call, as the pool hands it to a worker.

    Attributes:
        form: see the module.
        label: what to call it in messages.
        name: the exported name (forms `data` and `text`); "" for `pickle`.
        function: the callable, cloudpickled; b"" for one that the worker has by name.
        program: the command, if it is a program.
        arguments: one payload (`pickle`, `data`) or the words (`text`).
        context: the encoded context.
        needs: what it must have.
        land: where large buffers of the result may be laid.
        followed: see Options.
    """

    form: Form
    label: str
    name: str
    function: bytes
    arguments: list[bytes]
    program: list[str] | None = None
    context: bytes = b""
    needs: Needs = PLAIN_NEEDS
    land: Address | None = None
    followed: bool = False


class Order(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """The head of what a pool sends to a worker; function and arguments follow as they are."""

    form: Form
    label: str
    name: str = ""
    digest: bytes = b""
    program: list[str] | None = None
    context: bytes = b""
    grant: Grant = Grant()
    land: Address | None = None


class Terms(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What a worker is told of a lease.

    Attributes:
        lease: its number on the node.
        node: the node's name.
        prefix: of the ids of its calls.
        trusted: whether the client may send functions.
        identity: on whose behalf its calls run.
        memory: bytes that a call may hold, as in Grant.
    """

    lease: int
    node: str
    prefix: str
    trusted: bool
    identity: Identity
    memory: int = 0

    def task(self, number: int) -> str:
        """The id of one of its calls."""
        return f"{self.prefix}-{number:x}"


class Parcel(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """The head of what a client sends to a leased worker; the function and arguments of calls follow.

    Attributes:
        form, label, name, digest: as in Work and Order.
        left_ms: until their deadline.
        cause: id of the request for which they are made.
    """

    form: Form
    label: str
    name: str = ""
    digest: bytes = b""
    left_ms: int | None = None
    cause: str = ""


class Failure(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Why there is no result; `CallFailed`'s fields, and the pickled exception if there is one."""

    message: str
    hint: str = ""
    cause: str = "exception"
    node: str = ""
    traceback: str = ""
    exception: bytes = b""
    attempts: int = 1


_options_encoder = msgspec.msgpack.Encoder()
_options_decoder = msgspec.msgpack.Decoder(Options)
_order_decoder = msgspec.msgpack.Decoder(Order)
_parcel_decoder = msgspec.msgpack.Decoder(Parcel)
_terms_decoder = msgspec.msgpack.Decoder(Terms)
_failure_decoder = msgspec.msgpack.Decoder(Failure)
_packer = msgspec.msgpack.Encoder()
_pack = _packer.encode
_unpack = msgspec.msgpack.Decoder().decode


def encode_options(options: Options) -> bytes:
    """Options for the wire."""
    return _options_encoder.encode(options)


def decode_options(data: bytes) -> Options:
    """Options from the wire. Raises BadRequest, BadArgument."""
    try:
        options = _options_decoder.decode(data)
        options.needs.check()
        if not abs(options.priority) <= CALL_PRIORITY_MAX:
            raise BadArgument(
                f"priority is {options.priority}, but must be {-CALL_PRIORITY_MAX} to {CALL_PRIORITY_MAX}",
                hint="0 is that of all others; the greater go first.",
            )
        if not 0 <= options.timeout_ms <= CALL_TIMEOUT_MS_MAX or not 0 <= options.retries <= CALL_RETRIES_MAX:
            raise BadArgument(
                f"timeout_ms is {options.timeout_ms} and retries {options.retries}",
                hint=f"At most {CALL_TIMEOUT_MS_MAX} ms and {CALL_RETRIES_MAX} times; 0 is none.",
            )
        return options
    except msgspec.DecodeError as error:
        raise BadRequest(
            f"the options of the call are malformed: {error}",
            hint="CPU.CALL is for VIRGO's own clients; call by name with VIRGO_CLONE.",
        ) from None


def encode_order(order: Order | Parcel | Terms | list[int | str]) -> bytes:
    """An order, or what a worker is told of a lease or of calls by a client, as bytes."""
    return _packer.encode(order)


def decode_order(data: bytes) -> Order:
    """An order from the pool."""
    return _order_decoder.decode(data)


def decode_parcel(data: bytes) -> Parcel:
    """The head of a parcel from a client. Raises msgspec.DecodeError."""
    return _parcel_decoder.decode(data)


def decode_terms(data: bytes) -> Terms:
    """The terms of a lease, from the pool."""
    return _terms_decoder.decode(data)


def failed(failure: Failure) -> bytes:
    """The outcome of a call without a result."""
    return FAILED + _packer.encode(failure)


def packed(value: Any) -> bytes:
    """The outcome of a call in the form `data`. Raises TypeError, ValueError, OverflowError."""
    return PACKED + _packer.encode(value)


def pickled(
    value: Any, *, segments: bool = False, came: Mapping | None = None, land: Address | None = None
) -> Sent:
    """The outcome of a call in the form `pickle`; by cloudpickle if plain pickle cannot.

    Plain values are packed, which takes a quarter of the time. Large buffers are apart, see `apart.dumps`.
    """
    if apart.is_large(value):
        value = apart.Large(value)
    elif type(value) in PLAIN:
        try:
            return PACKED + _pack(value)
        except (OverflowError, ValueError):  # a large number, text that is not UTF-8
            pass
    try:
        data = apart.dumps(value, pickle.dumps, segments=segments, came=came, land=land)
    except Exception:  # noqa: BLE001 - whatever it was, cloudpickle decides, and its error is told
        data = apart.dumps(value, cloudpickle.dumps, segments=segments, came=came, land=land)
    return data if isinstance(data, Apart) or data[:1] in (ALONG, LANDED) else PICKLED + data


def unpack(data: bytes) -> Any:
    """What MessagePack holds. Raises msgspec.DecodeError."""
    return _unpack(data)


def texted(value: Any) -> bytes:
    """The outcome of a call in the form `text`. Raises TypeError or ValueError if it has no such form."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return TRUE if value else FALSE
    if isinstance(value, int):
        return INTEGER + b"%d" % value
    if isinstance(value, float):
        return DOUBLE + repr(value).encode()
    if isinstance(value, str):
        return BULK + value.encode("utf-8", "surrogateescape")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return BULK + bytes(value)
    return BULK + json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")


def as_reply(outcome: bytes) -> Any:
    """The reply that an outcome in the form `text` is on the wire. Raises CallFailed."""
    kind, content = outcome[:1], outcome[1:]
    if kind == BULK:
        return content
    if kind == INTEGER:
        return int(content) if len(content) < 4000 else content
    if kind == DOUBLE:
        return float(content)
    if kind == FAILED:
        raise as_error(outcome)
    return {NOTHING: None, TRUE: True, FALSE: False}[kind]


def has_died(outcome: bytes) -> bool:
    """Whether a failed call has ended by the death of its worker, and not by itself."""
    failure = _failure_decoder.decode(memoryview(outcome)[1:])
    return failure.cause in ("signal", "memory") and not failure.traceback


def after(outcome: bytes, attempts: int) -> bytes:
    """The outcome of a call that has failed so often."""
    if attempts == 1:
        return outcome
    failure = _failure_decoder.decode(memoryview(outcome)[1:])
    message = f"{failure.message}, the last of {attempts} attempts"
    return failed(msgspec.structs.replace(failure, message=message, attempts=attempts))


def as_error(outcome: bytes) -> CallFailed:
    """The error that a failed outcome is, without looking at a pickled exception. Raises Denied."""
    failure = _failure_decoder.decode(memoryview(outcome)[1:])
    if failure.cause == "denied":
        raise Denied(failure.message, hint=failure.hint)
    return CallFailed(
        failure.message,
        hint=failure.hint,
        cause=failure.cause,
        node=failure.node,
        remote_traceback=failure.traceback,
        attempts=failure.attempts,
    )


def arrived(outcome: bytes, place: Place | None) -> Outcome:
    """An outcome from a node, with what has landed in its place. Raises CallFailed if that cannot be had."""
    if outcome[:1] != LANDED or place is None:
        return outcome
    try:
        return Received.landed(outcome, place)
    except (msgspec.DecodeError, ValueError, OSError) as error:
        raise CallFailed(
            f"the result was laid where it cannot be read: {type(error).__name__}: {error}",
            hint="`ulimit -v` and the machine's overcommit limits bound what can be mapped.",
            cause="result",
        ) from error


def as_result(outcome: Outcome, *, trusted: bool) -> Any:
    """The result that an outcome holds, for a Python caller.

    Args:
        outcome: what the node answered.
        trusted: whether to unpickle; only for who asked in the form `pickle`, and so has `exec`.

    Raises:
        CallFailed: there is no result, or it cannot be unpickled here.
        Denied: who asked may not have it run.
        Exception: the very exception that the function raised, caused by a CallFailed with its traceback.
    """
    if isinstance(outcome, Received):
        return _load(outcome.load, trusted)
    assert isinstance(outcome, bytes)
    kind = outcome[:1]
    if kind == PACKED:
        return _unpack(outcome[1:])
    if kind == FAILED:
        error = as_error(outcome)
        original = _unpickle_exception(outcome) if trusted else None
        if original is None:
            if error.remote_traceback:
                error.add_note(error.remote_traceback)
            raise error
        original.add_note(f"On node {error.node}:\n{error.remote_traceback}")
        raise original from error
    if kind == PICKLED:
        return _load(lambda: pickle.loads(memoryview(outcome)[1:]), trusted)  # noqa: S301 - we sent the function
    if kind == ALONG:
        return _load(lambda: apart.load_along(outcome), trusted)
    raise _unknown_kind(kind)


def _load(load: Callable[[], Any], trusted: bool) -> Any:
    if not trusted:
        raise _unknown_kind(PICKLED)
    try:
        return load()
    except Exception as error:
        raise CallFailed(
            f"the result cannot be unpickled here: {type(error).__name__}: {error}",
            hint="The classes in it must be importable here too.",
            cause="result",
        ) from error


def _unknown_kind(kind: bytes) -> CallFailed:
    return CallFailed(
        f"the node answered with an unknown kind of outcome {kind!r}",
        hint="Client and node are of different versions: `virgo version` and `virgo nodes` show them.",
        cause="result",
    )


def _unpickle_exception(outcome: bytes) -> BaseException | None:
    data = _failure_decoder.decode(memoryview(outcome)[1:]).exception
    if not data:
        return None
    try:
        value = pickle.loads(data)  # noqa: S301 - we sent the function
    except Exception:  # noqa: BLE001 - exceptions with odd constructors do not unpickle; the text remains
        return None
    return value if isinstance(value, BaseException) else None
