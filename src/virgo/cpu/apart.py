"""Large buffers travel apart from what is pickled: in shared memory that is handed over with its descriptor.

An array of 100 MB is copied once, when it is sent. Who receives it maps the same pages (see `segments`). A
result that is the argument itself, or most of it, and was not written to is not even copied: the segment in
which it came goes back with the place in it. The worker may have it mapped then as well, so it is lent, until
the worker gives it back.

Where no descriptor can go, through a node, workers of the same machine and user open the very segment by the
process that holds it, until the call has its outcome; and lay the result where that process keeps a place for
it (see `landing`).

In bytes, `APART` or `LENT` begins what has its buffers in a segment that goes with it, `AT_HAND` what has
them in one of another process, `LANDED` what has them in its place with who gets it, and `ALONG` what carries
them itself, for other machines. All go on with a MessagePack array: the pickle, then the buffers, or their
places and sizes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, SupportsIndex

import msgspec

from virgo.cpu import landing
from virgo.cpu.landing import Address, Place
from virgo.cpu.segments import Mapping, Segment, filled, read
from virgo.limits import APART_BYTES_MIN, APART_SEGMENTS_MAX
from virgo.wire.peer import credentials

APART: Final = b"B"
LENT: Final = b"L"
AT_HAND: Final = b"H"
LANDED: Final = b"D"
ALONG: Final = b"O"
GIFT: Final = b"G"  # instead of an outcome: a segment comes back

_ALIGNMENT: Final = 64
_pack = msgspec.msgpack.Encoder().encode
_unpack_along = msgspec.msgpack.Decoder(tuple[bytes, list[memoryview]]).decode


class Buffers(NamedTuple):
    """A pickle, and where its buffers lie in some memory."""

    pickled: bytes
    places: list[int]
    sizes: list[int]

    @property
    def size(self) -> int:
        """How much of the memory they take. Raises ValueError if there are no such places."""
        if len(self.places) != len(self.sizes) or min(self.places + self.sizes, default=-1) < 0:
            raise ValueError("a buffer lies nowhere")
        return max(place + size for place, size in zip(self.places, self.sizes, strict=True))


_unpack_buffers = msgspec.msgpack.Decoder(Buffers).decode
_unpack_landed = msgspec.msgpack.Decoder(tuple[bytes, list[int], list[int], int]).decode
_unpack_at_hand = msgspec.msgpack.Decoder(tuple[bytes, list[int], list[int], int, int, int, int]).decode


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

    def at_hand(self) -> bytes:
        """The same, for processes of this machine that may open this one's descriptors."""
        return at_hand(_unpack_buffers(self.data[1:]), landing.address_of(self.segment))

    def along(self) -> bytes:
        """The same with its buffers, for other machines."""
        pickled, places, sizes = _unpack_buffers(self.data[1:])
        parts = [read(self.segment, place, size) for place, size in zip(places, sizes, strict=True)]
        return ALONG + _pack([pickled, parts])


class Received:
    """Something pickled that has come, with its buffers mapped.

    Args:
        buffers: it and they. Raises ValueError if they lie nowhere.
        mapped: maps as much as they take. Raises OSError if that cannot be mapped.

    Attributes:
        mapping: where they lie, mapped.
    """

    __slots__ = ("_buffers", "mapping")

    def __init__(self, buffers: Buffers, mapped: Callable[[int], Mapping]) -> None:
        self._buffers = buffers
        self.mapping = mapped(buffers.size)

    @classmethod
    def apart(cls, data: bytes, descriptor: int, *, kept: bool = False) -> Received:
        """What came with a segment.

        Args:
            data: what came, beginning with APART or LENT. Raises msgspec.DecodeError, ValueError if it does
                not go on as these do.
            descriptor: of the segment; it is ours now. Raises OSError if it cannot be mapped.
            kept: whether the mapping keeps it.
        """
        segment, ours = Segment(descriptor), data[:1] == APART
        return cls(_unpack_buffers(data[1:]), lambda size: Mapping(segment, size, ours=ours, kept=kept))

    @classmethod
    def landed(cls, data: bytes, place: Place) -> Received:
        """What lies in its place. Raises msgspec.DecodeError, ValueError, OSError if it does not."""
        buffers, start = unpack_landed(data)
        return cls(buffers, lambda size: place.mapping(start, size))

    def __len__(self) -> int:
        return len(self._buffers.pickled)

    def __repr__(self) -> str:
        return f"<Received {self.mapping!r}>"

    def load(self) -> Any:
        """The object. Raises what unpickling raises."""
        memory = self.mapping.memory
        pickled, places, sizes = self._buffers
        parts = [memory[at : at + size] for at, size in zip(places, sizes, strict=True)]
        return pickle.loads(pickled, buffers=parts)  # noqa: S301 - as for any pickle of a call


