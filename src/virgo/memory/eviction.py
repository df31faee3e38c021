"""Makes room by forgetting keys that may be forgotten: those of caches, or all if the node is told so.

A hand goes round over these keys, slot by slot, which is in no order that a client could have in mind. It
forgets those that are past their time or of a dropped namespace, and those that were not used since it came
by last; see `sketch`. A key that is set anew counts as used. Regions are never touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from virgo.limits import MEMORY_EVICT_LOOKS_MAX, MEMORY_SLOTS
from virgo.memory import keyspace
from virgo.memory.entries import live
from virgo.memory.sketch import Sketch
from virgo.memory.spaces import SEPARATOR

if TYPE_CHECKING:
    from virgo.memory.batch import Batch


class Evictor:
    """The hand of one store.

    Attributes:
        evicted: keys forgotten so far.
    """

    def __init__(self, sketch: Sketch) -> None:
        self._sketch = sketch
        self._slot = 0
        self.evicted = 0

    def __repr__(self) -> str:
        return f"<Evictor at slot {self._slot}, {self.evicted} evicted>"

    def make_room(self, batch: Batch, prefixes: list[bytes], need_bytes: int) -> int:
        """Forget keys with these prefixes until so many bytes are gained, if there are as many.

        Args:
            batch: that writes.
            prefixes: of keys that may be forgotten; b"" for all.
            need_bytes: of keys and records.

        Returns:
            What was gained. It is less if too few keys were found in MEMORY_EVICT_LOOKS_MAX looks.
        """
        gained = looks = 0
        for slot in self._round():
            for stored in [each for prefix in prefixes for each in _of_slot(batch, prefix, slot)]:
                looks += 1
                # After many looks at keys in use, the next best will do: a change must not take long.
                tired = self._sketch.tire(stored) <= looks // (MEMORY_EVICT_LOOKS_MAX // 8)
                if tired or live(batch, stored) is None:
                    record = batch.key(stored)
                    gained += len(stored) + len(record or b"")
                    batch.delete_key(stored)
                    self.evicted += 1
            if gained >= need_bytes or looks >= MEMORY_EVICT_LOOKS_MAX:
                break
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


def prefixes(names: list[bytes], *, evicts: bool) -> list[bytes]:
    """What the keys begin with that may be forgotten: those of the named caches, or all."""
    return [b""] if evicts else [name + SEPARATOR for name in names]
