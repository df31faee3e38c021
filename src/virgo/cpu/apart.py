"""Large buffers travel apart from what is pickled: in shared memory that is handed over with its descriptor.

An array of 100 MB is copied once, when it is sent. Who receives it maps the same pages (see `segments`). A
result that is the argument itself, or most of it, and was not written to is not even copied: the segment in
which it came goes back with the place in it. The worker may have it mapped then as well, so it is lent, until
the worker gives it back.

In bytes, `APART` or `LENT` begins what has its buffers in a segment, and `ALONG` what carries them itself,
for other machines; both go on with a MessagePack array: the pickle, then the buffers, or their places and
sizes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, Final

import msgspec

from virgo.cpu.segments import Mapping, Segment, filled, read
from virgo.limits import APART_BYTES_MIN, APART_SEGMENTS_MAX

APART: Final = b"B"
LENT: Final = b"L"
ALONG: Final = b"O"
GIFT: Final = b"G"  # instead of an outcome: a segment comes back

_ALIGNMENT: Final = 64
_Places = tuple[bytes, list[int], list[int]]
_pack = msgspec.msgpack.Encoder().encode
_unpack_along = msgspec.msgpack.Decoder(tuple[bytes, list[memoryview]]).decode
_unpack_places = msgspec.msgpack.Decoder(_Places).decode


class Apart:
    """Something pickled that is to be sent, with its buffers in a segment.

    Attributes:
        data: what is sent, beginning with APART.
        segment: what goes with it.
        lent: whether it came as the segment of an argument, which may still be used.
    """

    __slots__ = ("data", "lent", "segment")

    def __init__(self, data: bytes, segment: Segment, *, lent: bool = False) -> None:
        self.data = data
        self.segment = segment
        self.lent = lent

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"<Apart {len(self.data)} bytes, {self.segment!r}>"

    def lend(self) -> None:
        """Say to who gets it that the segment is not his to fill."""
        self.data = LENT + self.data[1:]

    def along(self) -> bytes:
        """The same with its buffers, for where no descriptor can go."""
        data, places, sizes = _unpack_places(self.data[1:])
        parts = [read(self.segment, place, size) for place, size in zip(places, sizes, strict=True)]
        return ALONG + _pack([data, parts])


class Received:
    """Something pickled that has come, with its buffers mapped.

    Args:
        data: what came, beginning with APART or LENT. Raises msgspec.DecodeError, ValueError if it does not
            go on as these do.
        descriptor: of the segment; it is ours now. Raises OSError if it cannot be mapped.
        kept: whether the mapping keeps it.

    Attributes:
        mapping: the segment, mapped.
    """

    __slots__ = ("_pickled", "_places", "_sizes", "mapping")

    def __init__(self, data: bytes, descriptor: int, *, kept: bool = False) -> None:
        segment = Segment(descriptor)
        self._pickled, self._places, self._sizes = _unpack_places(data[1:])
        if min(self._places + self._sizes) < 0:
            raise ValueError("a buffer lies before its segment")
        size = max(place + size for place, size in zip(self._places, self._sizes, strict=True))
        self.mapping = Mapping(segment, size, ours=data[:1] == APART, kept=kept)

    def __len__(self) -> int:
        return len(self._pickled)

    def __repr__(self) -> str:
        return f"<Received {self.mapping!r}>"

    def load(self) -> Any:
        """The object. Raises what unpickling raises."""
        memory = self.mapping.memory
        parts = [memory[at : at + size] for at, size in zip(self._places, self._sizes, strict=True)]
        return pickle.loads(self._pickled, buffers=parts)  # noqa: S301 - as for any pickle of a call


def dumps(
    value: Any, dump: Callable[..., bytes], *, segments: bool, came: Mapping | None = None
) -> bytes | Apart:
    """Pickle something, large buffers apart.

    Args:
        value: the object.
        dump: `pickle.dumps`, or cloudpickle's.
        segments: whether descriptors can go along; if not, buffers are still not copied into the pickle.
        came: what the argument lies in, if this is for who sent that: what lies there need not be copied.

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
    sizes = [buffer.nbytes for buffer in buffers]
    # For less of it the whole segment is not kept.
    if came is not None and came.segment is not None and 2 * sum(sizes) >= came.memory.nbytes:
        found = came.places(buffers)
        if found is not None:
            return Apart(APART + _pack([data, found, sizes]), came.segment, lent=True)
    if not segments or Segment.alive >= APART_SEGMENTS_MAX:
        return ALONG + _pack([data, buffers])
    places, size = _lay_out(sizes)
    return Apart(APART + _pack([data, places, sizes]), filled(buffers, places, size))


def load_along(data: bytes) -> Any:
    """The object in bytes that begin with ALONG. Raises what unpickling raises."""
    pickled, buffers = _unpack_along(memoryview(data)[1:])
    return pickle.loads(pickled, buffers=[bytearray(buffer) for buffer in buffers])  # noqa: S301


def _lay_out(sizes: list[int]) -> tuple[list[int], int]:
    """Where each buffer begins, and where the last one ends."""
    places, end = [], 0
    for size in sizes:
        place = -(-end // _ALIGNMENT) * _ALIGNMENT
        places.append(place)
        end = place + size
    return places, end
