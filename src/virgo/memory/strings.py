"""The key commands on the node that holds the key, answering as Redis 7 does.

Each function gets a batch and the request. A key past its time is as good as gone, though it is removed a
little later. Times are of this node's wall clock.
"""

from __future__ import annotations

import time

from virgo.errors import BadArgument
from virgo.limits import MEMORY_SCAN_KEYS_MAX, MEMORY_SLOTS
from virgo.memory import core
from virgo.memory.batch import Batch
from virgo.wire.args import integer
from virgo.wire.resp import OK, Encoded, Simple

SET_USAGE = "key value [NX|XX] [GET] [EX s|PX ms|EXAT s|PXAT ms|KEEPTTL]"
_UNITS_MS = {b"EX": 1000, b"PX": 1, b"EXAT": 1000, b"PXAT": 1}
_TIMING = {*_UNITS_MS, b"KEEPTTL"}
_TIME_MAX = 10**13  # milliseconds or seconds; far beyond any use, and within the record


def now_ms() -> int:
    """The wall clock."""
    return time.time_ns() // 1_000_000


def live(batch: Batch, stored: bytes) -> tuple[bytes, int] | None:
    """Value and expiry of a key that is there and not past its time."""
    record = batch.key(stored)
    if record is None:
        return None
    value, expires_ms = core.decode_value(record)
    if expires_ms and expires_ms <= now_ms():
        return None
    return value, expires_ms


def get(batch: Batch, request: list[bytes]) -> bytes | None:
    """GET key."""
    found = live(batch, core.stored_key(request[1]))
    batch.count_get(found is not None)
    return None if found is None else found[0]


def set_(batch: Batch, request: list[bytes]) -> Encoded | bytes | None:
    """SET key value [options]."""
    stored, value = core.stored_key(request[1]), request[2]
    if len(request) == 3:
        batch.put_key(stored, core.PLAIN_KEY + value)
        return OK
    options, expires_ms = _set_options(request)
    old = live(batch, stored)
    refused = (b"NX" in options and old is not None) or (b"XX" in options and old is None)
    if b"KEEPTTL" in options and old is not None:
        expires_ms = old[1]
    if not refused:
        batch.put_key(stored, core.encode_value(value, expires_ms), expires_ms)
    if b"GET" in options:
        return None if old is None else old[0]
    return None if refused else OK


def _set_options(request: list[bytes]) -> tuple[set[bytes], int]:
    """The options, and the expiry or 0. One that is repeated counts once, the last time given holds."""
    options: set[bytes] = set()
    given, words = b"", iter(request[3:])
    for word in words:
        option = word.upper()
        if option in _UNITS_MS:
            given = next(words, b"")
        elif option not in (b"NX", b"XX", b"GET", b"KEEPTTL"):
            raise _syntax(f"SET has no option {word[:20]!r}")
        options.add(option)
    timing = options & _TIMING
    if len(timing) > 1 or {b"NX", b"XX"} <= options:
        raise _syntax("SET got options that exclude each other")
    unit = next(iter(timing - {b"KEEPTTL"}), None)
    if unit is None:
        return options, 0
    expires_ms = integer(given, "the time", low=1, high=_TIME_MAX) * _UNITS_MS[unit]
    return options, expires_ms if unit.endswith(b"AT") else expires_ms + now_ms()


def _syntax(message: str) -> BadArgument:
    return BadArgument(message, hint=f"Usage: SET {SET_USAGE}")


def setnx(batch: Batch, request: list[bytes]) -> int:
    """SETNX key value."""
    return int(set_(batch, [b"SET", request[1], request[2], b"NX"]) is not None)


def getdel(batch: Batch, request: list[bytes]) -> bytes | None:
    """GETDEL key."""
    value = get(batch, request)
    if value is not None:
        batch.delete_key(core.stored_key(request[1]))
    return value


