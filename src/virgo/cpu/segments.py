"""Shared memory without a name, in which large buffers travel: mapped, filled, given on, filled again.

Who receives a segment maps it privately: it may write to the memory as to any of its own, and only pages that
it writes to are copied then. Having no name, the memory is gone with its last user, however that ends.

A segment belongs to who got it last. When nothing of it is used there any more it is spare: it is filled
again with what is sent next, or given back to who sent it, as a worker does after a call; for new pages take
longer to make than to fill. What is mapped here is never filled, whoever gives it back; and none can
shrink, or whoever has it mapped would be killed when he reads it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import threading
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from virgo.limits import APART_SPARE_BYTES_MAX, APART_SPARE_MAX

_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap = _libc.mmap, _libc.munmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED: Final = ctypes.c_void_p(-1).value
_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
_PAGEMAP: Final = Path("/proc/self/pagemap")
# The first byte, of 8, of a page that is not there, or is there and still the file's: bits 63 and 61 of
# the kernel's description, and 56, that nobody else has it mapped.
_UNWRITTEN: Final = bytes([0x00, 0xA0, 0xA1])
_View: Final = ctypes.c_ssize_t * 16  # room for a Py_buffer, which begins with the address

_forks = 0  # of this process so far
_spare: deque[tuple[int, Segment]] = deque()  # with their sizes, the oldest first
_mapped: Counter[int] = Counter()  # mappings of this process, by the segment's number in the kernel
_parked: dict[int, Segment] = {}  # those that were given back while they are mapped here
_windows: OrderedDict[int, tuple[int, int]] = OrderedDict()  # address and size of what is filled again
_counting = threading.RLock()  # a mapping may end within any statement


class Segment:
    """Shared memory without a name.

    Args:
        descriptor: of it; closed when this object is gone.

    Attributes:
        lent: the lease whose client has it mapped too, 0 if none.
    """

    __slots__ = ("descriptor", "lent")
    alive = 0  # of this process

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.lent = 0
        Segment.alive += 1

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.descriptor)  # also at the end of the program, when the module has no `os` any more
        type(self).alive -= 1

    def __repr__(self) -> str:
        return f"<Segment {self.descriptor}>"

    @property
    def number(self) -> int:
        """By which the kernel knows it, as long as anybody uses it."""
        return os.fstat(self.descriptor).st_ino

    @property
    def size(self) -> int:
        """In bytes."""
        return os.fstat(self.descriptor).st_size


class Mapping:
    """A segment as memory of this process alone.

    Args:
        segment: it.
        size: how much of it, from `start` on. Raises OSError if it is shorter, or could become so, or cannot
            be mapped.
        ours: whether it is spare when the memory is not used any more.
        kept: whether this object keeps it, and so a descriptor.

    Attributes:
        segment: it, None if it is not kept.
        memory: the bytes; whatever uses them keeps them, not this object.
    """

    __slots__ = ("_address", "memory", "segment")

    def __init__(self, segment: Segment, size: int, *, start: int = 0, ours: bool, kept: bool) -> None:
        seals = fcntl.fcntl(segment.descriptor, fcntl.F_GET_SEALS)
        if segment.size < start + size or not seals & fcntl.F_SEAL_SHRINK:
            raise OSError("the segment is shorter than its buffers, or can be made so")
        self.segment = segment if kept else None
        self._address = _map(segment, size, mmap.MAP_PRIVATE, start)
        bytes_there = (ctypes.c_ubyte * size).from_address(self._address)
        number = segment.number
        with _counting:
            _mapped[number] += 1
        # Each segment that is held takes a descriptor, so few are; Python's own `mmap` would hold all.
        held = segment if ours and Segment.alive <= 2 * APART_SPARE_MAX else None
        end = weakref.finalize(bytes_there, _unmap, self._address, size, number, held, _forks)
        end.atexit = False
        self.memory = memoryview(bytes_there).cast("B")

    def __repr__(self) -> str:
        return f"<Mapping of {self.memory.nbytes} bytes>"

    def places(self, buffers: Iterable[memoryview]) -> list[int] | None:
        """Where in the segment these buffers lie, all of them; None if one does not, or was written to."""
        found = []
        for buffer in buffers:
            place = address_of(buffer) - self._address
            if not 0 <= place <= self.memory.nbytes - buffer.nbytes:
                return None
            found.append(place)
        return found if self._unwritten() else None

    def _unwritten(self) -> bool:
        """Whether all pages are still the segment's, and none a copy that was written to."""
        page = mmap.PAGESIZE
        pages = -(-self.memory.nbytes // page)
        try:
            with _PAGEMAP.open("rb", buffering=0) as file:
                said = os.pread(file.fileno(), pages * 8, self._address // page * 8)
        except OSError:  # no /proc, or its limits: then it is copied
            return False
        return len(said) == pages * 8 and not said[7::8].translate(None, _UNWRITTEN)


def address_of(buffer: memoryview) -> int:
    """Where in memory a buffer begins."""
    view = _View()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), view, 0)
    address = view[0]
    ctypes.pythonapi.PyBuffer_Release(view)
    return address


