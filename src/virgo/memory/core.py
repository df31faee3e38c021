"""Decisions of the memory pool: no I/O, no clock, no randomness of its own.

Records are what the store keeps, byte for byte:

| record | form |
| --- | --- |
| region | `Region.encode()`: kind, declared size and, for a spread one, manifest and plan |
| key | flags, then the expiry in ms since 1970 if flag 1 is set, then the value |
| slot table | one 16-bit number of a node per slot, 0 for a slot that no node has yet |
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

from virgo.config import MEMORY_CAPACITY_BYTES_MAX, MEMORY_CAPACITY_BYTES_MIN
from virgo.errors import BadArgument, PoolFull, TooLarge
from virgo.limits import (
    MEMORY_CHUNK_BYTES,
    MEMORY_KEY_BYTES_MAX,
    MEMORY_REGION_BYTES_MAX,
    MEMORY_SLOTS,
    MEMORY_SLOTS_AHEAD,
    MiB,
)

# --- regions --------------------------------------------------------------------------------

_REGION = struct.Struct("<BQQQH")
_PLAIN, _SPREAD = 0, 1


@dataclass(frozen=True, slots=True)
class Region:
    """What the home node knows of a region.

    Attributes:
        size: declared bytes.
        spread: whether its bytes lie in chunks, by `plan`.
        version: which chunks are the current value; 0 before the first set.
        length: bytes of the current value of a spread region.
        plan: for each chunk of the declared size the number of the node that has room for it.
    """

    size: int
    spread: bool = False
    version: int = 0
    length: int = 0
    plan: tuple[int, ...] = ()

    def encode(self) -> bytes:
        """The record."""
        kind = _SPREAD if self.spread else _PLAIN
        head = _REGION.pack(kind, self.size, self.version, self.length, len(self.plan))
        return head + struct.pack(f"<{len(self.plan)}H", *self.plan)

    @classmethod
    def decode(cls, record: bytes) -> Region:
        """The region of a record."""
        kind, size, version, length, count = _REGION.unpack_from(record)
        plan = struct.unpack_from(f"<{count}H", record, _REGION.size)
        return cls(size, kind == _SPREAD, version, length, plan)

    def used_chunks(self) -> int:
        """How many chunks the current value has."""
        return chunk_count(self.length)

    def reserved(self) -> dict[int, int]:
        """Bytes that the plan reserves, by node."""
        found: dict[int, int] = {}
        for index, number in enumerate(self.plan):
            found[number] = found.get(number, 0) + chunk_bytes(self.size, index)
        return found


def check_size(size: int) -> None:
    """Raise BadArgument or TooLarge unless a region may have that size."""
    if size <= 0:
        raise BadArgument(f"a region of {size} bytes cannot be made", hint="The size is 1 byte or more.")
    if size > MEMORY_REGION_BYTES_MAX:
        raise TooLarge(
            f"a region of {size} bytes exceeds the limit of {MEMORY_REGION_BYTES_MAX}",
            hint="Use several regions.",
        )


def check_fits(length: int, size: int, identifier: int) -> None:
    """Raise TooLarge unless that many bytes fit the region."""
    if length > size:
        raise TooLarge(
            f"{length} bytes do not fit region {identifier:#x} of {size} bytes",
            hint="Free it and allocate a larger one.",
        )


# --- spreading ------------------------------------------------------------------------------


def chunk_count(length: int) -> int:
    """Chunks of a value of that many bytes."""
    return -(-length // MEMORY_CHUNK_BYTES)


def chunk_bytes(length: int, index: int) -> int:
    """Bytes of chunk `index` of a value of that many bytes."""
    return max(0, min(MEMORY_CHUNK_BYTES, length - index * MEMORY_CHUNK_BYTES))


def place_chunks(sizes: Sequence[int], rooms: Mapping[int, int]) -> list[int]:
    """A node for each chunk: round over the nodes, weighted by their free bytes, none overfilled.

    Smooth weighted round-robin as in load balancers: each turn every node gains its weight, the richest
    takes the chunk and pays the sum of all weights.

    Raises:
        PoolFull: the nodes together, or their pieces, have too little room.
    """
    weights = {number: room for number, room in sorted(rooms.items()) if room > 0}
    left, credit, total = dict(weights), dict.fromkeys(weights, 0), sum(weights.values())
    placed = []
    for size in sizes:
        for number, weight in weights.items():
            credit[number] += weight
        able = [number for number in weights if left[number] >= size]
        if not able:
            raise PoolFull(
                f"no node has room for another {size} bytes; "
                f"{sum(rooms.values())} bytes are free on {len(rooms)} nodes, {sum(sizes)} are asked for"
            )
        chosen = max(able, key=lambda number: (credit[number], -number))
        credit[chosen] -= total
        left[chosen] -= size
        placed.append(chosen)
    return placed


def replace_chunks(region: Region, bad: Collection[int], rooms: Mapping[int, int]) -> tuple[int, ...]:
    """The plan with the chunks that lay on `bad` nodes placed on others. Raises PoolFull."""
    moved = [index for index, number in enumerate(region.plan) if number in bad]
    good = {number: room for number, room in rooms.items() if number not in bad}
    targets = place_chunks([chunk_bytes(region.size, index) for index in moved], good)
    plan = list(region.plan)
    for index, target in zip(moved, targets, strict=True):
        plan[index] = target
    return tuple(plan)


def choose_node(
    size: int, local: int, rooms: Mapping[int, int], draw: Callable[[int], int], what: str = "the value"
) -> int:
    """The node for `size` bytes: the local one while it has room, else the better of two random ones.

    Args:
        rooms: free bytes by node, the local one's among them if it may be used.
        draw: gives a random number from 0 to below its argument.

    Raises:
        PoolFull: no node has room.
    """
    if rooms.get(local, -1) >= size:
        return local
    able = sorted(number for number, room in rooms.items() if room >= size)
    if not able:
        raise PoolFull(f"no node has room for the {size} bytes of {what}")
    first, second = able[draw(len(able))], able[draw(len(able))]
    return max(first, second, key=lambda number: rooms[number])


# --- keys -----------------------------------------------------------------------------------

_EXPIRY = struct.Struct("<BQ")
PLAIN_KEY = b"\0"
SLOT_PREFIXES = tuple(struct.pack(">H", slot) for slot in range(MEMORY_SLOTS))


def check_key(key: bytes) -> None:
    """Raise TooLarge if the key is too long to be kept."""
    if len(key) > MEMORY_KEY_BYTES_MAX:
        raise TooLarge(f"a key of {len(key)} bytes exceeds the limit of {MEMORY_KEY_BYTES_MAX}")


def slot_of(key: bytes) -> int:
    """The slot of a key."""
    return crc32(key) % MEMORY_SLOTS


def stored_key(key: bytes) -> bytes:
    """The key as it is kept: behind its slot, so that a slot's keys lie together."""
    return SLOT_PREFIXES[crc32(key) % MEMORY_SLOTS] + key


