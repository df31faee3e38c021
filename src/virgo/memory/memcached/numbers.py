"""Numbers, times and base64 as memcached reads them.

memcached reads numbers with C's `strtol` and its kin: blanks before, a sign, digits, then the end or a
blank. What does not fit 32 bits wraps; what does not fit 64 bits is none.
"""

from __future__ import annotations

import binascii
import re
from typing import Final

from virgo.errors import BadArgument

_NUMBER = re.compile(rb"[ \t\n\v\f\r]*([+-]?[0-9]+)(?=[ \t\n\v\f\r\0]|\Z)").match
_U64: Final = 2**64
_I64_MAX: Final = 2**63 - 1
_U32: Final = 2**32
U32_MAX: Final = _U32 - 1
# A time from here on is one of the calendar, else it counts from now.
RELATIVE_S_MAX: Final = 60 * 60 * 24 * 30


def unsigned64(text: bytes) -> int | None:
    """The number, or None; a negative one counts from the end, unless that is beyond 63 bits."""
    found = _NUMBER(text)
    if found is None:
        return None
    value = int(found[1])
    if abs(value) >= _U64:
        return None
    value %= _U64
    return None if value > _I64_MAX and b"-" in text.partition(b"\0")[0] else value


def unsigned32(text: bytes) -> int | None:
    """The low 32 bits of the number, or None."""
    value = unsigned64(text)
    return None if value is None else value % _U32


def signed32(text: bytes) -> int | None:
    """The low 32 bits of the number, as a signed one, or None."""
    found = _NUMBER(text)
    if found is None:
        return None
    value = int(found[1])
    if not -_I64_MAX - 1 <= value <= _I64_MAX:
        return None
    value %= _U32
    return value - _U32 if value >= _U32 // 2 else value


def checked(data: bytes, high: int = _U64 - 1, low: int = 0) -> int:
    """A number that another node has read before. Raises BadArgument for what is none, or too large."""
    if not data.removeprefix(b"-").isdigit() or not low <= int(data[:24]) <= high:
        raise BadArgument(f"{data[:24]!r} is no number that fits", hint="Decimal digits, within its width.")
    return int(data)


def seconds_of(data: bytes) -> int:
    """As `checked`, for a time to live."""
    return checked(data, 2**31 - 1, -(2**31))


def until_ms(seconds: int, now_ms: int) -> int:
    """When a time to live is over, in ms since 1970: 0 for never, in the past for a negative one.

    As in memcached a time of up to 30 days counts from now, a longer one from 1970.
    """
    if seconds == 0:
        return 0
    if seconds < 0:
        return 1
    return seconds * 1000 + (now_ms if seconds <= RELATIVE_S_MAX else 0)


def left_s(expires_ms: int, now_ms: int) -> int:
    """Seconds that are left, a begun one counts; 0 if it is over."""
    return max(0, -(-(expires_ms - now_ms) // 1000))


def decoded(key: bytes) -> bytes | None:
    """The key that base64 stands for, or None."""
    try:
        return binascii.a2b_base64(key, strict_mode=True) or None
    except binascii.Error:
        return None


def encoded(key: bytes) -> bytes:
    """The key in base64."""
    return binascii.b2a_base64(key, newline=False)
