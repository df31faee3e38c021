"""Requests on regions and the meaning of their answers, for both clients; `calls` has those on keys."""

from __future__ import annotations

import msgspec

from virgo.errors import BadArgument
from virgo.memory.calls import Data, as_is, encode_data
from virgo.memory.keeping import PLAIN, Keep
from virgo.memory.segments import Segment
from virgo.wire.call import Call, as_nothing, whole

HERE = "."  # as the name of a node: the connected one


class RegionInfo(msgspec.Struct, frozen=True):
    """A region as its home describes it.

    Attributes:
        size: declared bytes.
        length: bytes of the value.
        node: name of its home.
        nodes: numbers of the nodes that have its chunks; empty if it is not spread.
        shared: whether it is a file in shared memory.
    """

    id: int
    size: int
    length: int
    node: str
    nodes: list[int] = []
    shared: bool = False


class SegmentInfo(msgspec.Struct, frozen=True):
    """How processes of its home's machine map a shared region.

    Attributes:
        size: declared bytes.
        node: name of its home.
        directory, identity: where its file is, and of which store it is.
        note: what was noted of it when it was made.
    """

    id: int
    size: int
    node: str
    directory: str
    identity: str
    note: str = ""

    def segment(self) -> Segment:
        """The segment, if it is on this machine."""
        return Segment(self.directory, self.identity, self.id, self.size)


def malloc_kept(size: int, node: str | None, keep: Keep, *, shared: bool = False) -> Call[int]:
    """Allocate what is kept in some way; answers the id."""
    if keep == PLAIN:
        return malloc(size, node, shared=shared)
    if node or shared:
        raise BadArgument("copies and durable go with neither node nor shared", hint="Leave one of them out.")
    copies = ("COPIES", 2) if keep.copies == 2 else ()
    durable = ("DURABLE",) if keep.durable else ()
    return Call(("VIRGO_MALLOC", whole(size, "the size"), *copies, *durable), int)


def malloc(size: int, node: str | None, *, shared: bool = False, note: str = "") -> Call[int]:
    """Allocate; answers the id."""
    where = ("NODE", node) if node else ()
    kind = ("SHARED", *(("NOTE", note) if note else ())) if shared else ()
    return Call(("VIRGO_MALLOC", whole(size, "the size"), *where, *kind), int)


def segment(identifier: int) -> Call[SegmentInfo | None]:
    """How to map a shared region; None if it is not shared."""
    return Call(
        ("MEMORY.SEGMENT", whole(identifier, "the id")),
        lambda reply: None if reply is None else msgspec.json.decode(reply, type=SegmentInfo),
    )


def set_region(identifier: int, data: Data, offset: int | None = None) -> Call[None]:
    """Replace a region's value, or write over a part of it."""
    at = () if offset is None else ("AT", whole(offset, "the offset"))
    return Call(("VIRGO_SET", whole(identifier, "the id"), encode_data(data), *at), as_nothing)


def get_region(identifier: int, offset: int | None = None, size: int | None = None) -> Call[bytes]:
    """A region's value, or a part of it."""
    at = () if offset is None else ("AT", whole(offset, "the offset"))
    count = () if size is None else (whole(size, "the size"),)
    return Call(("VIRGO_GET", whole(identifier, "the id"), *at, *count), as_is)


def free_region(identifier: int) -> Call[None]:
    """Free a region."""
    return Call(("VIRGO_FREE", whole(identifier, "the id")), as_nothing)


def describe(identifier: int) -> Call[RegionInfo]:
    """What its home knows of a region."""
    return Call(
        ("MEMORY.REGION", whole(identifier, "the id")),
        lambda reply: msgspec.json.decode(reply, type=RegionInfo),
    )
