"""Decisions about keys: which slot, what record, which patterns; no I/O, no clock, no randomness of its own.

What the store keeps, byte for byte:

- of a key: flags (1 byte), version (8); then, each if its flag is set, expiry in ms since 1970 (8), sliding
  time to live in ms (8), mark (4), generation (4), end of freshness in ms since 1970 (8), state (1); then
  the value;
- of the slots: one table with a 16-bit number of a node per slot, 0 for a slot that no node has yet; then,
  for the slots of keys that are kept twice, the second half, the numbers of the nodes with the copies.

A version is never given twice by one store, and rises with every change of it. The mark is a number that
memcached's clients keep beside a value, the state what its protocol notes. `spaces` says what the
generation is for.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple
from zlib import crc32

from virgo.errors import BadArgument, TooLarge
from virgo.limits import MEMORY_KEY_BYTES_MAX, MEMORY_SLOTS, MEMORY_SLOTS_AHEAD, MEMORY_SLOTS_ALL, MiB
from virgo.memory.core import choose_node
from virgo.memory.keeping import PLAIN, Pair, choose_mirror, keep_of

# --- keys and slots -------------------------------------------------------------------------

SLOT_PREFIXES = tuple(struct.pack(">H", slot) for slot in range(MEMORY_SLOTS_ALL))


def check_key(key: bytes) -> None:
    """Raise TooLarge if the key is too long to be kept."""
    if len(key) > MEMORY_KEY_BYTES_MAX:
        raise TooLarge(f"a key of {len(key)} bytes exceeds the limit of {MEMORY_KEY_BYTES_MAX}")


def slot_of(key: bytes) -> int:
    """The slot of a key: of the part in braces if there is one, so that keys can be kept together.

    As in Redis Cluster: the part between the first `{` and the next `}`, unless it is empty. A mark of
    `keeping` does not count as part of the key.
    """
    first = 0
    if b"{" in key:
        keep = keep_of(key)
        if keep is not PLAIN:
            first, key = MEMORY_SLOTS * (keep.copies - 1), key[len(keep.mark) :]
    if b"{" in key:
        start = key.index(b"{") + 1
        end = key.find(b"}", start)
        if end > start:
            key = key[start:end]
    return first + crc32(key) % MEMORY_SLOTS


def stored_key(key: bytes) -> bytes:
    """The key as it is kept: behind its slot, so that a slot's keys lie together."""
    return SLOT_PREFIXES[slot_of(key)] + key


# --- records --------------------------------------------------------------------------------

_EXPIRES, _SLIDES, _MARKED, _SPACED, _STALES, _STATED = 1, 2, 4, 8, 16, 32
NOWHERE = -1  # in place of a generation: in no namespace, and not to be evicted
_HEAD = struct.Struct("<BQ")
_pack_head = _HEAD.pack
HEAD_BYTES = _HEAD.size
_U64, _U32 = struct.Struct("<Q"), struct.Struct("<I")


class Entry(NamedTuple):
    """What is kept under a key.

    Attributes:
        value: the bytes.
        expires_ms: when it is past its time, in ms since 1970; 0 for never.
        sliding_ms: each use lets it live for so much longer; 0 if its expiry is fixed.
        mark: the number beside the value.
        version: given by the store with each change.
        generation: of its namespace; 0 in none, but it may be evicted; NOWHERE if neither.
        fresh_ms: from then on, in ms since 1970, the value is stale; 0 for never.
        state: bits of memcached's protocol, see `memcached.items`.
    """

    value: bytes
    expires_ms: int = 0
    sliding_ms: int = 0
    mark: int = 0
    version: int = 0
    generation: int = NOWHERE
    fresh_ms: int = 0
    state: int = 0


def encode_plain(value: bytes, version: int) -> bytes:
    """The record of a value that does not expire and has nothing beside it."""
    return _pack_head(0, version) + value


def encode_entry(entry: Entry, version: int) -> bytes:
    """The record of an entry, as of that version."""
    value, expires_ms, sliding_ms, mark, _, generation, fresh_ms, state = entry
    flags, fields = 0, b""
    if expires_ms:
        flags, fields = _EXPIRES, _U64.pack(expires_ms)
        if sliding_ms:
            flags, fields = flags | _SLIDES, fields + _U64.pack(sliding_ms)
    if mark:
        flags, fields = flags | _MARKED, fields + _U32.pack(mark)
    if generation != NOWHERE:
        flags, fields = flags | _SPACED, fields + _U32.pack(generation)
    if fresh_ms:
        flags, fields = flags | _STALES, fields + _U64.pack(fresh_ms)
    if state:
        flags, fields = flags | _STATED, fields + bytes((state,))
    return _pack_head(flags, version) + fields + value


