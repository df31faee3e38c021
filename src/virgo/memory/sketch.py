"""How often keys were used of late, known to all processes that map a store: what eviction goes by.

A byte for each value of a hash, in a mapped file beside the store. Each use of a key that may be evicted adds
one; when the hand of the evicting node comes by, it halves what is left (a clock with counters, as in
Corbató's paging and GCLOCK). So a key that is used between two visits stays, and a scan of many keys, each
used once, does not drive it out. It is a hint: processes that count at the same moment may lose one, keys
that share a byte count together, and without the file, on a full disk for example, all keys look alike.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from zlib import crc32

from virgo.limits import MEMORY_SKETCH_BYTES

_NAME = "sketch"
_MASK = MEMORY_SKETCH_BYTES - 1
_MOST = 255
assert MEMORY_SKETCH_BYTES & _MASK == 0, "a power of two"


class Sketch:
    """The counts of the store in `directory`; with `create` they are made if need be."""

    def __init__(self, directory: Path, *, create: bool) -> None:
        self._counts = _map(directory / _NAME, create=create)

    def __repr__(self) -> str:
        return f"<Sketch{'' if self._counts else ' without counts'}>"

    @property
    def counts(self) -> bool:
        """Whether there is a file to count in."""
        return self._counts is not None

    def use(self, stored: bytes) -> None:
        """Count a use of a key."""
        if self._counts is None:
            return
        place = crc32(stored) & _MASK
        count = self._counts[place]
        if count < _MOST:
            self._counts[place] = count + 1

    def tire(self, stored: bytes) -> int:
        """Halve the count of a key; returns what it was."""
        if self._counts is None:
            return 0
        place = crc32(stored) & _MASK
        count = self._counts[place]
        self._counts[place] = count >> 1
        return count


def _map(path: Path, *, create: bool) -> mmap.mmap | None:
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        descriptor = os.open(path, flags, 0o600)
        try:
            if create:  # to the last page, for a page that finds no room on the disk would be a SIGBUS
                os.posix_fallocate(descriptor, 0, MEMORY_SKETCH_BYTES)
            return mmap.mmap(descriptor, MEMORY_SKETCH_BYTES)
        finally:
            os.close(descriptor)
    except (OSError, ValueError):  # no room, not ours, or not made yet
        return None
