"""Commands on values, on the node that holds the key, answering as Redis 7 does.

Each function gets a batch and the request. Those that change something get a batch that is the writer
already, so that nobody comes between what they read and what they write.
"""

from __future__ import annotations

from collections.abc import Sequence

from virgo.errors import BadArgument, TooLarge
from virgo.limits import MEMORY_REPLY_BYTES_MAX
from virgo.memory import decimals
from virgo.memory.batch import Batch
from virgo.memory.entries import (
    INTEGER_MIN,
    UNITS_MS,
    change,
    check_value,
    expiry_ms,
    live,
    number,
    put_until,
    refuse,
    use,
)
from virgo.memory.keyspace import Entry, stored_key
from virgo.wire.resp import INTEGER_MAX, OK, Encoded

SET_USAGE = "key value [NX|XX] [GET] [EX s|PX ms|EXAT s|PXAT ms|KEEPTTL]"
GETEX_USAGE = "key [EX s|PX ms|EXAT s|PXAT ms|PERSIST]"
_Options = tuple[set[bytes], bytes, bytes]


def get(batch: Batch, request: list[bytes]) -> bytes | None:
    """GET key."""
    found = use(batch, stored_key(request[1]))
    batch.count_get(found is not None)
    return None if found is None else found.value


def mget(batch: Batch, request: list[bytes]) -> list[bytes | None]:
    """MGET key [key...]. Raises TooLarge: all values together are too long for one answer."""
    found: list[bytes | None] = []
    size = 0
    for key in request[1:]:
        value = get(batch, [b"GET", key])
        found.append(value)
        size += len(value or b"")
        if size > MEMORY_REPLY_BYTES_MAX:
            raise TooLarge(
                f"these values have more than {MEMORY_REPLY_BYTES_MAX} bytes together",
                hint="Ask for fewer keys at once.",
            )
    return found


def strlen(batch: Batch, request: list[bytes]) -> int:
    """STRLEN key."""
    found = live(batch, stored_key(request[1]))
    return 0 if found is None else len(found.value)


def getrange(batch: Batch, request: list[bytes]) -> bytes:
    """GETRANGE key start end: both inclusive, from the end if negative."""
    start, end = number(request[2], "the start"), number(request[3], "the end")
    found = use(batch, stored_key(request[1]))
    if found is None or (start < 0 and end < 0 and start > end):
        return b""
    length = len(found.value)
    start, end = (max(0, length + place) if place < 0 else place for place in (start, end))
    return found.value[start : end + 1]


# --- set --------------------------------------------------------------------------------------


def set_(batch: Batch, request: list[bytes]) -> Encoded | bytes | None:
    """SET key value [options]."""
    stored, value = stored_key(request[1]), request[2]
    if len(request) == 3:
        batch.put_plain(stored, value)
        return OK
    options, unit, time = _options(request[3:], SET_USAGE, {b"NX", b"XX", b"GET", b"KEEPTTL"})
    expires_ms = expiry_ms(time, unit) if unit else 0
    old = live(batch, stored)
    refused = (b"NX" in options and old is not None) or (b"XX" in options and old is None)
    if not refused:
        if b"KEEPTTL" in options and old is not None:
            batch.put_entry(stored, old._replace(value=value, mark=0, state=0))
        else:
            put_until(batch, stored, Entry(value, expires_ms))
    if b"GET" in options:
        return None if old is None else old.value
    return None if refused else OK


def _options(words: Sequence[bytes], usage: str, flags: set[bytes]) -> _Options:
    """The options, unit and time or b"". One that is repeated counts once, the last time given holds."""
    options: set[bytes] = set()
    given = b""
    rest = iter(words)
    for word in rest:
        option = word.upper()
        if option in UNITS_MS:
            time = next(rest, None)
            if time is None:
                raise refuse(usage, f"{word[:20]!r} needs a time")
            given = time
        elif option not in flags:
            raise refuse(usage, f"there is no option {word[:20]!r}")
        options.add(option)
    if len(options & {*UNITS_MS, b"KEEPTTL", b"PERSIST"}) > 1 or {b"NX", b"XX"} <= options:
        raise refuse(usage, "these options exclude each other")
    return options, next(iter(options & UNITS_MS.keys()), b""), given


