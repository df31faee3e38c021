"""One filler for a value that many want: commands behind `get_or_set`, on the node that holds the key.

Whoever finds no fresh value gets a claim to make one, for a time; the others are told so, and wait or take
the stale value (leases against thundering herds: Nishtala et al., "Scaling Memcache at Facebook", 2013). A
key that is deleted, set or dropped with its namespace meanwhile voids the claim, so that what was made of
older data does not take its place. Functions as in `strings`.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from virgo.limits import MEMORY_CLAIM_TOKEN_BYTES_MAX
from virgo.memory.batch import Batch
from virgo.memory.entries import TIME_MAX, check_value, live, now_ms, number, refuse, use
from virgo.memory.keyspace import Entry, stored_key

FETCH_USAGE = "key token milliseconds"
FILL_USAGE = "key token value [PX milliseconds] [STALE milliseconds]"
FRESH, YOURS, ANOTHERS = 0, 1, 2
_RECORD = struct.Struct("<QQq")


class Claim(NamedTuple):
    """The right to fill a key.

    Attributes:
        until_ms: in ms since 1970.
        version: of the key when it was given; 0 if it was absent.
        generation: of its namespace then.
        token: names who has it.
    """

    until_ms: int
    version: int
    generation: int
    token: bytes

    def encode(self) -> bytes:
        """The record."""
        return _RECORD.pack(*self[:3]) + self.token

    @classmethod
    def decode(cls, record: bytes) -> Claim:
        """The claim of a record."""
        until_ms, version, generation = _RECORD.unpack_from(record)
        return cls(until_ms, version, generation, record[_RECORD.size :])


def fetch(batch: Batch, request: list[bytes]) -> list[bytes | int | None]:
    """MEMORY.FETCH key token ms: the value or nil, and 0, 1 or 2.

    0: it is fresh. 1: you are to make a new one, and have a claim to it for so many ms. 2: another is.
    """
    stored, token = stored_key(request[1]), _token(request[2])
    time_ms = number(request[3], "the time", low=1, high=TIME_MAX)
    for attempt in (batch.writing, None):
        entry = use(batch, stored)
        value = None if entry is None else entry.value
        if entry is not None and (not entry.fresh_ms or entry.fresh_ms > now_ms()):
            batch.count_get(True)
            return [value, FRESH]
        claim = _claim(batch, stored)
        if claim is not None and claim.until_ms > now_ms() and claim.token != token:
            return [value, ANOTHERS]
        if attempt is not None:
            attempt()  # and look again, now that nobody comes in between
    batch.count_get(False)
    version = 0 if entry is None else entry.version
    claim = Claim(now_ms() + time_ms, version, batch.generation(stored), token)
    batch.put_claim(stored, claim.encode())
    return [value, YOURS]


def fill(batch: Batch, request: list[bytes]) -> int | None:
    """MEMORY.FILL key token value [options]: the version, nil if the claim is void."""
    stored, value = stored_key(request[1]), request[3]
    check_value(len(value))
    fresh_ms, stale_ms = _times(request[4:])
    if not _holds(batch, stored, _token(request[2])):
        return None
    batch.drop_claim(stored)
    now = now_ms()
    if not fresh_ms:
        return batch.put_entry(stored, Entry(value))
    entry = Entry(value, now + fresh_ms + stale_ms, fresh_ms=now + fresh_ms if stale_ms else 0)
    return batch.put_entry(stored, entry)


def release(batch: Batch, request: list[bytes]) -> int:
    """MEMORY.RELEASE key token: give up a claim; whether it was there."""
    stored = stored_key(request[1])
    claim = _claim(batch, stored)
    if claim is None or claim.token != request[2]:
        return 0
    batch.drop_claim(stored)
    return 1


def _claim(batch: Batch, stored: bytes) -> Claim | None:
    """The claim on a key, unless its namespace was dropped since."""
    record = batch.claim(stored)
    claim = None if record is None else Claim.decode(record)
    return claim if claim is not None and claim.generation == batch.generation(stored) else None


def _holds(batch: Batch, stored: bytes, token: bytes) -> bool:
    claim = _claim(batch, stored)
    if claim is None or claim.token != token:
        return False
    entry = live(batch, stored)
    return entry is None or entry.version == claim.version


def _token(data: bytes) -> bytes:
    if not 0 < len(data) <= MEMORY_CLAIM_TOKEN_BYTES_MAX:
        raise refuse(f"MEMORY.FETCH {FETCH_USAGE}", f"a token has 1 to {MEMORY_CLAIM_TOKEN_BYTES_MAX} bytes")
    return data


def _times(words: list[bytes]) -> tuple[int, int]:
    """For how long it is fresh, and stale after that, in ms; 0 for ever, and not at all."""
    usage = f"MEMORY.FILL {FILL_USAGE}"
    found = {b"PX": 0, b"STALE": 0}
    if len(words) % 2:
        raise refuse(usage, "an option lacks its time")
    for option, time in zip(words[::2], words[1::2], strict=True):
        if option.upper() not in found:
            raise refuse(usage, f"there is no option {option[:20]!r}")
        found[option.upper()] = number(time, "the time", low=1, high=TIME_MAX)
    if found[b"STALE"] and not found[b"PX"]:
        raise refuse(usage, "STALE needs PX: what is fresh for ever is never stale")
    return found[b"PX"], found[b"STALE"]
