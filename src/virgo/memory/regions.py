"""VIRGO_MALLOC, VIRGO_SET, VIRGO_GET, VIRGO_FREE on any node, for regions of any node.

The top bits of an id name the region's home; another node passes the command on to it. A plain region of
this node is handled at once, in the batch of the chunk; `spread` has those larger than a chunk.

A region that was never set reads as b"". A set replaces the whole value; with AT it writes over a part, and
a get with AT reads one: both of one moment, like the whole. Ids are never given twice, so a use after free
and a double free are always UnknownId.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from virgo.errors import BadArgument, NodeLost, NoNode, PoolFull, UnknownId
from virgo.limits import MEMORY_CHUNK_BYTES, MEMORY_PLACE_ATTEMPTS_MAX
from virgo.members import Member, compose_id, node_of
from virgo.memory import core, kept
from virgo.memory.core import Region
from virgo.memory.keeping import PLAIN, Keep, checked
from virgo.memory.kept import KeptRegions
from virgo.memory.owner import OwnerBatch
from virgo.memory.segments import total_bytes
from virgo.memory.shared import Shared
from virgo.memory.spread import Spread
from virgo.memory.store import Store
from virgo.module import NodeServices
from virgo.wire.args import integer, text
from virgo.wire.commands import Command
from virgo.wire.resp import OK, Encoded
from virgo.wire.session import Session

USAGE = "size [NODE name] [SHARED [NOTE text]] [COPIES 2] [DURABLE]"
_AT_NAMES = ("the offset", "the size")


def unknown(identifier: int) -> UnknownId:
    """The error for an id that leads nowhere."""
    return UnknownId(f"no region has the id {identifier} ({identifier:#x})")


@dataclass(frozen=True, slots=True)
class Wish:
    """What VIRGO_MALLOC is asked for.

    Attributes:
        size: bytes.
        node: name of the node on which it is to be, "" for any.
        shared: whether it is to be a file in shared memory.
        note: what is to be known of it.
        keep: how it is to be kept.
    """

    size: int
    node: str = ""
    shared: bool = False
    note: bytes = b""
    keep: Keep = PLAIN

    @classmethod
    def read(cls, request: list[bytes]) -> Wish:
        """That of a request. Raises BadArgument, TooLarge."""
        usage = f"Usage: VIRGO_MALLOC {USAGE}"
        size, node, shared, note = integer(request[1], "size"), "", False, b""
        copies, durable = 1, False
        words = iter(request[2:])
        for word in words:
            option = word.upper()
            value = next(words, None) if option in (b"NODE", b"NOTE", b"COPIES") else b""
            if value is None:
                raise BadArgument(f"{option.decode()} needs a value", hint=usage)
            if option == b"NODE":
                node = text(value, "the node's name")
            elif option == b"NOTE":
                note = value
            elif option == b"SHARED":
                shared = True
            elif option == b"COPIES":
                copies = integer(value, "COPIES")
            elif option == b"DURABLE":
                durable = True
            else:
                raise BadArgument(f"VIRGO_MALLOC does not know {word[:20]!r}", hint=usage)
        if note and not shared:
            raise BadArgument("only shared regions have a NOTE", hint=usage)
        keep = checked(copies, durable)
        if keep != PLAIN and (shared or node):
            raise BadArgument("COPIES and DURABLE go with neither NODE nor SHARED", hint=usage)
        core.check_size(size, shared=shared)
        return cls(size, node, shared, note, keep)

    def request(self, node: str) -> tuple[bytes | str | int, ...]:
        """The same of one node."""
        shared = (b"SHARED", *((b"NOTE", self.note) if self.note else ())) if self.shared else ()
        return b"VIRGO_MALLOC", self.size, b"NODE", node, *shared

    def room_bytes(self) -> int:
        """What it takes."""
        return total_bytes(self.size) if self.shared else self.size


class Regions:
    """The four calls of one node."""

    def __init__(
        self, node: NodeServices, store: Store, spread: Spread, shared: Shared, kept: KeptRegions
    ) -> None:
        self._node = node
        self._number = node.number
        self._store = store
        self._spread = spread
        self._shared = shared
        self._kept = kept
        self._batch = store.batch

    def __repr__(self) -> str:
        return f"<Regions of node {self._number}>"

    def commands(self) -> list[Command]:
        """What is served."""
        return [
            Command(
                *("VIRGO_MALLOC", self.malloc, "write", 1, 6),
                concurrent=True,
                writes=True,
                usage=USAGE,
                summary="Allocate a region; answers its id.",
            ),
            Command(
                *("VIRGO_SET", self.set, "write", 2, 4),
                writes=True,
                usage="id data [AT offset]",
                summary="Replace a region's value, or write over a part of it.",
            ),
            Command(
                *("VIRGO_GET", self.get, "read", 1, 4),
                usage="id [AT offset [size]]",
                summary="A region's value, or a part of it.",
            ),
            Command("MEMORY.REGION", self.describe, "read", 1, 1, usage="id", summary="A region, as JSON."),
            Command(
                *("MEMORY.SEGMENT", self.segment, "read", 1, 1),
                usage="id",
                summary="How to map a shared region, as JSON; nil if it is not shared.",
            ),
            Command(
                *("VIRGO_FREE", self.free, "write", 1, 1),
                writes=True,
                usage="id",
                summary="Free a region; its id is never given again.",
            ),
        ]

    def describe(self, session: Session, request: list[bytes]) -> Any:
        """Figures of one region, as JSON."""
        identifier = integer(request[1], "id")
        if kept.is_kept(identifier):
            return self._kept.describe(identifier)
        if node_of(identifier) != self._number:
            return self._forward(self._home(identifier), *request)
        batch = session.batch(b"memory", self._batch)
        region = batch.region(identifier)
        if region is None:
            raise unknown(identifier)
        if region.shared:
            length = self._shared.length(identifier, region)
        else:
            length = region.length if region.spread else len(batch.data(identifier) or b"")
        figures = {
            "id": identifier,
            "size": region.size,
            "length": length,
            "node": self._node.name,
            "nodes": sorted(set(region.plan)),
            "shared": region.shared,
        }
        return msgspec.json.encode(figures)

    def segment(self, session: Session, request: list[bytes]) -> Any:
        """How processes of its machine map a shared region, as JSON; nil if it is not shared."""
        identifier = integer(request[1], "id")
        if kept.is_kept(identifier):
            return self._kept.segment(identifier)
        if node_of(identifier) != self._number:
            return self._forward(self._home(identifier), *request)
        region = session.batch(b"memory", self._batch).region(identifier)
        if region is None:
            raise unknown(identifier)
        return self._shared.describe(identifier, region) if region.shared else None

    # --- malloc -------------------------------------------------------------------------------

    def malloc(self, session: Session, request: list[bytes]) -> Any:
        """Here while there is room, else elsewhere; with NODE only there."""
        wish = Wish.read(request)
        if wish.keep != PLAIN:
            return self._kept.malloc(wish.size, wish.keep)
        pinned = self._pinned(wish.node)
        if pinned not in (0, self._number):
            return self._forward(pinned, b"VIRGO_MALLOC", *request[1:])
        if wish.size > MEMORY_CHUNK_BYTES and not wish.shared:
            return self._spread.malloc(wish.size, pinned=bool(pinned))
        batch = session.batch(b"memory", self._batch)
        if not pinned and batch.room_bytes() < wish.room_bytes():
            return self._malloc_elsewhere(wish)
        if wish.shared:
            return self._shared.malloc(wish.size, wish.note)
        return self.malloc_here(batch, wish.size)

    def _pinned(self, name: str) -> int:
        """The number of the node of that name, "." for this one, 0 for none."""
        if name in ("", "."):
            return self._number if name else 0
        for member in self._node.members():
            if member.name == name:
                return member.number
        raise NoNode(f"no node named {name!r} is up")

    def malloc_here(self, batch: OwnerBatch, size: int) -> int:
        """A plain region on this node. Raises PoolFull."""
        batch.declare(size)
        identifier = compose_id(self._number, batch.next_serial())
        batch.put_region(identifier, Region(size))
        return identifier

    async def _malloc_elsewhere(self, wish: Wish) -> int:
        """On another node; what the others last said of their room may be outdated, so try several."""
        size = wish.room_bytes()
        members = {member.number: member for member in self._node.members()}
        rooms = {number: member.load.pool_free_bytes for number, member in members.items()}
        rooms[self._number] = self._store.room_bytes()
        for _ in range(MEMORY_PLACE_ATTEMPTS_MAX):
            try:
                number = core.choose_node(size, self._number, rooms, random.randrange, "a region")
            except PoolFull:
                return await self._ask_the_full(wish, {n: members[n] for n in rooms if n in members})
            if number == self._number and wish.shared:
                return await self._shared.malloc(wish.size, wish.note)
            if number == self._number:
                with self._store.batching() as batch:
                    return self.malloc_here(batch, wish.size)
            try:
                return int(await self._node.call(number, *wish.request(members[number].name)))
            except (PoolFull, NodeLost):
                del rooms[number]
        raise PoolFull(f"no node has room for a region of {size} bytes")

    async def _ask_the_full(self, wish: Wish, members: Mapping[int, Member]) -> int:
        """What a node said of its room may be a beat old, and it may have been freed since: ask each."""
        for number, member in members.items():
            if number != self._number:
                try:
                    return int(await self._node.call(number, *wish.request(member.name)))
                except (PoolFull, NodeLost):
                    continue
        raise PoolFull(f"no node has room for a region of {wish.size} bytes")

    # --- set, get, free -----------------------------------------------------------------------

    def set(self, session: Session, request: list[bytes]) -> Any:
        """Replace the value, or write over a part of it."""
        identifier = integer(request[1], "id")
        data = request[2]
        at = _at(request, 3, "VIRGO_SET id data [AT offset]")
        if kept.is_kept(identifier):
            return self._kept.set(identifier, data, at)
        if node_of(identifier) != self._number:
            return self._forward_ok(identifier, request)
        batch = session.batch(b"memory", self._batch)
        region = batch.region(identifier)
        if region is None:
            raise unknown(identifier)
        if region.spread:
            return self._spread.write(identifier, data, *at) if at else self._spread.put(identifier, data)
        if region.shared:
            return self._shared.write(identifier, region, data, *at)
        value = core.changed(
            identifier, region, lambda: batch.writing().data(identifier), data, at[0] if at else None
        )
        if value is not None:
            batch.put_data(identifier, value)
        return OK

    def get(self, session: Session, request: list[bytes]) -> Any:
        """The value, or a part of it."""
        identifier = integer(request[1], "id")
        at = _at(request, 2, "VIRGO_GET id [AT offset [size]]") if len(request) > 2 else []
        if kept.is_kept(identifier):
            return self._kept.get(identifier, at)
        if node_of(identifier) != self._number:
            return self._forward(self._home(identifier), *request)
        batch = session.batch(b"memory", self._batch)
        data = batch.data(identifier)
        if data is not None and not at:
            return data
        region = batch.region(identifier)
        if region is None:
            raise unknown(identifier)
        if region.spread:
            return self._spread.read(identifier, *at)
        if region.shared:
            return self._shared.read(identifier, region, *at)
        if not at:
            return b""
        core.check_part(at[0], at[1] if len(at) > 1 else None, region.size, identifier)
        stop = at[0] + at[1] if len(at) > 1 else None
        return (data or b"")[at[0] : stop]

    def free(self, session: Session, request: list[bytes]) -> Any:
        """Give the room back."""
        identifier = integer(request[1], "id")
        if kept.is_kept(identifier):
            return self._kept.free(identifier)
        if node_of(identifier) != self._number:
            return self._forward_ok(identifier, request)
        batch = session.batch(b"memory", self._batch)
        region = batch.region(identifier)
        if region is None:
            raise unknown(identifier)
        if region.spread:
            return self._spread.free(identifier)
        if region.shared:
            return self._shared.free(identifier)
        batch.delete_region(identifier, region)
        return OK

    def _home(self, identifier: int) -> int:
        """The number in an id, if a node has it. Raises UnknownId."""
        number = node_of(identifier)
        try:
            self._node.member(number)
        except NoNode:
            raise unknown(identifier) from None
        return number

    async def _forward(self, number: int, *request: bytes) -> Any:
        return await self._node.call(number, *request)

    async def _forward_ok(self, identifier: int, request: list[bytes]) -> Encoded:
        await self._node.call(self._home(identifier), *request)
        return OK


def _at(request: list[bytes], start: int, usage: str) -> list[int]:
    """The numbers behind AT, if there are any. Raises BadArgument."""
    if len(request) == start:
        return []
    if len(request) == start + 1 or request[start].upper() != b"AT":
        raise BadArgument(f"{request[0].decode()} knows one option, AT", hint=f"Usage: {usage}")
    return [integer(number, name) for number, name in zip(request[start + 1 :], _AT_NAMES, strict=False)]
