"""Makes room by forgetting keys that may be forgotten: those of caches, or all if the node is told so.

A hand goes round over these keys, slot by slot, which is in no order that a client could have in mind. It
forgets those that are past their time or of a dropped namespace, and those that were not used since it came
by last; see `sketch`. What was set and never read since goes first, so it lives for half a round on average.
Regions are never touched, nor are keys that are kept more than once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from time import monotonic
from typing import TYPE_CHECKING

from virgo.limits import MEMORY_EVICT_AGAIN_S, MEMORY_EVICT_LOOKS_MAX, MEMORY_SLOTS
from virgo.memory import keyspace
from virgo.memory.entries import live
from virgo.memory.keeping import OPENING
from virgo.memory.sketch import Sketch
from virgo.memory.spaces import SEPARATOR

if TYPE_CHECKING:
    from virgo.memory.batch import Batch

_SAMPLES = 64


class Evictor:
    """The hand of one store.

    Attributes:
        evicted: keys forgotten so far.
    """

    def __init__(self, sketch: Sketch) -> None:
        self._sketch = sketch
        self._slot = 0
        self._again_at = 0.0  # monotonic time before which there is nothing to be found
        self.evicted = 0

    def __repr__(self) -> str:
        return f"<Evictor at slot {self._slot}, {self.evicted} evicted>"

    def make_room(self, batch: Batch, prefixes: list[bytes], need_bytes: int, keep: bytes) -> int:
        """Forget keys with these prefixes until so many bytes are gained, if there are as many.

        Args:
            batch: that writes.
            prefixes: of keys that may be forgotten; b"" for all.
            need_bytes: of keys and records.
            keep: the stored key that must stay.

        Returns:
            What was gained. It is less if too few keys were found in MEMORY_EVICT_LOOKS_MAX looks.
        """
        gained = looks = 0
        if monotonic() < self._again_at:
            return 0
        for slot in self._round():
            for stored in [each for prefix in prefixes for each in _of_slot(batch, prefix, slot)]:
                looks += 1
                if stored == keep or stored.startswith(OPENING, 2):
                    continue
                # After many looks at keys in use, the next best will do: a change must not take long.
                tired = self._sketch.tire(stored) <= looks // (MEMORY_EVICT_LOOKS_MAX // 8)
                if tired or live(batch, stored) is None:
                    record = batch.key(stored)
                    gained += len(stored) + len(record or b"")
                    batch.delete_key(stored)
                    self.evicted += 1
            if gained >= need_bytes or looks >= MEMORY_EVICT_LOOKS_MAX:
                break
        if not gained:
            self._again_at = monotonic() + MEMORY_EVICT_AGAIN_S
        return gained

    def _round(self) -> Iterator[int]:
        """Each slot once, from where the hand is."""
        for _ in range(MEMORY_SLOTS):
            slot, self._slot = self._slot, (self._slot + 1) % MEMORY_SLOTS
            yield slot


def _of_slot(batch: Batch, prefix: bytes, slot: int) -> Iterator[bytes]:
    """A slot's stored keys with that prefix."""
    wanted = keyspace.SLOT_PREFIXES[slot]
    for stored in batch.with_prefix(prefix, slot):
        if not stored.startswith(wanted):
            return
        yield stored


def share(batch: Batch, prefixes: list[bytes]) -> float:
    """About what share of the bytes of all keys may be forgotten, by a sample."""
    if b"" in prefixes:
        return 1.0
    theirs = total = 0
    for _ in range(_SAMPLES if prefixes else 0):
        position = keyspace.SLOT_PREFIXES[random.randrange(MEMORY_SLOTS)]  # noqa: S311 - a sample
        stored = batch.key_from(position) or batch.key_from(b"\0")
        if stored is not None:
            size = len(stored) + len(batch.key(stored) or b"")
            total += size
            theirs += size * stored.startswith(tuple(prefixes), 2)
    return theirs / total if total else 0.0


def prefixes(names: list[bytes], *, evicts: bool) -> list[bytes]:
    """What the keys begin with that may be forgotten: those of the named caches, or all."""
    return [b""] if evicts else [name + SEPARATOR for name in names]
