"""Regions that are kept more safely than others: on disk before the answer, or on two nodes; see `keeping`.

Such a region is a key that is kept so, which listings do not show and FLUSHDB leaves alone. Its id names no
node, for it may move: in place of a node's number there is 0, then how it is kept, then the number of the
node that gave the id, and a serial of its own. Its declared size is the mark beside its value.

Functions as in `strings`, and `KeptRegions`, which serves them from any node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from virgo.errors import BadArgument, PoolFull, TooLarge, UnknownId
from virgo.limits import MEMORY_KEPT_REGION_BYTES_MAX
from virgo.members import SERIAL_BITS
from virgo.memory.batch import Batch
from virgo.memory.core import check_fits
from virgo.memory.entries import live, number
from virgo.memory.keeping import Keep
from virgo.memory.keyspace import Entry, stored_key
from virgo.memory.verbs import Verb

PREFIX: Final = b"\0region:"
_SERIAL_BITS: Final = 31
_KEEP_BIT: Final = SERIAL_BITS - 2


def compose(keep: Keep, node: int, serial: int) -> int:
    """The id of a kept region. Raises PoolFull after the last serial of a node."""
    if serial >= 1 << _SERIAL_BITS:
        raise PoolFull(f"node {node} has given all of its {1 << _SERIAL_BITS} ids of kept regions")
    kind = (keep.copies == 2) << 1 | keep.durable
    return kind << _KEEP_BIT | node << _SERIAL_BITS | serial


def is_kept(identifier: int) -> bool:
    """Whether an id is one of a kept region."""
    return 1 << _KEEP_BIT <= identifier < 1 << SERIAL_BITS


def key_of(identifier: int) -> bytes:
    """The key under which it is."""
    kind = identifier >> _KEEP_BIT
    return Keep(2 if kind & 2 else 1, bool(kind & 1)).mark + PREFIX + b"%d" % identifier


def check_size(size: int) -> None:
    """Raise TooLarge if a kept region may not have that size."""
    if size > MEMORY_KEPT_REGION_BYTES_MAX:
        raise TooLarge(
            f"a region of {size} bytes exceeds the {MEMORY_KEPT_REGION_BYTES_MAX} of one that is kept",
            hint="Use several, or one with a single copy that is not durable.",
        )


# --- where the key is -------------------------------------------------------------------------


def _entry(batch: Batch, key: bytes) -> Entry:
    entry = live(batch, stored_key(key))
    if entry is None:
        identifier = int(key.rpartition(b":")[2])
        raise UnknownId(f"no region has the id {identifier} ({identifier:#x})")
    return entry


def make(batch: Batch, request: list[bytes]) -> int:
    """MEMORY.KEPT.MAKE key size."""
    batch.put_entry(stored_key(request[1]), Entry(b"", mark=number(request[2], "the size", low=1)))
    return 1


def set_(batch: Batch, request: list[bytes]) -> int:
    """MEMORY.KEPT.SET key data [offset]: all of it, or a part, a gap before which is zeros."""
    entry, data = _entry(batch, request[1]), request[2]
    if len(request) > 3:
        offset = number(request[3], "the offset", low=0)
        before = entry.value
        data = before[:offset].ljust(offset, b"\0") + data + before[offset + len(data) :]
    check_fits(len(data), entry.mark, int(request[1].rpartition(b":")[2]))
    batch.put_entry(stored_key(request[1]), entry._replace(value=data))
    return 1


def get(batch: Batch, request: list[bytes]) -> bytes:
    """MEMORY.KEPT.GET key [offset [size]]."""
    entry = _entry(batch, request[1])
    offset = number(request[2], "the offset", low=0) if len(request) > 2 else 0
    end = offset + number(request[3], "the size", low=0) if len(request) > 3 else max(offset, entry.mark)
    if end > entry.mark or offset > entry.mark:
        raise BadArgument(
            f"bytes {offset} to {end} are outside of the region's {entry.mark}", hint="Its size is its end."
        )
    return entry.value[offset:end]


def info(batch: Batch, request: list[bytes]) -> list[int]:
    """MEMORY.KEPT.INFO key: declared size and length."""
    entry = _entry(batch, request[1])
    return [entry.mark, len(entry.value)]


def free(batch: Batch, request: list[bytes]) -> int:
    """MEMORY.KEPT.FREE key."""
    _entry(batch, request[1])
    batch.delete_key(stored_key(request[1]))
    return 1


def _verb(name: str, local: Callable[[Batch, list[bytes]], Any], usage: str, **more: Any) -> Verb:
    return Verb(name=f"MEMORY.KEPT.{name}", local=local, usage=usage, summary="Between nodes.", **more)


MAKE = _verb("MAKE", make, "key size", changes=True, creates=True)
SET = _verb("SET", set_, "key data [offset]", changes=True)
GET = _verb("GET", get, "key [offset [size]]")
INFO = _verb("INFO", info, "key")
FREE = _verb("FREE", free, "key", changes=True)
VERBS = (MAKE, SET, GET, INFO, FREE)
