"""Several log entries in one stored message, and the sequences that this gives them. Pure.

One message is one write and one sync of the engine whatever it holds, so an append packs its entries into
as few messages as they fit in. The entry `i` of the message with stream sequence `s` has the sequence
`s * 1024 + i`: strictly rising, with gaps between messages.

A frame is `VF`, the count and the lengths of the entries, then the entries.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from virgo.engine.base import Entry
from virgo.errors import BadArgument, InternalFault, TooLarge
from virgo.limits import LOG_BATCH_BYTES_MAX, LOG_BATCH_ENTRIES_MAX, LOG_ENTRY_BYTES_MAX, KiB, MiB

INDEX_BITS: Final = 10
_INDEX_MASK: Final = (1 << INDEX_BITS) - 1
_MAGIC: Final = b"VF"
_HEAD: Final = struct.Struct("<2sH")
_LENGTH_BYTES: Final = 4
# The engine's message of 1 MiB, less its headers; the longest entry and its own head fit as well.
FRAME_BYTES_MAX: Final = 1 * MiB - 4 * KiB

assert LOG_BATCH_ENTRIES_MAX <= _INDEX_MASK + 1


def compose(stream_sequence: int, index: int) -> int:
    """The sequence of an entry."""
    return stream_sequence << INDEX_BITS | index


def split(sequence: int) -> tuple[int, int]:
    """Stream sequence and index of an entry."""
    return sequence >> INDEX_BITS, sequence & _INDEX_MASK


def check(entries: Sequence[bytes]) -> int:
    """The bytes of the entries together. Raises BadArgument, TooLarge."""
    if not entries:
        raise BadArgument("an append without entries", hint="Append at least one entry.")
    if len(entries) > LOG_BATCH_ENTRIES_MAX:
        raise TooLarge(
            f"an append of {len(entries)} entries, at most {LOG_BATCH_ENTRIES_MAX}",
            hint="Append them in parts; only a part is all or none.",
        )
    longest = max(map(len, entries))
    if longest > LOG_ENTRY_BYTES_MAX:
        raise TooLarge(
            f"a log entry of {longest} bytes, at most {LOG_ENTRY_BYTES_MAX}",
            hint="Put the data into the memory pool or a file, and a reference into the log.",
        )
    total = sum(map(len, entries))
    if total > LOG_BATCH_BYTES_MAX:
        raise TooLarge(
            f"an append of {total} bytes, at most {LOG_BATCH_BYTES_MAX}", hint="Append them in parts."
        )
    return total


def cost(entry: bytes) -> int:
    """Bytes that an entry takes in a frame."""
    return len(entry) + _LENGTH_BYTES


def pack(entries: Sequence[bytes]) -> list[bytes]:
    """The entries in as few frames as they fit in, in order."""
    frames: list[bytes] = []
    first, size = 0, _HEAD.size
    for index, entry in enumerate(entries):
        if size + cost(entry) > FRAME_BYTES_MAX:
            frames.append(_frame(entries[first:index]))
            first, size = index, _HEAD.size
        size += cost(entry)
    frames.append(_frame(entries[first:]))
    return frames


def _frame(entries: Sequence[bytes]) -> bytes:
    lengths = struct.pack(f"<{len(entries)}I", *map(len, entries))
    return b"".join((_HEAD.pack(_MAGIC, len(entries)), lengths, *entries))


def count(frame: bytes) -> int:
    """How many entries a frame holds. Raises InternalFault for what is none."""
    if len(frame) >= _HEAD.size:
        magic, entries = _HEAD.unpack_from(frame)
        if magic == _MAGIC and entries:
            return int(entries)
    raise InternalFault(
        "a log holds a message that is no frame", hint="Something else writes to VIRGO's subjects."
    )


def unpack(stream_sequence: int, frame: bytes) -> list[Entry]:
    """The entries of a frame. Raises InternalFault for what is none."""
    entries = count(frame)
    offset = _HEAD.size + _LENGTH_BYTES * entries
    if offset > len(frame):
        raise InternalFault(f"message {stream_sequence} of a log is cut off")
    lengths = struct.unpack_from(f"<{entries}I", frame, _HEAD.size)
    if offset + sum(lengths) != len(frame):
        raise InternalFault(f"message {stream_sequence} of a log is cut off")
    found = []
    for index, length in enumerate(lengths):
        found.append(Entry(compose(stream_sequence, index), frame[offset : offset + length]))
        offset += length
    return found
