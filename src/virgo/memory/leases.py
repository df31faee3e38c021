"""Shared regions as a client of the machine has them: which are near, their views, and the right to write.

A region whose home is on this machine, and whose file this user may open, is used through its file, with
nobody in between; for any other the node is asked, which asks the home.
"""

from __future__ import annotations

import importlib
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from virgo.errors import BadArgument, Busy, NotLoaded, NotRunning
from virgo.memory import descriptors
from virgo.wire.call import seconds

if TYPE_CHECKING:
    from virgo.memory.regioncalls import SegmentInfo
    from virgo.memory.segments import Segment

T = TypeVar("T")
_leases: weakref.WeakSet[Lease] = weakref.WeakSet()


class Nearby:
    """The shared regions that a client knows to be on its machine."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}

    def __repr__(self) -> str:
        return f"<Nearby {len(self._segments)} segments>"

    def __bool__(self) -> bool:
        return bool(self._segments)

    def learn(self, info: SegmentInfo) -> Segment | None:
        """The segment, None if it is not on this machine or not ours to open."""
        segment = info.segment()
        try:
            descriptors.shut(segment.open())
        except NotRunning:
            return None
        self._segments[info.id] = segment
        return segment

    def forget(self, identifier: int) -> None:
        """It was freed."""
        self._segments.pop(identifier, None)

    def do(self, identifier: int, work: Callable[[Segment], T], otherwise: T) -> T:
        """The result of work on the file, `otherwise` if the node is to be asked."""
        segment = self._segments.get(identifier)
        if segment is None:
            return otherwise
        try:
            return work(segment)
        except NotRunning:  # freed, or it cannot be written from here
            if not segment.exists():
                self.forget(identifier)
            return otherwise


class Lease:
    """The right to write a segment in place, held by this process; see `segments`.

    A thread that asks while another one of the process has it waits as one of another process does. After a
    fork the child's is not held.

    Attributes:
        segment: what it is of.
    """

    __slots__ = ("__weakref__", "_held", "_turn", "segment")

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.renew()
        _leases.add(self)

    def __repr__(self) -> str:
        return f"<Lease of {self.segment!r} {'held' if self.held else 'not held'}>"

    def __del__(self) -> None:
        self.release()

    def renew(self) -> None:
        """Begin anew, not held: what was held is another process's."""
        self._held: list[tuple[int, object]] = []  # descriptor and owner: come and go in one step
        self._turn = threading.Lock()  # of whoever has it or is about to

    @property
    def held(self) -> bool:
        """Whether we have it."""
        return bool(self._held)

    @property
    def owner(self) -> object:
        """For whom it was acquired, None if it is not held."""
        for _descriptor, owner in self._held[:1]:
            return owner
        return None

    def acquire(self, timeout_s: float = 0.0, owner: object = None) -> None:
        """Have it. Raises Busy if another one has it for so long, NotRunning if the segment is gone."""
        deadline = time.monotonic() + timeout_s
        self.take_turn(timeout_s)  # one that asks twice waits for itself
        self.have(deadline, owner)

    def take_turn(self, timeout_s: float) -> None:
        """Be the one of this process that may `have` it. Raises Busy."""
        if not self._turn.acquire(timeout=min(max(0.0, timeout_s), threading.TIMEOUT_MAX)):
            raise Busy(
                f"region {self.segment.identifier:#x} is leased to this very array",
                hint="Whoever has acquired it in this process must release it first.",
            )

    def have(self, deadline: float, owner: object) -> None:
        """Have it, or give the turn back."""
        turn = self._turn
        try:
            self._held.append((self.segment.lease(max(0.0, deadline - time.monotonic())), owner))
        except BaseException:
            turn.release()
            raise

    def release(self) -> None:
        """Let go, whoever has it; nothing if it is not held."""
        try:
            descriptor, _owner = self._held.pop()
        except IndexError:
            return
        descriptors.shut(descriptor)
        self._turn.release()


class View:
    """The bytes of a region for the time of a `with` block; see `Region.view`."""

    def __init__(self, found: Segment | bytes, *, write: bool, timeout_s: float) -> None:
        self._found = found
        self._write = write
        self._timeout_s = seconds(timeout_s)
        self._lease: Lease | None = None
        self._memory: memoryview | None = None
        self._map: mmap.mmap | None = None

    def __repr__(self) -> str:
        return f"<View of {self._found!r:.60}>"

    def hold(self) -> memoryview:
        """The bytes to read, for as long as somebody refers to them."""
        if isinstance(self._found, bytes):
            return memoryview(self._found)
        return memoryview(self._found.map())[: self._found.length()]

    def __enter__(self) -> memoryview:
        if isinstance(self._found, bytes) or not self._write:
            return self.hold()
        self._lease = Lease(self._found)
        self._lease.acquire(self._timeout_s)
        self._map = self._found.map(write=True)
        self._memory = memoryview(self._map)
        return self._memory

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._memory is None or self._map is None or self._lease is None:
            return
        known = weakref.ref(self._map)
        try:
            self._memory.release()
            self._map = None
            if known() is not None:  # a slice is not among what `release` looks at
                raise BufferError("something still refers to what could be written, and could do so later")
        finally:
            self._lease.release()


def descriptor_of(segment: Segment, *, write: bool) -> int:
    """A descriptor of the file that the caller closes. Raises Busy; see `Segment.settle`."""
    segment.settle()
    return descriptors.give_away(segment.open(write=write))


def load_arrays() -> Any:
    """The module for arrays, which only those import who use one. Raises NotLoaded without NumPy."""
    try:
        import numpy  # noqa: F401 - what `arrays` needs
    except ImportError as error:
        raise NotLoaded(f"arrays need NumPy: {error}", hint="pip install 'virgo-os[arrays]'") from error
    return importlib.import_module("virgo.memory.arrays")


def not_near(identifier: int, what: str) -> BadArgument:
    """The error for what can only be done with a shared region of this machine."""
    return BadArgument(
        f"{what} needs region {identifier:#x} to be a shared one of this machine",
        hint="malloc(size, shared=True, node=...) makes one; read and write serve every region.",
    )


def _after_fork_in_child() -> None:
    for lease in list(_leases):
        lease.renew()


os.register_at_fork(after_in_child=_after_fork_in_child)
