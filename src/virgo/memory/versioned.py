"""What Redis' commands on values lack: versions to compare, and times that slide with each use.

Functions as in `strings`.
"""

from __future__ import annotations

from virgo.memory.batch import Batch
from virgo.memory.entries import TIME_MAX, check_value, live, now_ms, number, refuse, slid, use
from virgo.memory.keyspace import Entry, stored_key

WRITE_USAGE = "key value [PX milliseconds] [SLIDING] [VERSION version]"


def read(batch: Batch, request: list[bytes]) -> list[bytes | int] | None:
    """MEMORY.READ key: value, version, milliseconds left (-1 if it stays for ever), 1 if its time slides."""
    entry = use(batch, stored_key(request[1]))
    batch.count_get(entry is not None)
    if entry is None:
        return None
    left_ms = max(0, entry.expires_ms - now_ms()) if entry.expires_ms else -1
    return [entry.value, entry.version, left_ms, int(bool(entry.sliding_ms))]


def write(batch: Batch, request: list[bytes]) -> int | None:
    """MEMORY.WRITE key value [options]: the new version; None if the key has another one than VERSION.

    Version 0 is that of a key which is not there.
    """
    time_ms, sliding, expected = _options(request[3:])
    check_value(len(request[2]))
    stored = stored_key(request[1])
    if expected >= 0:
        old = live(batch, stored)
        if (0 if old is None else old.version) != expected:
            return None
    if sliding:
        return batch.put_entry(stored, slid(Entry(request[2], sliding_ms=time_ms)))
    return batch.put_entry(stored, Entry(request[2], now_ms() + time_ms if time_ms else 0))


def _options(words: list[bytes]) -> tuple[int, bool, int]:
    """Time in ms or 0, whether it slides, and the expected version or -1."""
    time_ms, sliding, expected = 0, False, -1
    rest = iter(words)
    for word in rest:
        option = word.upper()
        if option in (b"PX", b"VERSION"):
            told = next(rest, None)
            if told is None:
                raise refuse(f"MEMORY.WRITE {WRITE_USAGE}", f"{option.decode()} lacks its number")
            if option == b"PX":
                time_ms = number(told, "the time", low=1, high=TIME_MAX)
            else:
                expected = number(told, "the version", low=0)
        elif option == b"SLIDING":
            sliding = True
        else:
            raise refuse(f"MEMORY.WRITE {WRITE_USAGE}", f"there is no option {word[:20]!r}")
    if sliding and not time_ms:
        raise refuse(f"MEMORY.WRITE {WRITE_USAGE}", "SLIDING needs a time")
    return time_ms, sliding, expected
