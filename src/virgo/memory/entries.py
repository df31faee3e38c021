"""What the key commands share on the node that holds the key: what is there now, and how arguments are read.

A key past its time is as good as gone, though it is removed a little later. Times are of this node's wall
clock. A sliding key that is used is given its time anew, at most every eighth of it, so that a read is
seldom a write: it lives for its time to nine eighths of it after the last use.
"""

from __future__ import annotations

import re
import time

from virgo.errors import BadArgument, TooLarge
from virgo.limits import MEMORY_VALUE_BYTES_MAX
from virgo.memory import keyspace
from virgo.memory.batch import Batch
from virgo.memory.keyspace import Entry
from virgo.wire.resp import INTEGER_MAX

INTEGER_MIN = -INTEGER_MAX - 1
TIME_MAX = 10**13  # milliseconds or seconds; far beyond any use, and within the record
UNITS_MS = {b"EX": 1000, b"PX": 1, b"EXAT": 1000, b"PXAT": 1}
_DIGITS = re.compile(rb"-?[1-9][0-9]{19,}").fullmatch  # more than any number has
_INTEGER = re.compile(rb"0|-?[1-9][0-9]{0,18}").fullmatch


def now_ms() -> int:
    """The wall clock."""
    return time.time_ns() // 1_000_000


def live(batch: Batch, stored: bytes) -> Entry | None:
    """The entry of a key that is there and not past its time."""
    record = batch.key(stored)
    if record is None:
        return None
    entry = keyspace.decode_entry(record)
    if entry.expires_ms and entry.expires_ms <= now_ms():
        return None
    if entry.generation > 0 and not batch.counts(stored, entry):
        return None
    return entry


def use(batch: Batch, stored: bytes) -> Entry | None:
    """As `live`, for a command that uses the value: a sliding key gets its time anew."""
    entry = live(batch, stored)
    if entry is None:
        return None
    if entry.generation >= 0:
        batch.count_use(stored)
    if entry.sliding_ms and tired(entry):
        current = live(batch.writing(), stored)  # as it is now that nobody else changes it
        if current is not None and current.sliding_ms:
            batch.put_entry(stored, slid(current))
    return entry


def tired(entry: Entry) -> bool:
    """Whether a sliding entry has to be given its time anew."""
    return entry.expires_ms < now_ms() + entry.sliding_ms


def slid(entry: Entry) -> Entry:
    """A sliding entry with its time anew."""
    return entry._replace(expires_ms=now_ms() + entry.sliding_ms + entry.sliding_ms // 8)


def change(batch: Batch, stored: bytes, old: Entry | None, value: bytes) -> None:
    """Give a key another value; its expiry stays. Raises TooLarge, PoolFull."""
    check_value(len(value))
    if old is None:
        batch.put_plain(stored, value)
    else:
        batch.put_entry(stored, old._replace(value=value))


def check_value(length: int) -> None:
    """Raise TooLarge if a value of so many bytes is too long."""
    if length > MEMORY_VALUE_BYTES_MAX:
        raise TooLarge(f"a value of {length} bytes exceeds the limit of {MEMORY_VALUE_BYTES_MAX}")


def put_until(batch: Batch, stored: bytes, entry: Entry) -> None:
    """Keep an entry; one whose time is over already is deleted instead."""
    if entry.expires_ms and entry.expires_ms <= now_ms():
        batch.delete_key(stored)
    else:
        batch.put_entry(stored, entry)


# --- arguments ------------------------------------------------------------------------------


def number(data: bytes, name: str, *, low: int = INTEGER_MIN, high: int = INTEGER_MAX) -> int:
    """A number as Redis reads it: digits without blanks, plus or leading zeros. Raises BadArgument."""
    if _DIGITS(data) is not None:
        raise BadArgument(f"{name} is too large", hint=f"It must be between {low} and {high}.")
    if _INTEGER(data) is None:
        shown = data[:24].decode("utf-8", "backslashreplace")
        raise BadArgument(f"{name} is {shown!r}, not an integer", hint="Decimal digits, no leading zeros.")
    value = int(data)
    if not low <= value <= high:
        raise BadArgument(f"{name} is {value}, but must be between {low} and {high}", hint="Mend the number.")
    return value


def expiry_ms(data: bytes, unit: bytes, *, low: int = 1) -> int:
    """When a time given in one of `UNITS_MS` is over, in ms since 1970. Raises BadArgument."""
    given_ms = number(data, "the time", low=low, high=TIME_MAX) * UNITS_MS[unit]
    return given_ms if unit.endswith(b"AT") else given_ms + now_ms()


def refuse(usage: str, message: str) -> BadArgument:
    """The error for options that are wrong or exclude each other."""
    return BadArgument(message, hint=f"Usage: {usage}")