def decode_entry(record: bytes) -> Entry:
    """The entry of a record."""
    flags, version = _HEAD.unpack_from(record)
    position, expires_ms, sliding_ms, mark, generation, fresh_ms, state = HEAD_BYTES, 0, 0, 0, NOWHERE, 0, 0
    if flags & _EXPIRES:
        expires_ms, position = _U64.unpack_from(record, position)[0], position + 8
    if flags & _SLIDES:
        sliding_ms, position = _U64.unpack_from(record, position)[0], position + 8
    if flags & _MARKED:
        mark, position = _U32.unpack_from(record, position)[0], position + 4
    if flags & _SPACED:
        generation, position = _U32.unpack_from(record, position)[0], position + 4
    if flags & _STALES:
        fresh_ms, position = _U64.unpack_from(record, position)[0], position + 8
    if flags & _STATED:
        state, position = record[position], position + 1
    return Entry(record[position:], expires_ms, sliding_ms, mark, version, generation, fresh_ms, state)


# --- patterns -------------------------------------------------------------------------------


def glob(pattern: bytes) -> Callable[[bytes], object]:
    """A matcher for Redis' patterns: `*`, `?`, `[a-c]`, `[^a]` and backslash for a literal."""
    out, position = [], 0
    while position < len(pattern):
        char = pattern[position : position + 1]
        position += 1
        if char == b"*":
            out.append(b".*")
        elif char == b"?":
            out.append(b".")
        elif char == b"\\" and position < len(pattern):
            out.append(re.escape(pattern[position : position + 1]))
            position += 1
        elif char == b"[" and (end := pattern.find(b"]", position + 1)) > 0:
            inner = pattern[position:end]
            negated = inner[:1] == b"^"
            members = re.sub(rb"([\\\[\]^&~|])", rb"\\\1", inner[1:] if negated else inner)
            out.append(b"[" + (b"^" if negated else b"") + members + b"]")
            position = end + 1
        else:
            out.append(re.escape(char))
    try:
        return re.compile(b"(?s:" + b"".join(out) + b")").fullmatch
    except re.error:
        raise BadArgument(
            f"{pattern[:40]!r} is no pattern",
            hint="As in Redis: *, ?, [a-z]; a backslash before one of these.",
        ) from None


def prefix_of(pattern: bytes) -> bytes:
    """What all keys that match a pattern begin with, as far as it is said plainly."""
    found = re.match(rb"(?:[^*?\[\\]|\\.)*", pattern, re.DOTALL)
    return re.sub(rb"(?s)\\(.)", rb"\1", found[0]) if found else b""


def pattern_of(prefix: bytes) -> bytes:
    """The pattern of all keys that begin so."""
    return re.sub(rb"([*?\[\]\\^])", rb"\\\1", prefix) + b"*"


# --- the slot table -------------------------------------------------------------------------

TABLE_LENGTH = MEMORY_SLOTS_ALL + MEMORY_SLOTS  # the owners, then the mirrors of the second half
_TABLE = struct.Struct(f"<{TABLE_LENGTH}H")


def decode_table(data: bytes) -> list[int]:
    """The slot table of the register's bytes."""
    return list(_TABLE.unpack(data.ljust(_TABLE.size, b"\0")))


def encode_table(table: Sequence[int]) -> bytes:
    """The register's bytes."""
    return _TABLE.pack(*table)


def pairs(table: Sequence[int]) -> list[Pair]:
    """Owner and mirror of each slot of keys that are kept twice."""
    owners, mirrors = table[MEMORY_SLOTS:MEMORY_SLOTS_ALL], table[MEMORY_SLOTS_ALL:]
    return [Pair(owner, mirror) for owner, mirror in zip(owners, mirrors, strict=True)]


def with_pairs(table: Sequence[int], changed: Mapping[int, Pair]) -> list[int]:
    """The table with other owners and mirrors, by index of `pairs`."""
    result = list(table)
    for index, (owner, mirror) in changed.items():
        result[MEMORY_SLOTS + index], result[MEMORY_SLOTS_ALL + index] = owner, mirror
    return result


def assign_slots(
    table: Sequence[int],
    wanted: Collection[int],
    *,
    local: int,
    rooms: Mapping[int, int],
    draw: Callable[[int], int],
    need_bytes: int = MiB,
) -> list[int]:
    """The table with every wanted slot assigned; what is assigned already stays as it is.

    The local node takes slots while it has room, and some more than are wanted, so that a first load of
    many keys is not one engine write per slot. Otherwise the better of two random nodes takes the slot.

    Raises:
        PoolFull: a slot is unassigned and no node has `need_bytes` free.
    """
    result = list(table)
    missing = [slot for slot in wanted if not result[slot]]
    for slot in missing:
        result[slot] = choose_node(need_bytes, local, rooms, draw, "a new key")
    if rooms.get(local, -1) >= need_bytes:
        for first in {slot // MEMORY_SLOTS * MEMORY_SLOTS for slot in missing}:
            start = draw(MEMORY_SLOTS)
            turn = (first + (start + step) % MEMORY_SLOTS for step in range(MEMORY_SLOTS))
            for slot in itertools.islice((slot for slot in turn if not result[slot]), MEMORY_SLOTS_AHEAD):
                result[slot] = local
    for slot in range(MEMORY_SLOTS, MEMORY_SLOTS_ALL):
        if result[slot] and not table[slot]:
            result[slot + MEMORY_SLOTS] = choose_mirror(result[slot], rooms, draw)
    return result