class Large:
    """Bytes that are to lie apart, as they do not by themselves; they arrive as they were.

    Args:
        data: bytes, or a bytearray.
    """

    __slots__ = ("_data",)

    def __init__(self, data: bytes | bytearray) -> None:
        self._data = data

    def __repr__(self) -> str:
        return f"<Large {type(self._data).__name__} of {len(self._data)}>"

    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[Any, ...]:
        return type(self._data), (pickle.PickleBuffer(self._data),)


def is_large(value: Any) -> bool:
    """Whether that is for Large."""
    return (type(value) is bytes or type(value) is bytearray) and len(value) >= APART_BYTES_MIN


def dumps(
    value: Any,
    dump: Callable[..., bytes],
    *,
    segments: bool,
    came: Mapping | None = None,
    land: Address | None = None,
) -> bytes | Apart:
    """Pickle something, large buffers apart.

    Args:
        value: the object.
        dump: `pickle.dumps`, or cloudpickle's.
        segments: whether descriptors can go along; if not, buffers are still not copied into the pickle.
        came: what the argument lies in, if this is for who sent that: what lies there need not be copied.
        land: a place with who gets it.

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
    places, size = _lay_out(sizes)
    if land is not None:
        with contextlib.suppress(OSError):  # then they go along
            landing.lay(land, buffers, places)
            return landed(Buffers(data, places, sizes), land)
    if not segments or Segment.alive >= APART_SEGMENTS_MAX:
        return ALONG + _pack([data, buffers])
    return Apart(APART + _pack([data, places, sizes]), filled(buffers, places, size))


class Hand:
    """Takes arguments to a node.

    Args:
        path: of its Unix socket, "" if it has another address.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._at_hand: bool | None = None if path else False

    def __repr__(self) -> str:
        return f"<Hand to {self._path or 'elsewhere'}>"

    @property
    def _is_at_hand(self) -> bool:
        if self._at_hand is None:
            self._at_hand = _may_open_ours(self._path)
        return bool(self._at_hand)

    def carry(self, arguments: bytes | Apart) -> bytes:
        """As bytes; an Apart is to be kept until its call has its outcome."""
        if not isinstance(arguments, Apart):
            return arguments
        return arguments.at_hand() if self._is_at_hand else arguments.along()

    def place(self) -> Place | None:
        """Where the result may land, if workers there may write to our memory."""
        return landing.place() if self._is_at_hand else None


def _may_open_ours(path: str) -> bool | None:
    """Whether who listens there sees our descriptors below /proc: has our user and our view of processes.

    None if nobody does, which whoever sends the call is told.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            pid, user, _ = credentials(connection.fileno())
    except OSError:
        return None
    try:
        theirs, ours = (Path(f"/proc/{one}/ns/pid").stat() for one in (pid, "self"))
    except OSError:
        return False
    return user == os.geteuid() and theirs.st_ino == ours.st_ino


def at_hand(buffers: Buffers, address: Address) -> bytes:
    """Bytes that say of what another process can open."""
    return AT_HAND + _pack([*buffers, *address])


def unpack_at_hand(data: bytes) -> tuple[Buffers, Address]:
    """What `at_hand` says. Raises msgspec.DecodeError."""
    pickled, places, sizes, *address = _unpack_at_hand(memoryview(data)[1:])
    return Buffers(pickled, places, sizes), (address[0], address[1], address[2], address[3])


def load_at_hand(data: bytes) -> Any:
    """The object in bytes that begin with AT_HAND. Raises OSError, or what unpickling raises."""
    buffers, address = unpack_at_hand(data)
    segment = landing.reached(address)
    return Received(
        buffers, lambda size: Mapping(segment, size, start=address[-1], ours=False, kept=False)
    ).load()


def landed(buffers: Buffers, address: Address) -> bytes:
    """Bytes that say of what lies in the place of that address."""
    return LANDED + _pack([*buffers, address[-1]])


def unpack_landed(data: bytes) -> tuple[Buffers, int]:
    """What `landed` says, and where the place begins. Raises msgspec.DecodeError."""
    pickled, places, sizes, start = _unpack_landed(memoryview(data)[1:])
    return Buffers(pickled, places, sizes), start


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
