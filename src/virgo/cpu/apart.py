"""Large buffers travel apart from what is pickled: in shared memory that is handed over with its descriptor.

An array of 100 MB is copied once, when it is sent. Who receives it maps the same pages, privately: it may
write to it as to any object of its own, and only pages that it writes to are copied then. The memory has no
name, so it is gone with its last user, however that ends.

A segment belongs to who got it last. When nothing of it is used there any more it is spare: it is filled
again with what is sent next, or given back to who sent it, as a worker does after a call; for new pages take
longer to make than to fill.

In bytes, `APART` begins what has its buffers in a segment, and `ALONG` what carries them itself, for other
machines; both go on with a MessagePack array: the pickle, then the sizes of the buffers or the buffers.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pickle
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from virgo.limits import APART_BYTES_MIN, APART_SEGMENTS_MAX, APART_SPARE_BYTES_MAX, APART_SPARE_MAX

APART: Final = b"B"
ALONG: Final = b"O"
GIFT: Final = b"G"  # instead of an outcome: a segment comes back

_ALIGNMENT: Final = 64
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder().decode
_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap = _libc.mmap, _libc.munmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_size_t,
)  # fmt: skip
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED: Final = ctypes.c_void_p(-1).value
_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
_forks = 0  # of this process so far
_spare: deque[tuple[int, Segment]] = deque()  # with their sizes, the oldest first


class Segment:
    """Shared memory without a name.

    Args:
        descriptor: of it; closed when this object is gone.
    """

    __slots__ = ("descriptor",)
    alive = 0  # of this process

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        Segment.alive += 1

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.descriptor)  # also at the end of the program, when the module has no `os` any more
        type(self).alive -= 1

    def __repr__(self) -> str:
        return f"<Segment {self.descriptor}>"


class Apart:
    """Something pickled that is to be sent, with its buffers in a segment.

    Attributes:
        data: what is sent, beginning with APART.
        segment: what goes with it.
    """

    __slots__ = ("data", "segment")

    def __init__(self, data: bytes, segment: Segment) -> None:
        self.data = data
        self.segment = segment

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"<Apart {len(self.data)} bytes, {self.segment!r}>"

    def along(self) -> bytes:
        """The same with its buffers, for where no descriptor can go."""
        data, sizes = _unpack(self.data[1:])
        places, _ = _places(sizes)
        return ALONG + _pack(
            [data, [_read(self.segment.descriptor, at, size) for at, size in zip(places, sizes, strict=True)]]
        )


class Received:
    """Something pickled that has come, with its buffers mapped.

    Args:
        data: what came, beginning with APART. Raises msgspec.DecodeError if it does not go on as that does.
        descriptor: of the segment; it is ours now. Raises OSError if it cannot be mapped.
    """

    __slots__ = ("_memory", "_pickled", "_sizes")

    def __init__(self, data: bytes, descriptor: int) -> None:
        segment = Segment(descriptor)
        self._pickled, self._sizes = _unpack(data[1:])
        size = _places(self._sizes)[1]
        if os.fstat(descriptor).st_size < size:
            raise OSError("the segment is shorter than its buffers")
        self._memory = _map(segment, size)

    def __len__(self) -> int:
        return len(self._pickled)

    def __repr__(self) -> str:
        return f"<Received {self._memory.nbytes} bytes>"

    def load(self) -> Any:
        """The object. Raises what unpickling raises."""
        places, _ = _places(self._sizes)
        parts = [self._memory[at : at + size] for at, size in zip(places, self._sizes, strict=True)]
        return pickle.loads(self._pickled, buffers=parts)  # noqa: S301 - as for any pickle of a call


def _map(segment: Segment, size: int) -> memoryview:
    """The bytes, for this process alone; when they are not used any more the segment is spare."""
    address = _mmap(None, size, _READ_WRITE, mmap.MAP_PRIVATE, segment.descriptor, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    memory = (ctypes.c_ubyte * size).from_address(address)
    # Each segment that is held takes a descriptor, so few are; Python's own `mmap` would hold all.
    held = segment if Segment.alive <= 2 * APART_SPARE_MAX else None
    weakref.finalize(memory, _unmap, address, size, held, _forks).atexit = False
    return memoryview(memory).cast("B")


def _unmap(address: int, size: int, segment: Segment | None, forks: int) -> None:
    _munmap(address, size)
    if segment is not None and forks == _forks:  # else another process has it mapped too
        spare(segment)


def _forked() -> None:
    """What was mapped before a fork is never spare again: parent and child have it both."""
    global _forks  # noqa: PLW0603 - it is a property of the process
    _forks += 1


def _become_child() -> None:
    _forked()
    _spare.clear()  # it is the parent's


os.register_at_fork(after_in_parent=_forked, after_in_child=_become_child)


def spare(segment: Segment) -> None:
    """Nothing of a segment is used any more, here or elsewhere: keep it for what is sent next."""
    _spare.append((os.fstat(segment.descriptor).st_size, segment))
    # Any thread may do this at any moment, so what is looked at is a copy.
    while len(_spare) > APART_SPARE_MAX or sum(size for size, _ in list(_spare)) > APART_SPARE_BYTES_MAX:
        with contextlib.suppress(IndexError):
            _spare.popleft()


def take_spare() -> list[Segment]:
    """All that is spare, to be given back to who had sent it, or to be let go."""
    taken = []
    with contextlib.suppress(IndexError):
        while True:
            taken.append(_spare.popleft()[1])
    return taken


def _new_segment(size: int) -> Segment:
    """A segment of at least this size, a spare one if one is not much too large."""
    for one in list(_spare):
        if size <= one[0] <= 2 * size:
            try:
                _spare.remove(one)
            except ValueError:  # another thread was faster
                continue
            return one[1]
    return Segment(os.memfd_create("virgo-call", os.MFD_CLOEXEC))


def dumps(value: Any, dump: Callable[..., bytes], *, segments: bool) -> bytes | Apart:
    """Pickle something, large buffers apart.

    Args:
        value: the object.
        dump: `pickle.dumps`, or cloudpickle's.
        segments: whether descriptors can go along; if not, buffers are still not copied into the pickle.

    Raises what pickling raises.
    """
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        """Whether it is to be part of the pickle."""
        try:
            raw = buffer.raw()
        except BufferError:  # not of one piece
            return True
        if raw.nbytes < APART_BYTES_MIN:
            return True
        buffers.append(raw)
        return False

    data = dump(value, protocol=5, buffer_callback=keep)
    if not buffers:
        return data
    if not segments or Segment.alive >= APART_SEGMENTS_MAX:
        return ALONG + _pack([data, buffers])
    sizes = [buffer.nbytes for buffer in buffers]
    return Apart(APART + _pack([data, sizes]), _write(buffers, sizes))


def load_along(data: bytes) -> Any:
    """The object in bytes that begin with ALONG. Raises what unpickling raises."""
    pickled, buffers = _unpack(memoryview(data)[1:])
    return pickle.loads(pickled, buffers=[bytearray(buffer) for buffer in buffers])  # noqa: S301


def _write(buffers: Sequence[memoryview], sizes: Sequence[int]) -> Segment:
    places, total = _places(sizes)
    segment = _new_segment(total)
    for buffer, place in zip(buffers, places, strict=True):
        written = 0
        while written < buffer.nbytes:
            written += os.pwrite(segment.descriptor, buffer[written:], place + written)
    return segment


def _read(descriptor: int, place: int, size: int) -> bytes:
    parts = []
    while size > 0:
        part = os.pread(descriptor, size, place)
        if not part:
            raise OSError("the segment is shorter than it was made")
        parts.append(part)
        place, size = place + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each buffer begins, and where the last one ends."""
    places, end = [], 0
    for size in sizes:
        place = -(-end // _ALIGNMENT) * _ALIGNMENT
        places.append(place)
        end = place + size
    return places, end