def encode_value(value: bytes, expires_ms: int = 0) -> bytes:
    """A key's record; `expires_ms` 0 for a value that does not expire."""
    return _EXPIRY.pack(1, expires_ms) + value if expires_ms else PLAIN_KEY + value


def decode_value(record: bytes) -> tuple[bytes, int]:
    """Value and expiry of a key's record."""
    if record[0] == 0:
        return record[1:], 0
    return record[_EXPIRY.size :], _EXPIRY.unpack_from(record)[1]


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


# --- slots ----------------------------------------------------------------------------------

_TABLE = struct.Struct(f"<{MEMORY_SLOTS}H")


def decode_table(data: bytes) -> list[int]:
    """The slot table of the register's bytes."""
    return list(_TABLE.unpack(data)) if data else [0] * MEMORY_SLOTS


def encode_table(table: Sequence[int]) -> bytes:
    """The register's bytes."""
    return _TABLE.pack(*table)


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
    if missing and rooms.get(local, -1) >= need_bytes:
        start = draw(MEMORY_SLOTS)
        free = [slot for slot in (*range(start, MEMORY_SLOTS), *range(start)) if not result[slot]]
        for slot in free[:MEMORY_SLOTS_AHEAD]:
            result[slot] = local
    return result


# --- capacity -------------------------------------------------------------------------------


def capacity_bytes(configured: int, machine_bytes: int, nodes_on_machine: int) -> int:
    """What a node's pool may hold: as configured, else half of the machine shared by its nodes."""
    wanted = configured or machine_bytes // 2 // max(1, nodes_on_machine)
    return max(MEMORY_CAPACITY_BYTES_MIN, min(MEMORY_CAPACITY_BYTES_MAX, wanted))


def map_bytes(capacity: int) -> int:
    """Address space for a pool: a value is written beside its predecessor before that is dropped."""
    return 2 * capacity + 64 * MiB
