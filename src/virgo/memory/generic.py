"""Commands on keys as such, on the node that holds them, answering as Redis 7 does. As in `strings`."""

from __future__ import annotations

import random
import struct

from virgo.errors import BadArgument
from virgo.limits import MEMORY_SCAN_KEYS_MAX, MEMORY_SLOTS_ALL
from virgo.memory import keyspace
from virgo.memory.batch import Batch
from virgo.memory.entries import live, number, refuse, use
from virgo.memory.keyspace import stored_key
from virgo.wire.resp import OK, Encoded, Simple

COPY_USAGE = "source destination [DB 0] [REPLACE]"


def exists(batch: Batch, request: list[bytes]) -> int:
    """EXISTS key [key...]: a key named twice counts twice."""
    return sum(1 for key in request[1:] if live(batch, stored_key(key)) is not None)


def touch(batch: Batch, request: list[bytes]) -> int:
    """TOUCH key [key...]: as EXISTS, and sliding keys get their time anew."""
    return sum(1 for key in request[1:] if use(batch, stored_key(key)) is not None)


def delete(batch: Batch, request: list[bytes]) -> int:
    """DEL key [key...]."""
    deleted = 0
    for key in request[1:]:
        stored = stored_key(key)
        deleted += live(batch, stored) is not None
        batch.delete_key(stored)
        batch.drop_claim(stored)
    return deleted


def type_(batch: Batch, request: list[bytes]) -> Simple:
    """TYPE key."""
    return Simple("none" if live(batch, stored_key(request[1])) is None else "string")


def rename(batch: Batch, request: list[bytes]) -> Encoded:
    """RENAME key new: replaces what is there; value and time stay as they are."""
    _move(batch, request)
    return OK


def renamenx(batch: Batch, request: list[bytes]) -> int:
    """RENAMENX key new: only if there is no such key."""
    if live(batch, stored_key(request[1])) is not None and live(batch, stored_key(request[2])) is not None:
        return 0
    _move(batch, request)
    return 1


def _move(batch: Batch, request: list[bytes]) -> None:
    source, target = stored_key(request[1]), stored_key(request[2])
    entry = live(batch, source)
    if entry is None:
        raise no_such_key(request[1])
    if source != target:
        batch.delete_key(source)
        batch.put_entry(target, entry)


def no_such_key(key: bytes) -> BadArgument:
    """The error for a key that has to be there."""
    shown = key[:40].decode("utf-8", "backslashreplace")
    return BadArgument(f"there is no key {shown!r}", hint="EXISTS tells whether there is one.")


def copies_over(request: list[bytes]) -> bool:
    """Whether a COPY replaces what is there. Raises BadArgument."""
    words = [word.upper() for word in request[3:]]
    replaces = b"REPLACE" in words
    rest = [word for word in words if word != b"REPLACE"]
    if len(rest) % 2 or set(rest[::2]) - {b"DB"} or set(rest[1::2]) - {b"0"}:
        raise refuse(COPY_USAGE, "COPY got an unknown option; there is one database, 0")
    if request[1] == request[2]:
        raise BadArgument("source and destination are the same key", hint=f"Usage: COPY {COPY_USAGE}")
    return replaces


def copy(batch: Batch, request: list[bytes]) -> int:
    """COPY source destination [DB 0] [REPLACE]."""
    replaces, target = copies_over(request), stored_key(request[2])
    entry = live(batch, stored_key(request[1]))
    if entry is None or (not replaces and live(batch, target) is not None):
        return 0
    batch.put_entry(target, entry)
    return 1


# --- between nodes ----------------------------------------------------------------------------


def dump(batch: Batch, request: list[bytes]) -> bytes | None:
    """MEMORY.KEY.DUMP key: its record."""
    entry = live(batch, stored_key(request[1]))
    return None if entry is None else keyspace.encode_entry(entry, entry.version)


def put(batch: Batch, request: list[bytes]) -> int:
    """MEMORY.KEY.PUT key replace record: whether it was kept."""
    stored = stored_key(request[1])
    if request[2] == b"0" and live(batch, stored) is not None:
        return 0
    try:
        entry = keyspace.decode_entry(request[3])
    except struct.error:
        raise BadArgument("that is no record of a key", hint="It is for nodes, not for people.") from None
    batch.put_entry(stored, entry)
    return 1


def drop(batch: Batch, request: list[bytes]) -> int:
    """MEMORY.KEY.DROP key version: forget the key if it is still of that version."""
    stored = stored_key(request[1])
    entry = live(batch, stored)
    if entry is None or entry.version != number(request[2], "the version", low=0):
        return 0
    batch.delete_key(stored)
    return 1


def version(batch: Batch, request: list[bytes]) -> list[int]:
    """MEMORY.KEY.VERSION key [key...]: one number each that changes when the key does.

    That of a key which is not there is negative and changes when any key of its slot is deleted, so that
    one that came and went meanwhile is not taken for one that was never there.
    """
    found = []
    for key in request[1:]:
        stored = stored_key(key)
        entry = live(batch, stored)
        found.append(-1 - batch.gone(stored) if entry is None else entry.version)
    return found


def changed(batch: Batch, request: list[bytes]) -> list[int | bytes] | None:
    """MEMORY.KEY.CHANGED key version: its version, and the value if that is another one; nil if absent."""
    entry = use(batch, stored_key(request[1]))
    batch.count_get(entry is not None)
    if entry is None:
        return None
    same = entry.version == number(request[2], "the version", low=0)
    return [entry.version] if same else [entry.version, entry.value]


# --- all keys of this node --------------------------------------------------------------------


def count(batch: Batch, _request: list[bytes]) -> int:
    """MEMORY.KEYS.COUNT: keys on this node."""
    return batch.count_keys()


def flush(batch: Batch, _request: list[bytes]) -> Encoded:
    """MEMORY.KEYS.FLUSH: delete this node's keys."""
    batch.flush_keys()
    return OK


def random_key(batch: Batch, _request: list[bytes]) -> bytes | None:
    """MEMORY.KEYS.RANDOM: a key of this node, None if it has none."""
    start = random.randrange(MEMORY_SLOTS_ALL)  # noqa: S311 - any key will do
    for first in (start, 0):
        slot = first
        while slot < MEMORY_SLOTS_ALL:
            slot, keys = batch.scan(slot, 1, None)
            present = [key for key in keys if live(batch, stored_key(key)) is not None]
            if present:
                return random.choice(present)  # noqa: S311 - as above
    return None


def scan(batch: Batch, request: list[bytes]) -> tuple[int, list[bytes]]:
    """MEMORY.KEYS.SCAN slot count [pattern]: this node's keys of whole slots, and where to go on."""
    slot = number(request[1], "the slot", low=0, high=MEMORY_SLOTS_ALL - 1)
    wanted = number(request[2], "the count", low=1, high=MEMORY_SCAN_KEYS_MAX)
    pattern = request[3] if len(request) > 3 else b"*"
    matches = None if pattern == b"*" else keyspace.glob(pattern)
    return batch.scan(slot, wanted, matches, keyspace.prefix_of(pattern))
