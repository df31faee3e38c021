"""Commands on the time of keys, on the node that holds the key, answering as Redis 7 does.

As in `strings`; seconds and milliseconds, from now or since 1970, are one command with another unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from virgo.memory.batch import Batch
from virgo.memory.entries import TIME_MAX, UNITS_MS, live, now_ms, number, put_until, refuse
from virgo.memory.keyspace import stored_key

EXPIRE_USAGE = "key time [NX|XX|GT|LT]"
_EXPIRE_OPTIONS = {b"NX", b"XX", b"GT", b"LT"}
Local = Callable[[Batch, list[bytes]], Any]


def _left_ms(batch: Batch, key: bytes, since_ms: int) -> int:
    """When the key is over, counted from then; -1 if it stays for ever, -2 if it is not there."""
    found = live(batch, stored_key(key))
    if found is None:
        return -2
    return max(0, found.expires_ms - since_ms) if found.expires_ms else -1


def ttl(batch: Batch, request: list[bytes]) -> int:
    """TTL key, in seconds."""
    left_ms = pttl(batch, request)
    return left_ms if left_ms < 0 else (left_ms + 500) // 1000


def pttl(batch: Batch, request: list[bytes]) -> int:
    """PTTL key, in milliseconds."""
    return _left_ms(batch, request[1], now_ms())


def expiretime(batch: Batch, request: list[bytes]) -> int:
    """EXPIRETIME key, in seconds since 1970."""
    at_ms = pexpiretime(batch, request)
    return at_ms if at_ms < 0 else (at_ms + 500) // 1000


def pexpiretime(batch: Batch, request: list[bytes]) -> int:
    """PEXPIRETIME key, in milliseconds since 1970."""
    return _left_ms(batch, request[1], 0)


def expire_in(unit: bytes) -> Local:
    """The command that lets a key expire at a time in one of `UNITS_MS`; in the past, it deletes it."""
    scale, absolute = UNITS_MS[unit], unit.endswith(b"AT")

    def expire(batch: Batch, request: list[bytes]) -> int:
        given_ms = number(request[2], "the time", low=-TIME_MAX, high=TIME_MAX) * scale
        options = {word.upper() for word in request[3:]}
        if options - _EXPIRE_OPTIONS or (b"NX" in options and len(options) > 1) or {b"GT", b"LT"} <= options:
            raise refuse(EXPIRE_USAGE, "these options are unknown or exclude each other")
        stored = stored_key(request[1])
        found = live(batch, stored)
        at_ms = given_ms if absolute else given_ms + now_ms()
        if found is None or not _wanted(options, found.expires_ms, at_ms):
            return 0
        put_until(batch, stored, found._replace(expires_ms=max(1, at_ms), sliding_ms=0))
        return 1

    return expire


def _wanted(options: set[bytes], old_ms: int, new_ms: int) -> bool:
    """Whether an expiry is to be changed; a key without one lives for ever."""
    if b"NX" in options:
        return not old_ms
    if b"XX" in options and not old_ms:
        return False
    if b"GT" in options:
        return bool(old_ms) and new_ms > old_ms
    return b"LT" not in options or not old_ms or new_ms < old_ms


def persist(batch: Batch, request: list[bytes]) -> int:
    """PERSIST key."""
    stored = stored_key(request[1])
    found = live(batch, stored)
    if found is None or not found.expires_ms:
        return 0
    batch.put_entry(stored, found._replace(expires_ms=0, sliding_ms=0))
    return 1