def strlen(batch: Batch, request: list[bytes]) -> int:
    """STRLEN key."""
    found = live(batch, core.stored_key(request[1]))
    return 0 if found is None else len(found[0])


def type_(batch: Batch, request: list[bytes]) -> Simple:
    """TYPE key."""
    return Simple("none" if live(batch, core.stored_key(request[1])) is None else "string")


def ttl(batch: Batch, request: list[bytes]) -> int:
    """TTL key, in seconds."""
    left_ms = pttl(batch, request)
    return left_ms if left_ms < 0 else (left_ms + 500) // 1000


def pttl(batch: Batch, request: list[bytes]) -> int:
    """PTTL key, in milliseconds: -1 if it stays for ever, -2 if it is not there."""
    found = live(batch, core.stored_key(request[1]))
    if found is None:
        return -2
    return max(0, found[1] - now_ms()) if found[1] else -1


def expire(batch: Batch, request: list[bytes]) -> int:
    """EXPIRE key seconds."""
    return _expire_in(
        batch, request[1], integer(request[2], "the time", low=-_TIME_MAX, high=_TIME_MAX) * 1000
    )


def pexpire(batch: Batch, request: list[bytes]) -> int:
    """PEXPIRE key milliseconds."""
    return _expire_in(batch, request[1], integer(request[2], "the time", low=-_TIME_MAX, high=_TIME_MAX))


def _expire_in(batch: Batch, key: bytes, left_ms: int) -> int:
    stored = core.stored_key(key)
    found = live(batch, stored)
    if found is None:
        return 0
    if left_ms <= 0:
        batch.delete_key(stored)
    else:
        expires_ms = now_ms() + left_ms
        batch.put_key(stored, core.encode_value(found[0], expires_ms), expires_ms)
    return 1


def persist(batch: Batch, request: list[bytes]) -> int:
    """PERSIST key."""
    stored = core.stored_key(request[1])
    found = live(batch, stored)
    if found is None or not found[1]:
        return 0
    batch.put_key(stored, core.encode_value(found[0]))
    return 1


def mget(batch: Batch, request: list[bytes]) -> list[bytes | None]:
    """MGET key [key...]."""
    return [get(batch, [b"GET", key]) for key in request[1:]]


def mset(batch: Batch, request: list[bytes]) -> Encoded:
    """MSET key value [key value...]."""
    for key, value in zip(request[1::2], request[2::2], strict=True):
        batch.put_key(core.stored_key(key), core.PLAIN_KEY + value)
    return OK


def exists(batch: Batch, request: list[bytes]) -> int:
    """EXISTS key [key...]: a key named twice counts twice."""
    return sum(1 for key in request[1:] if live(batch, core.stored_key(key)) is not None)


def delete(batch: Batch, request: list[bytes]) -> int:
    """DEL key [key...]."""
    deleted = 0
    for key in request[1:]:
        stored = core.stored_key(key)
        deleted += live(batch, stored) is not None
        if batch.key(stored) is not None:
            batch.delete_key(stored)
    return deleted


def count(batch: Batch, _request: list[bytes]) -> int:
    """MEMORY.KEYS.COUNT: keys on this node."""
    return batch.count_keys()


def flush(batch: Batch, _request: list[bytes]) -> Encoded:
    """MEMORY.KEYS.FLUSH: delete this node's keys."""
    batch.flush_keys()
    return OK


def scan(batch: Batch, request: list[bytes]) -> tuple[int, list[bytes]]:
    """MEMORY.KEYS.SCAN slot count [pattern]: this node's keys of whole slots, and where to go on."""
    slot = integer(request[1], "the slot", low=0, high=MEMORY_SLOTS - 1)
    wanted = integer(request[2], "the count", low=1, high=MEMORY_SCAN_KEYS_MAX)
    pattern = request[3] if len(request) > 3 else b"*"
    return batch.scan(slot, wanted, None if pattern == b"*" else core.glob(pattern))
