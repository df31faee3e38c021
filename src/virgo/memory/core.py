"""Decisions about regions, room and placement: no I/O, no clock, no randomness of its own.

`Region.encode()` is what the store keeps of a region, byte for byte: kind, declared size and, for a spread
one, manifest and plan, for a shared one its note. `keyspace` has the decisions about keys.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from virgo.config import MEMORY_CAPACITY_BYTES_MAX, MEMORY_CAPACITY_BYTES_MIN
from virgo.errors import BadArgument, PoolFull, TooLarge
from virgo.limits import (
    MEMORY_CHUNK_BYTES,
    MEMORY_REGION_BYTES_MAX,
    MEMORY_SEGMENT_BYTES_MAX,
    MiB,
)

# --- regions --------------------------------------------------------------------------------

_REGION = struct.Struct("<BQQQH")
_PLAIN, _SPREAD, _MIXED, _SHARED = range(4)


@dataclass(frozen=True, slots=True)
class Region:
    """What the home node knows of a region.

    Attributes:
        size: declared bytes.
        spread: whether its bytes lie in chunks, by `plan`.
        version: of the last change of a spread region; 0 before the first one.
        length: bytes of the current value of a spread region.
        plan: for each chunk of the declared size the number of the node that has room for it.
        versions: for each chunk of the value the change that it is of, 0 where nothing but zeros is; empty
            if all are of `version`.
        shared: whether its bytes are one file in shared memory, a segment.
        note: what is to be known of a shared region to make use of it.
    """

    size: int
    spread: bool = False
    version: int = 0
    length: int = 0
    plan: tuple[int, ...] = ()
    versions: tuple[int, ...] = ()
    shared: bool = False
    note: bytes = b""

    def encode(self) -> bytes:
        """The record."""
        if self.shared:
            return _REGION.pack(_SHARED, self.size, 0, 0, 0) + self.note
        kind = (_MIXED if self.versions else _SPREAD) if self.spread else _PLAIN
        head = _REGION.pack(kind, self.size, self.version, self.length, len(self.plan))
        rest = f"<{len(self.plan)}H{len(self.versions)}Q"
        return head + struct.pack(rest, *self.plan, *self.versions)

    @staticmethod
    def is_shared(record: bytes) -> bool:
        """Whether a record is that of a shared region."""
        return record[0] == _SHARED

    @classmethod
    def decode(cls, record: bytes) -> Region:
        """The region of a record."""
        kind, size, version, length, count = _REGION.unpack_from(record)
        if kind == _SHARED:
            return cls(size, shared=True, note=record[_REGION.size :])
        versions = chunk_count(length) if kind == _MIXED else 0
        rest = struct.unpack_from(f"<{count}H{versions}Q", record, _REGION.size)
        return cls(size, kind != _PLAIN, version, length, rest[:count], rest[count:])

    def used_chunks(self) -> int:
        """How many chunks the current value has."""
        return chunk_count(self.length)

    def chunk_version(self, index: int) -> int:
        """The change that a chunk of the value is of, 0 if there is no such chunk: it is zeros."""
        if index >= self.used_chunks():
            return 0
        return self.versions[index] if self.versions else self.version

    def held(self, number: int) -> list[tuple[int, int]]:
        """Version and index of the chunks of the value that a node has."""
        found = ((self.chunk_version(index), index) for index in range(self.used_chunks()))
        return [(version, index) for version, index in found if version and self.plan[index] == number]

    def reserved(self) -> dict[int, int]:
        """Bytes that the plan reserves, by node."""
        found: dict[int, int] = {}
        for index, number in enumerate(self.plan):
            found[number] = found.get(number, 0) + chunk_bytes(self.size, index)
        return found


def check_size(size: int, *, shared: bool = False) -> None:
    """Raise BadArgument or TooLarge unless a region may have that size."""
    limit = MEMORY_SEGMENT_BYTES_MAX if shared else MEMORY_REGION_BYTES_MAX
    if size <= 0:
        raise BadArgument(f"a region of {size} bytes cannot be made", hint="The size is 1 byte or more.")
    if size > limit:
        raise TooLarge(
            f"a region of {size} bytes exceeds the limit of {limit}",
            hint="Use several regions.",
        )


def check_fits(length: int, size: int, identifier: int) -> None:
    """Raise TooLarge unless that many bytes fit the region."""
    if length > size:
        raise TooLarge(
            f"{length} bytes do not fit region {identifier:#x} of {size} bytes",
            hint="Free it and allocate a larger one.",
        )


def check_span(length: int, offset: int, size: int, identifier: int) -> None:
    """Raise TooLarge unless that many bytes fit the region from `offset` on, BadArgument if it is none."""
    check_offset(offset, size, identifier)
    if offset + length > size:
        raise TooLarge(
            f"{length} bytes from byte {offset} on do not fit region {identifier:#x} of {size} bytes",
            hint="Write less, or further to the front.",
        )


def check_part(offset: int, count: int | None, size: int, identifier: int) -> None:
    """Raise BadArgument unless bytes `offset` to `offset + count` lie within the region."""
    check_offset(offset, size, identifier)
    if count is not None and not 0 <= count <= size - offset:
        raise BadArgument(
            f"{count} bytes from byte {offset} on are not within region {identifier:#x} of {size} bytes",
            hint="The size is 0 or more; without it the rest of the value is read.",
        )


def check_answer(count: int, limit: int | None, identifier: int) -> None:
    """Raise TooLarge unless so many bytes of a region fit one answer."""
    if limit is not None and count > limit:
        raise TooLarge(
            f"{count} bytes of region {identifier:#x} do not fit one answer",
            hint=f"Read parts of it, of up to {limit} bytes.",
        )


def check_offset(offset: int, size: int, identifier: int) -> None:
    """Raise BadArgument unless the offset lies within the region, or at its end."""
    if not 0 <= offset <= size:
        raise BadArgument(
            f"byte {offset} is outside of region {identifier:#x} of {size} bytes",
            hint="Offsets count from 0 to the declared size.",
        )


def changed(
    identifier: int, region: Region, value: Callable[[], bytes | None], data: bytes, offset: int | None
) -> bytes | None:
    """What a plain region is to be set to: `data`, or with an offset its value with `data` written over it.

    None if nothing is written. Raises TooLarge, BadArgument.
    """
    if offset is None:
        check_fits(len(data), region.size, identifier)
        return data
    check_span(len(data), offset, region.size, identifier)
    return insert(value() or b"", data, offset) if data else None


def insert(value: bytes, data: bytes, offset: int) -> bytes:
    """The value with `data` written over it from `offset` on; a gap before it is zeros."""
    return b"".join((value[:offset].ljust(offset, b"\0"), data, value[offset + len(data) :]))


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


def written(region: Region, version: int, offset: int, count: int) -> Region:
    """The region after a change that wrote so many bytes, at least one, from `offset` on."""
    length = max(region.length, offset + count)
    versions = [region.chunk_version(index) for index in range(chunk_count(length))]
    for index in touched(offset, count):
        versions[index] = version
    mixed = () if all(each == version for each in versions) else tuple(versions)
    return replace(region, version=version, length=length, versions=mixed)


def touched(offset: int, count: int) -> range:
    """The chunks in which those bytes are."""
    return range(offset // MEMORY_CHUNK_BYTES, chunk_count(offset + count)) if count else range(0)


def chunk_part(offset: int, count: int, index: int) -> tuple[int, int]:
    """From where to where, within chunk `index`, those bytes are."""
    begin = index * MEMORY_CHUNK_BYTES
    return max(0, offset - begin), min(MEMORY_CHUNK_BYTES, offset + count - begin)


def replace_chunks(
    region: Region, bad: Collection[int], rooms: Mapping[int, int], movable: Collection[int]
) -> tuple[int, ...]:
    """The plan with those `movable` chunks that lay on `bad` nodes placed on others. Raises PoolFull."""
    moved = [index for index, number in enumerate(region.plan) if number in bad and index in movable]
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
        raise PoolFull(
            f"no node has room for the {size} bytes of {what}",
            hint="Free regions, raise memory.capacity_bytes, or make room on the disks under the pools.",
        )
    first, second = able[draw(len(able))], able[draw(len(able))]
    return max(first, second, key=lambda number: rooms[number])


# --- capacity -------------------------------------------------------------------------------


def capacity_bytes(configured: int, machine_bytes: int, nodes_on_machine: int) -> int:
    """What a node's pool may hold: as configured, else half of the machine shared by its nodes."""
    wanted = configured or machine_bytes // 2 // max(1, nodes_on_machine)
    return max(MEMORY_CAPACITY_BYTES_MIN, min(MEMORY_CAPACITY_BYTES_MAX, wanted))


def map_bytes(capacity: int) -> int:
    """Address space for a pool: a value is written beside its predecessor before that is dropped."""
    return 2 * capacity + 64 * MiB