def _map(segment: Segment, size: int, flags: int, start: int = 0) -> int:
    address = _mmap(None, size, _READ_WRITE, flags, segment.descriptor, start)
    if address == _FAILED or address is None:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(address)


def _unmap(address: int, size: int, number: int, segment: Segment | None, forks: int) -> None:
    _munmap(address, size)
    with _counting:
        _mapped[number] -= 1
        if _mapped[number] > 0:
            return
        del _mapped[number]
        segment = _parked.pop(number, segment)
    if segment is not None and forks == _forks:  # else another process has it mapped too
        spare(segment)


def forks() -> int:
    """How often this process has forked, or come from a fork: what it had mapped before is not its alone."""
    return _forks


def _forked() -> None:
    """What was mapped before a fork is never spare again: parent and child have it both."""
    global _forks  # noqa: PLW0603 - it is a property of the process
    _forks += 1


def _become_child() -> None:
    global _counting  # noqa: PLW0603 - another thread of the parent may have had it
    _counting = threading.RLock()
    _forked()
    _spare.clear()  # it is the parent's
    _parked.clear()
    _close_windows(0)


os.register_at_fork(after_in_parent=_forked, after_in_child=_become_child)


def spare(segment: Segment) -> None:
    """A segment is used nowhere else any more: keep it for what is sent next, once it is not mapped here."""
    number = segment.number
    with _counting:
        if number in _mapped:
            _parked[number] = segment
            # Within that statement it may have been unmapped, and then nobody takes it from there.
            if number in _mapped or _parked.pop(number, None) is None:
                return
    _spare.append((segment.size, segment))
    # Any thread may do this at any moment, so what is looked at is a copy.
    while len(_spare) > APART_SPARE_MAX or sum(size for size, _ in list(_spare)) > APART_SPARE_BYTES_MAX:
        with contextlib.suppress(IndexError):
            _spare.popleft()


def take_spare() -> list[Segment]:
    """All that is spare, to be given back to who had sent it."""
    taken = []
    with contextlib.suppress(IndexError):
        while True:
            taken.append(_spare.popleft()[1])
    return taken


def drop_spare() -> None:
    """Let all go that was kept for what is sent next, which is not worth its memory any more."""
    take_spare()
    _close_windows(0)


def filled(buffers: Iterable[memoryview], places: Iterable[int], size: int) -> Segment:
    """A segment with these buffers at these places, a spare one if one is not much too large."""
    for one in list(_spare):
        if size <= one[0] <= 2 * size:
            try:
                _spare.remove(one)
            except ValueError:  # another thread was faster
                continue
            with _window(one[1], one[0]) as address:
                for buffer, place in zip(buffers, places, strict=True):
                    ctypes.memmove(address + place, address_of(buffer), buffer.nbytes)
            return one[1]
    segment = made("virgo-call")
    for buffer, place in zip(buffers, places, strict=True):
        write(segment, buffer, place)
    return segment


def made(name: str) -> Segment:
    """A new one, empty; the name is for who looks at the process."""
    segment = Segment(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    fcntl.fcntl(segment.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return segment


@contextlib.contextmanager
def _window(segment: Segment, size: int) -> Iterator[int]:
    """The address of a segment that is filled again: to do it there takes half the time of writing to it."""
    number = segment.number
    window = _windows.pop(number, None)  # meanwhile nobody closes it
    if window is None:
        window = _map(segment, size, mmap.MAP_SHARED | mmap.MAP_POPULATE), size
    try:
        yield window[0]
    finally:
        _windows[number] = window
        _close_windows(APART_SPARE_MAX)


def _close_windows(left: int) -> None:
    """Unmap all windows but the last ones."""
    with contextlib.suppress(KeyError):  # another thread closed the last one
        while len(_windows) > left:
            _munmap(*_windows.popitem(last=False)[1])


def write(segment: Segment, buffer: memoryview, place: int) -> None:
    """Write to a segment, which becomes as long as that needs. Raises OSError if there is no room."""
    written = 0
    while written < buffer.nbytes:
        written += os.pwrite(segment.descriptor, buffer[written:], place + written)


def read(segment: Segment, place: int, size: int) -> bytes:
    """Some of what is in a segment. Raises OSError if it is shorter."""
    parts = []
    while size > 0:
        part = os.pread(segment.descriptor, size, place)
        if not part:
            raise OSError("the segment is shorter than it was made")
        parts.append(part)
        place, size = place + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
