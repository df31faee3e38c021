"""Chunks of spread regions: those this node holds for any home, and the way to those of other nodes.

Commands between nodes; `total` is what the home wants reserved here for the region in all, so a node that
lost its pool takes part again with the next chunk it gets.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from virgo import parallel
from virgo.errors import NodeLost, NoNode, VirgoError
from virgo.limits import (
    CONNECT_S,
    MEMORY_NODES_ASKED_MAX,
    MEMORY_REGION_BYTES_MAX,
    MEMORY_SWEEP_REGIONS_MAX,
)
from virgo.members import node_of
from virgo.memory.store import Store
from virgo.module import NodeServices
from virgo.wire.args import integer
from virgo.wire.commands import Command
from virgo.wire.resp import OK, Encoded
from virgo.wire.session import Session

Wanted = Callable[[int, int], tuple[int, list[int], list[int]] | None]


class Chunks:
    """Chunks here and there.

    Attributes:
        wanted: given region and node, what the home (this node) wants held there; see `Spread.wanted`.
        swept: chunks found that nobody wanted, since the start.
    """

    def __init__(self, node: NodeServices, store: Store) -> None:
        self._node = node
        self._number = node.number
        self._store = store
        self.wanted: Wanted = lambda _identifier, _number: None
        self.swept = 0

    def __repr__(self) -> str:
        return f"<Chunks of node {self._number}, {self.swept} swept>"

    def commands(self) -> list[Command]:
        """What is served to other nodes."""
        name = "MEMORY.CHUNK."
        return [
            Command("MEMORY.ROOM", self._serve_room, "read", summary="Free bytes of this node's pool."),
            Command(name + "GET", self._serve_get, "read", 3, 5, usage="id version index [start stop]"),
            Command(
                name + "PUT", self._serve_put, "write", 5, 5, writes=True, usage="id version index total data"
            ),
            Command(
                name + "DROP", self._serve_drop, "write", 2, None, writes=True, usage="id version [index...]"
            ),
            Command(name + "RESERVE", self._serve_reserve, "write", 2, 2, writes=True, usage="id total"),
            Command(name + "WANTED", self._serve_wanted, "read", 2, None, usage="node id [id...]"),
        ]

    # --- on any node --------------------------------------------------------------------------

    async def rooms(self) -> dict[int, int]:
        """Free bytes of the nodes that are up, asked for now; of the roomiest ones if they are many."""
        others = [member for member in self._node.members() if member.number != self._number]
        others.sort(key=lambda member: -member.load.pool_free_bytes)
        numbers = [member.number for member in others[:MEMORY_NODES_ASKED_MAX]]
        answers = await parallel.settle(
            self._node.call(number, b"MEMORY.ROOM", timeout_s=CONNECT_S) for number in numbers
        )
        rooms = {number: room for number, room in zip(numbers, answers, strict=True) if isinstance(room, int)}
        rooms[self._number] = self._store.room_bytes()
        return rooms

    async def reserve(self, number: int, identifier: int, total: int) -> None:
        """Have that much reserved on a node for a region; 0 frees its chunks there too."""
        if number == self._number:
            with self._store.batching() as batch:
                batch.reserve(identifier, total)
        else:
            limit = None if total else CONNECT_S
            await self._node.call(number, b"MEMORY.CHUNK.RESERVE", identifier, total, timeout_s=limit)

    async def put(
        self, number: int, identifier: int, version: int, index: int, total: int, data: memoryview
    ) -> None:
        """Write one chunk on a node."""
        if number == self._number:
            with self._store.batching() as batch:
                batch.reserve(identifier, total)
                batch.put_chunk(identifier, version, index, bytes(data))
            await asyncio.sleep(0)  # others have their turn between chunks
        else:
            request = (b"MEMORY.CHUNK.PUT", identifier, version, index, total, bytes(data))
            await self._node.call(number, *request)

    async def get(
        self, number: int, identifier: int, version: int, index: int, start: int, stop: int
    ) -> bytes | None:
        """Bytes of one chunk of a node, zeros behind its end; None if it is not there. Raises NodeLost."""
        if number == self._number:
            with self._store.batching() as batch:
                found = batch.chunk(identifier, version, index)
            await asyncio.sleep(0)
            return None if found is None else found[start:stop].ljust(stop - start, b"\0")
        try:
            request = (b"MEMORY.CHUNK.GET", identifier, version, index, start, stop)
            reply: bytes | None = await self._node.call(number, *request)
        except NoNode as error:
            raise NodeLost(f"node {number} holds a part of region {identifier:#x} and is unknown") from error
        return None if reply is None else reply.ljust(stop - start, b"\0")

    async def drop(
        self, number: int, identifier: int, version: int, indices: Sequence[int] | None = None
    ) -> None:
        """Forget chunks of a version on a node, all or some."""
        if number == self._number:
            with self._store.batching() as batch:
                batch.drop_chunks(identifier, version, indices)
        else:
            some = indices or ()
            await self._node.call(
                number, b"MEMORY.CHUNK.DROP", identifier, version, *some, timeout_s=CONNECT_S
            )

    # --- served -------------------------------------------------------------------------------

    def _serve_room(self, _session: Session, _request: list[bytes]) -> int:
        return self._store.room_bytes()

    def _serve_get(self, session: Session, request: list[bytes]) -> bytes | None:
        identifier, version, index, *part = _numbers(request[1:])
        found: bytes | None = session.batch(b"memory", self._store.batch).chunk(identifier, version, index)
        return found if found is None or not part else found[slice(*part)]

    def _serve_put(self, session: Session, request: list[bytes]) -> Encoded:
        identifier, version, index, total = _numbers(request[1:5])
        batch = session.batch(b"memory", self._store.batch)
        batch.reserve(identifier, total)
        batch.put_chunk(identifier, version, index, request[5])
        return OK

    def _serve_drop(self, session: Session, request: list[bytes]) -> int:
        identifier, version, *indices = _numbers(request[1:])
        batch = session.batch(b"memory", self._store.batch)
        return batch.drop_chunks(identifier, version, indices or None)

    def _serve_reserve(self, session: Session, request: list[bytes]) -> Encoded:
        identifier, total = _numbers(request[1:])
        session.batch(b"memory", self._store.batch).reserve(identifier, min(total, MEMORY_REGION_BYTES_MAX))
        return OK

    def _serve_wanted(self, _session: Session, request: list[bytes]) -> list[Any]:
        number, *identifiers = _numbers(request[1:])
        return [self.wanted(identifier, number) for identifier in identifiers[:MEMORY_SWEEP_REGIONS_MAX]]

    # --- sweep --------------------------------------------------------------------------------

    async def sweep(self) -> int:
        """Free what this node holds and no home wants; returns how many chunks that were."""
        with self._store.batching() as batch:
            held: dict[int, list[int]] = {identifier: [] for identifier, _ in batch.reservations()}
            for identifier, version in batch.chunk_versions():
                held.setdefault(identifier, []).append(version)
        freed = 0
        for home, group in itertools.groupby(sorted(held), node_of):
            identifiers = list(group)
            for start in range(0, len(identifiers), MEMORY_SWEEP_REGIONS_MAX):
                some = identifiers[start : start + MEMORY_SWEEP_REGIONS_MAX]
                for identifier, answer in zip(some, await self._ask(home, some), strict=False):
                    if answer is not None:
                        freed += self._free_unwanted(identifier, held[identifier], *answer)
        self.swept += freed
        return freed

    async def _ask(self, home: int, identifiers: list[int]) -> list[Any]:
        if home == self._number:
            return [self.wanted(identifier, home) for identifier in identifiers]
        if home not in {member.number for member in self._node.members()}:
            return []
        try:
            answers: list[Any] = await self._node.call(
                home, b"MEMORY.CHUNK.WANTED", self._number, *identifiers
            )
        except VirgoError:
            return []  # the home is going away: what it wants is asked again with the next sweep
        return answers

    def _free_unwanted(
        self, identifier: int, held: list[int], total: int, wanted: list[int], exactly: list[int]
    ) -> int:
        """Only versions that were seen before the home was asked: later ones it has not judged.

        `exactly`, unless it is empty, has version and index of all chunks that are wanted of those versions.
        """
        kept = set(zip(exactly[::2], exactly[1::2], strict=True)) if exactly else None
        with self._store.batching() as batch:
            freed = 0
            for version in held:
                if version not in wanted:
                    freed += batch.drop_chunks(identifier, version)
                elif kept is not None:
                    here = batch.chunk_indices(identifier, version)
                    gone = [index for index in here if (version, index) not in kept]
                    freed += batch.drop_chunks(identifier, version, gone)
            if not total and not any(True for _ in batch.chunk_versions(identifier)):
                batch.reserve(identifier, 0)
        return freed


def _numbers(arguments: list[bytes]) -> list[int]:
    return [integer(argument, "the argument", low=0) for argument in arguments]
