"""Commands on all keys of the cloud: counting, listing, scanning, picking, deleting.

Each asks every node that holds slots; a node that does not answer is NodeLost.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from virgo import parallel
from virgo.errors import BadArgument
from virgo.limits import MEMORY_SCAN_KEYS_MAX, MEMORY_SLOTS_ALL
from virgo.memory import generic, keyspace
from virgo.memory.entries import number as whole
from virgo.memory.slots import Slots
from virgo.memory.store import Store
from virgo.memory.verbs import Local
from virgo.module import NodeServices
from virgo.wire.commands import Command, Handler
from virgo.wire.resp import OK, Encoded
from virgo.wire.session import Session

_SLOT_BITS = 16
_SCAN_USAGE = "cursor [MATCH pattern] [COUNT count] [TYPE string]"
_RANDOM_ATTEMPTS_MAX = 8


class Listing:
    """The commands on all keys, served by one node."""

    def __init__(self, node: NodeServices, store: Store, slots: Slots) -> None:
        self._node = node
        self._number = node.number
        self._store = store
        self._slots = slots

    def __repr__(self) -> str:
        return f"<Listing of node {self._number}>"

    def commands(self) -> list[Command]:
        """What is served."""
        part = "MEMORY.KEYS."
        return [
            Command("DBSIZE", self._dbsize, "read", summary="How many keys there are, over all nodes."),
            Command("KEYS", self._keys, "read", 1, 1, usage="pattern", summary="All keys that match."),
            Command("SCAN", self._scan, "read", 1, None, usage=_SCAN_USAGE, summary="Keys, in turns."),
            Command("RANDOMKEY", self._random, "read", summary="Any key."),
            Command(
                *("FLUSHDB", self._flush, "write", 0, 1),
                usage="[SYNC|ASYNC]",
                summary="Delete all keys.",
                aliases=("FLUSHALL",),
            ),
            Command(part + "COUNT", self._here(generic.count), "read", summary="How many this node holds."),
            Command(part + "RANDOM", self._here(generic.random_key), "read", summary="Any that it holds."),
            Command(part + "SCAN", self._here(generic.scan), "read", 2, 3, usage="slot count [pattern]"),
            Command(part + "FLUSH", self._here(generic.flush), "write", writes=True),
        ]

    def _here(self, local: Local) -> Handler:
        """The handler of a command on this node's part."""
        return lambda session, request: local(session.batch(b"memory", self._store.batch), request)

    async def _at(self, number: int, local: Local, request: list[bytes]) -> Any:
        if number == self._number:
            with self._store.batching() as batch:
                return local(batch, request)
        return await self._node.call(number, *request)

    async def owners(self) -> list[int]:
        """Numbers of the nodes that hold slots, as of now."""
        await self._slots.refresh()
        return sorted(self._slots.owners())

    async def _everywhere(self, local: Local, request: list[bytes]) -> list[Any]:
        """Do it on every node that holds keys."""
        return await parallel.gather([self._at(number, local, request) for number in await self.owners()])

    async def _dbsize(self, _session: Session, _request: list[bytes]) -> int:
        return sum(await self._everywhere(generic.count, [b"MEMORY.KEYS.COUNT"]))

    async def _flush(self, _session: Session, request: list[bytes]) -> Encoded:
        if len(request) > 1 and request[1].upper() not in (b"SYNC", b"ASYNC"):
            raise BadArgument(f"FLUSHDB has no option {request[1][:20]!r}", hint="SYNC or ASYNC.")
        await self.flush()
        return OK

    async def flush(self) -> None:
        """Delete all keys of the cloud."""
        await self._everywhere(generic.flush, [b"MEMORY.KEYS.FLUSH"])
        up = {member.number for member in self._node.members()}
        for number in (self._slots.mirrors() - self._slots.owners()) & up:
            await self._at(number, generic.flush, [b"MEMORY.KEYS.FLUSH"])
        await self._store.keeper.settled()

    async def _random(self, _session: Session, _request: list[bytes]) -> bytes | None:
        """From a node that is drawn by the count of its keys."""
        owners = await self.owners()
        for _ in range(_RANDOM_ATTEMPTS_MAX):
            counts = await self._everywhere(generic.count, [b"MEMORY.KEYS.COUNT"])
            if not any(counts):
                break
            number = random.choices(owners, counts)[0]  # noqa: S311 - any key will do
            found: bytes | None = await self._at(number, generic.random_key, [b"MEMORY.KEYS.RANDOM"])
            if found is not None:  # else all of its keys are past their time, or were deleted meanwhile
                return found
        return None

    async def _keys(self, _session: Session, request: list[bytes]) -> list[bytes]:
        keyspace.glob(request[1])
        parts = await parallel.gather([self._keys_of(number, request[1]) for number in await self.owners()])
        return [key for part in parts for key in part]

    async def _keys_of(self, number: int, pattern: bytes) -> list[bytes]:
        found: list[bytes] = []
        slot = 0
        while slot < MEMORY_SLOTS_ALL:
            slot, keys = await self._scan_at(number, slot, MEMORY_SCAN_KEYS_MAX, pattern)
            found += keys
            await asyncio.sleep(0)
        return found

    async def _scan(self, _session: Session, request: list[bytes]) -> list[Any]:
        """The cursor is a node's number and a slot; nodes are visited by number."""
        cursor = whole(request[1], "the cursor", low=0)
        pattern, count = _scan_options(request)
        owners = await self.owners()
        if not owners:
            return [b"0", []]
        number, slot = cursor >> _SLOT_BITS, cursor & (1 << _SLOT_BITS) - 1
        if not cursor:
            number = owners[0]
        elif number not in owners or slot >= MEMORY_SLOTS_ALL:
            raise BadArgument(f"no SCAN gave the cursor {cursor}", hint="Begin with 0.")
        slot, keys = await self._scan_at(number, slot, count, pattern)
        if slot >= MEMORY_SLOTS_ALL:
            number, slot = next((owner for owner in owners if owner > number), 0), 0
        return [b"%d" % (number << _SLOT_BITS | slot), keys]

    async def _scan_at(self, number: int, slot: int, count: int, pattern: bytes) -> tuple[int, list[bytes]]:
        request = [b"MEMORY.KEYS.SCAN", b"%d" % slot, b"%d" % count, pattern]
        onward, keys = await self._at(number, generic.scan, request)
        return int(onward), keys


def _scan_options(request: list[bytes]) -> tuple[bytes, int]:
    """Pattern and count of a SCAN."""
    pattern, count = b"*", 10
    words = request[2:]
    usage = f"Usage: SCAN {_SCAN_USAGE}"
    for option, value in zip(words[::2], words[1::2], strict=False):
        if option.upper() == b"MATCH":
            pattern = value
        elif option.upper() == b"COUNT":
            count = min(MEMORY_SCAN_KEYS_MAX, whole(value, "the count", low=1))
        elif option.upper() != b"TYPE" or value.lower() != b"string":
            raise BadArgument(f"SCAN has no option {option[:20]!r} {value[:20]!r}", hint=usage)
    if len(words) % 2:
        raise BadArgument("SCAN got an option without its value", hint=usage)
    return pattern, count
