"""Arguments of calls as bytes, in the three forms of `messages`."""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from virgo.cpu import apart
from virgo.cpu.apart import ALONG, AT_HAND, Received
from virgo.cpu.messages import PLAIN
from virgo.errors import BadArgument
from virgo.limits import APART_BYTES_MIN

_PICKLE: Final = b"\x80"  # how a pickle begins, and no packed list does
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder().decode
_unpack_pair = msgspec.msgpack.Decoder(tuple[list[Any], dict[str, Any]]).decode


def cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Callable[..., Any]:
    """A function with a cache of its own, as `functools.lru_cache` makes it; see `shipping`."""
    made: Callable[..., Any] = functools.lru_cache(**parameters)(function)
    return made


def pack_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Arguments in the form `data`. Raises BadArgument."""
    try:
        return _pack([args, kwargs])
    except (TypeError, ValueError, OverflowError) as error:
        raise BadArgument(
            f"the arguments cannot be sent by MessagePack: {error}",
            hint="A call by name takes None, numbers, text, bytes, lists and dictionaries.",
        ) from None


def ship_plain(args: tuple[Any, ...]) -> bytes | None:
    """Arguments in the form `pickle` if all are plain and none is named, else None; see `load_arguments`."""
    for value in args:
        kind = type(value)
        if kind not in PLAIN or (kind is bytes and len(value) >= APART_BYTES_MIN):
            return None
    try:
        return _pack(args)
    except (OverflowError, ValueError):
        return None


def load_arguments(data: bytes | Received) -> tuple[Sequence[Any], dict[str, Any]]:
    """Arguments in the form `pickle`: a pickled pair, or a packed list. Raises what unpickling raises."""
    if isinstance(data, Received):
        return data.load()  # type: ignore[no-any-return]
    first = data[:1]
    if first == _PICKLE:
        return pickle.loads(data)  # type: ignore[no-any-return]  # noqa: S301 - role exec sent it
    if first == AT_HAND:
        return apart.load_at_hand(data)  # type: ignore[no-any-return]
    if first == ALONG:
        return apart.load_along(data)  # type: ignore[no-any-return]
    return _unpack(data), {}


def unpack_arguments(data: bytes) -> tuple[list[Any], dict[str, Any]]:
    """Arguments in the form `data`. Raises msgspec.DecodeError."""
    return _unpack_pair(data)


def word(data: bytes) -> Any:
    """An argument in the form `text`: JSON if it is JSON, else the text, else the bytes."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return data
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
