"""Where the large buffers of results land that come through a node: shared memory of who waits for them.

A descriptor cannot go through a node, so a worker of the same machine and user opens the memory of who waits
by its process, lays the buffers there, and its outcome says where they lie. There is one such memory for all
calls of a process, of which each has a place of its own, far from the others: addresses take no memory. Since
it belongs to who waits, nobody has to say when he has read it, and it is gone with him.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Iterable
from typing import Final

from virgo.cpu import segments
from virgo.cpu.segments import Mapping, Segment, write
from virgo.kernel.at import punch

# Process, descriptor there, the number by which the kernel knows the memory, and where in it a place begins.
Address = tuple[int, int, int, int]

_PLACE_BITS: Final = 40
_PLACES: Final = 1 << 22  # an offset in a file has 63 bits
_PART_BITS: Final = 36


class Landing:
    """The memory, and the places in it."""

    def __init__(self) -> None:
        self.segment = segments.made("virgo-results")
        self._address = address_of(self.segment)
        self._forks = segments.forks()
        self._serial = itertools.count()
        self._used: set[int] = set()

    def __repr__(self) -> str:
        return f"<Landing {len(self._used)} places>"

    @property
    def of_this_process(self) -> bool:
        """Whether it is of no other process too, as after a fork."""
        return self._forks == segments.forks()

    def place(self) -> Place:
        """A place for the result of one call. It comes again only after some millions of others."""
        while (number := next(self._serial) % _PLACES) in self._used:
            pass
        self._used.add(number)
        return Place(self, number)

    def address(self, number: int) -> Address:
        """Of the place of that number, for others."""
        return *self._address[:3], number << _PLACE_BITS

    def free(self, number: int) -> None:
        """Nothing in that place is used any more; any thread may say so, within any statement."""
        if self.of_this_process:
            punch(self.segment.descriptor, number << _PLACE_BITS, 1 << _PLACE_BITS)
        self._used.discard(number)


class Place:
    """A place for a result, until neither this object nor what lies there is used.

    Attributes:
        address: for who lays something there.
        segment: the memory in which it is.
    """

    __slots__ = ("_landing", "_number", "address", "segment")

    def __init__(self, landing: Landing, number: int) -> None:
        self._landing = landing
        self._number = number
        self.address = landing.address(number)
        self.segment = landing.segment

    def __del__(self) -> None:
        self._landing.free(self._number)

    def __repr__(self) -> str:
        return f"<Place {self._number} of {self._landing!r}>"

    def mapping(self, start: int, size: int) -> Mapping:
        """What was laid there. Raises ValueError if it is elsewhere, OSError if it cannot be mapped."""
        if start >> _PLACE_BITS != self._number or size > 1 << _PART_BITS:
            raise ValueError("it does not lie in its place")
        mapping = Mapping(self.segment, size, start=start, ours=False, kept=False)
        weakref.finalize(mapping.memory.obj, _use, self).atexit = False  # the memory keeps its place
        return mapping


def _use(_place: Place) -> None:
    """Nothing: who is to call this keeps the place."""


_landing: Landing | None = None


def place() -> Place:
    """A place for the result of a call."""
    global _landing  # noqa: PLW0603 - it is a property of the process
    landing = _landing
    if landing is None or not landing.of_this_process:
        landing = _landing = Landing()
    return landing.place()


def address_of(segment: Segment) -> Address:
    """Of all of some memory, for others."""
    return os.getpid(), segment.descriptor, segment.number, 0


def next_part(address: Address) -> Address | None:
    """The next part of a place, for another attempt; None if there are no more.

    What ran before, and may run on unseen, does not write there.
    """
    process, descriptor, memory, start = address
    further = start + (1 << _PART_BITS)
    return (process, descriptor, memory, further) if further >> _PLACE_BITS == start >> _PLACE_BITS else None


def lay(address: Address, buffers: Iterable[memoryview], places: Iterable[int]) -> None:
    """Lay buffers at places behind the beginning. Raises OSError: who waits is gone, or there is no room."""
    segment = reached(address)
    for buffer, at in zip(buffers, places, strict=True):
        write(segment, buffer, address[-1] + at)


def reached(address: Address) -> Segment:
    """The memory of another process, opened. Raises OSError if it does not have it any more."""
    process, descriptor, number, _ = address
    segment = Segment(os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC))
    if segment.number != number:
        raise OSError("who sent the call does not wait for it any more")
    return segment
