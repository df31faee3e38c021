"""What a process has read by mapping, and what surely still is so: values that need not be looked up again.

A store of LMDB says in its two heads which change was the last, and the next one overwrites the older head
before anybody can read what it changed. So while that head is as it was, a value that was read is what a
look-up would find, and one look at 8 bytes of the map tells. A change of any key, by any process, ends it;
then what is remembered is forgotten as a whole.

What expires is not remembered. Of what may be evicted a use counts once between two changes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any, Final

from virgo.limits import MEMORY_RECALL_BYTES_MAX, MEMORY_RECALL_VALUE_BYTES_MAX
from virgo.memory.heads import NUMBER_AT, PAGE_BYTES

_NEVER: Final = -1
_ENTRY_BYTES: Final = 200  # that remembering takes beside a value, about


class Clock:
    """The numbers of a store's last changes, as they are right now.

    Attributes:
        inode: of the file.
        words: of the map. The number of the last change is the higher one of two of them.
        until: monotonic time up to which it is the clock of the store that is at its path.
    """

    __slots__ = ("inode", "until", "words")

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.inode = os.fstat(descriptor).st_ino
            heads = mmap.mmap(descriptor, 2 * PAGE_BYTES, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        self.words: Sequence[int] = memoryview(heads).cast("Q")
        self.until = 0.0

    def __repr__(self) -> str:
        return f"<Clock at {max(self.words[word_after(0)], self.words[word_after(1)])}>"


def word_after(number: int) -> int:
    """The place of the word that the change after that one overwrites."""
    return ((number + 1) % 2 * PAGE_BYTES + NUMBER_AT) // 8


class _Stopped:
    """The clock of no store."""

    words: Sequence[int] = (0,)
    until = 0.0


class Recall:
    """Values by what their user calls them; see the module. Safe for use from several threads.

    Attributes:
        last: the store's clock, the place of the word that tells, what it has to be, and the values.
    """

    __slots__ = ("_room", "last")

    def __init__(self) -> None:
        self.last: tuple[Clock | _Stopped, int, int, dict[Any, bytes]] = (_Stopped(), 0, _NEVER, {})
        self._room = 0

    def __repr__(self) -> str:
        return f"<Recall of {len(self.last[3])} values>"

    def get(self, name: Any) -> bytes | None:
        """A value, None if it has to be looked up. `KeyMapping.get` spells it out."""
        clock, place, number, values = self.last
        if clock.words[place] == number and monotonic() < clock.until:
            try:
                return values.get(name)
            except (TypeError, ValueError):  # a bytearray, which has no hash
                pass
        return None

    def forget(self) -> None:
        """Know nothing."""
        self.last = (_Stopped(), 0, _NEVER, {})

    def note(self, name: Any, value: bytes, number: int, clock: Clock) -> None:
        """Remember a value that was there after the change of that number."""
        size = len(value)
        if size > MEMORY_RECALL_VALUE_BYTES_MAX:
            return
        known, _place, seen, values = self.last
        if seen == number - 1 and known is clock and self._room >= size:
            values[name] = value
            self._room -= size + _ENTRY_BYTES
            return
        self.last = (clock, word_after(number), number - 1, {name: value})
        self._room = MEMORY_RECALL_BYTES_MAX - size - _ENTRY_BYTES