def setnx(batch: Batch, request: list[bytes]) -> int:
    """SETNX key value."""
    return int(set_(batch, [b"SET", request[1], request[2], b"NX"]) is not None)


def setex(batch: Batch, request: list[bytes]) -> Encoded | bytes | None:
    """SETEX key seconds value."""
    return set_(batch, [b"SET", request[1], request[3], b"EX", request[2]])


def psetex(batch: Batch, request: list[bytes]) -> Encoded | bytes | None:
    """PSETEX key milliseconds value."""
    return set_(batch, [b"SET", request[1], request[3], b"PX", request[2]])


def getset(batch: Batch, request: list[bytes]) -> bytes | None:
    """GETSET key value."""
    old = get(batch, request)
    batch.put_plain(stored_key(request[1]), request[2])
    return old


def getdel(batch: Batch, request: list[bytes]) -> bytes | None:
    """GETDEL key."""
    value = get(batch, request)
    if value is not None:
        batch.delete_key(stored_key(request[1]))
        batch.drop_claim(stored_key(request[1]))
    return value


def getex(batch: Batch, request: list[bytes]) -> bytes | None:
    """GETEX key [options]: the value, with another expiry from now on."""
    stored = stored_key(request[1])
    options, unit, time = _options(request[2:], GETEX_USAGE, {b"PERSIST"})
    found = use(batch, stored)
    batch.count_get(found is not None)
    if found is None:
        return None
    expires_ms = expiry_ms(time, unit) if unit else 0
    if expires_ms or (b"PERSIST" in options and found.expires_ms):
        put_until(batch, stored, found._replace(expires_ms=expires_ms, sliding_ms=0))
    return found.value


def mset(batch: Batch, request: list[bytes]) -> Encoded:
    """MSET key value [key value...]."""
    for key, value in zip(request[1::2], request[2::2], strict=True):
        batch.put_plain(stored_key(key), value)
    return OK


def msetnx(batch: Batch, request: list[bytes]) -> int:
    """MSETNX key value [key value...]: all, or none if one of the keys is there."""
    if any(live(batch, stored_key(key)) is not None for key in request[1::2]):
        return 0
    mset(batch, request)
    return 1


# --- parts of values, and numbers ---------------------------------------------------------------


def append(batch: Batch, request: list[bytes]) -> int:
    """APPEND key value."""
    stored = stored_key(request[1])
    old = live(batch, stored)
    value = request[2] if old is None else old.value + request[2]
    change(batch, stored, old, value)
    return len(value)


def setrange(batch: Batch, request: list[bytes]) -> int:
    """SETRANGE key offset value: what lies before the offset is filled with zeros."""
    stored, offset, part = stored_key(request[1]), number(request[2], "the offset", low=0), request[3]
    old = live(batch, stored)
    before = b"" if old is None else old.value
    if not part:
        return len(before)
    check_value(offset + len(part))
    value = before[:offset].ljust(offset, b"\0") + part + before[offset + len(part) :]
    change(batch, stored, old, value)
    return len(value)


def _add(batch: Batch, key: bytes, step: int) -> int:
    stored = stored_key(key)
    old = live(batch, stored)
    total = step + (0 if old is None else number(old.value, "the value"))
    if not INTEGER_MIN <= total <= INTEGER_MAX:
        raise BadArgument(f"the sum {total} is out of range", hint="A counter has 64 bits.")
    change(batch, stored, old, b"%d" % total)
    return total


def incr(batch: Batch, request: list[bytes]) -> int:
    """INCR key."""
    return _add(batch, request[1], 1)


def decr(batch: Batch, request: list[bytes]) -> int:
    """DECR key."""
    return _add(batch, request[1], -1)


def incrby(batch: Batch, request: list[bytes]) -> int:
    """INCRBY key step."""
    return _add(batch, request[1], number(request[2], "the step"))


def decrby(batch: Batch, request: list[bytes]) -> int:
    """DECRBY key step."""
    return _add(batch, request[1], -number(request[2], "the step", low=INTEGER_MIN + 1))


def incrbyfloat(batch: Batch, request: list[bytes]) -> bytes:
    """INCRBYFLOAT key step."""
    stored = stored_key(request[1])
    old = live(batch, stored)
    value = decimals.add(b"0" if old is None else old.value, request[2])
    change(batch, stored, old, value)
    return value
