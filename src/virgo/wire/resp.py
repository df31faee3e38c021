"""Replies as bytes: Python values in RESP2 or RESP3.

| value | RESP2 | RESP3 |
| --- | --- | --- |
| bytes, bytearray, memoryview, str | bulk string | bulk string |
| int | integer | integer |
| bool | integer 1 or 0 | boolean |
| float | bulk string | double |
| None | null bulk string | null |
| list, tuple | array | array |
| dict | flat array | map |
| `OK`, `Simple` | simple string | simple string |
| VirgoError | error | error |
| `Encoded` | as it is | as it is |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virgo.errors import VirgoError

if TYPE_CHECKING:
    import asyncio

INTEGER_MAX: Final = 2**63 - 1
LINE_END: Final = b"\r\n"
# A value from here on leaves as it is; copying a smaller one into one write with its neighbours is cheaper.
LARGE_BYTES: Final = 64 * 1024


class Encoded(bytes):
    """Bytes that are a reply already."""

    __slots__ = ()


class Simple(str):
    """Text for a simple string: no line ends."""

    __slots__ = ()


OK: Final = Encoded(b"+OK\r\n")
PONG: Final = Encoded(b"+PONG\r\n")
NIL: Final = Encoded(b"$-1\r\n")
NIL3: Final = Encoded(b"_\r\n")
# The answer to a request whose sender wants none, not even an error; it is known by its identity.
SILENT: Final = Encoded(b"")


def encode(value: object, protocol: int = 2) -> bytes:
    """One reply. `protocol` is 2 or 3, as the client asked with HELLO.

    Raises:
        TypeError: the value has no form on the wire.
    """
    if type(value) is bytes:
        return b"$%d\r\n%b\r\n" % (len(value), value)
    if type(value) is Encoded:
        return value
    if type(value) is int:
        return _integer(value)
    if value is None:
        return NIL if protocol == 2 else NIL3
    return _encode_other(value, protocol)


def parts(value: object, protocol: int = 2) -> list[bytes]:
    """As `encode`, in pieces, so that a large value is not copied."""
    if type(value) is bytes and len(value) >= LARGE_BYTES:
        return [b"$%d\r\n" % len(value), value, LINE_END]
    return [encode(value, protocol)]


def send(transport: asyncio.WriteTransport, pieces: list[bytes]) -> None:
    """Send in one write what is small, and large values without a copy."""
    if len(pieces) == 1:
        transport.write(pieces[0])
    elif max(map(len, pieces)) < LARGE_BYTES:
        transport.write(b"".join(pieces))
    else:
        transport.writelines(pieces)


def _encode_other(value: object, protocol: int) -> bytes:
    if isinstance(value, Simple):
        return b"+%b\r\n" % value.encode()
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogateescape")
        return b"$%d\r\n%b\r\n" % (len(data), data)
    if isinstance(value, bool):
        return (b":%d\r\n" % value) if protocol == 2 else (b"#t\r\n" if value else b"#f\r\n")
    if isinstance(value, float):
        text = repr(value).encode()
        return b"$%d\r\n%b\r\n" % (len(text), text) if protocol == 2 else b",%b\r\n" % text
    if isinstance(value, (bytearray, memoryview)):
        return b"$%d\r\n%b\r\n" % (memoryview(value).nbytes, bytes(value))
    if isinstance(value, (list, tuple)):
        return b"*%d\r\n" % len(value) + b"".join([encode(item, protocol) for item in value])
    if isinstance(value, dict):
        head = b"*%d\r\n" % (2 * len(value)) if protocol == 2 else b"%%%d\r\n" % len(value)
        return head + b"".join([encode(x, protocol) for pair in value.items() for x in pair])
    if isinstance(value, VirgoError):
        return error(value)
    raise TypeError(f"{type(value).__name__} has no form on the wire")


def _integer(value: int) -> bytes:
    if -INTEGER_MAX - 1 <= value <= INTEGER_MAX:
        return b":%d\r\n" % value
    text = b"%d" % value
    return b"$%d\r\n%b\r\n" % (len(text), text)


def error(failure: VirgoError) -> bytes:
    """An error reply: code, message and hint on one line."""
    return b"-%b\r\n" % failure.to_line().encode("utf-8", "replace")
