"""Second copies of keys that are kept on two nodes: made before a change is acknowledged.

Promises: what was acknowledged outlasts the loss of either node; reads go on at once, from the mirror, and
writes when the mirror has taken over, which it does once the owner's lease has run out; then, and when a
mirror is lost, another node gets the copies. While there is no other node that can take them, changes are
acknowledged with one copy, which the figures and the log say.

Who owns a slot is decided by the register of slots alone. A mirror takes copies only from the owner that it
finds there, so one that was cut off while the mirror took over acknowledges nothing any more. It may still
show what it had to programs on its own machine until it hears of that.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Iterable
from typing import Any, Final

from virgo.errors import (
    BadArgument,
    Conflict,
    DeadlineExceeded,
    DiskFull,
    NodeLost,
    NoNode,
    PoolFull,
    VirgoError,
)
from virgo.limits import (
    MEMORY_COPY_BYTES_MAX,
    MEMORY_MIRRORS_LOOK_S,
    MEMORY_MIRRORS_UNABLE_S,
    MEMORY_SLOTS,
    MEMORY_SLOTS_ALL,
    MEMORY_SWEEP_KEYS_MAX,
    MEMORY_SYNC_SLOTS,
    NODE_LOST_S,
)
from virgo.memory import keeping, keyspace
from virgo.memory.keeper import Sink
from virgo.memory.keeping import OPENING, Pair
from virgo.memory.owner import OwnerBatch
from virgo.memory.slots import Slots
from virgo.memory.store import Store
from virgo.module import NodeServices
from virgo.wire.args import integer
from virgo.wire.commands import Command
from virgo.wire.resp import OK, Encoded
from virgo.wire.session import Session

log = logging.getLogger("virgo.memory")
_LOOKS_IDLE: Final = 10  # of so many one is made while no keys are known to be kept twice
_LOOKS_LOST: Final = 2  # looks in a row at which a node is missing before it counts as lost


class Mirror(Sink):
    """One node that gets copies of ours.

    Attributes:
        unable: why it cannot take any.
    """

    def __init__(self, node: NodeServices, store: Store, number: int) -> None:
        super().__init__()
        self._node = node
        self._store = store
        self.number = number
        self.unable: VirgoError | None = None
        self._failing_since = 0.0

    def forgives(self, error: VirgoError) -> bool:
        """A node that is lost or full is let go soon; until then nothing can be acknowledged."""
        now = asyncio.get_running_loop().time()
        self._failing_since = self._failing_since or now
        if isinstance(error, PoolFull | DiskFull) or now - self._failing_since > NODE_LOST_S:
            self.unable = error
        return isinstance(error, NodeLost | NoNode | PoolFull | DiskFull | DeadlineExceeded)

    async def send(self, some: list[bytes], *, emptied: bool) -> None:
        """See `Sink`."""
        for start in range(0, len(some), MEMORY_SWEEP_KEYS_MAX):
            with self._store.batching() as batch:
                keys = some[start : start + MEMORY_SWEEP_KEYS_MAX]
                records = [(stored, batch.key(stored) or b"") for stored in keys]
            while records:
                size = 0
                part: list[bytes] = []
                while records and size < MEMORY_COPY_BYTES_MAX:
                    stored, record = records.pop()
                    part += (stored, record)
                    size += len(record)
                await self._node.call(self.number, b"MEMORY.COPY.PUT", self._node.number, *part)
        self._failing_since = 0.0


class Mirrors:
    """What one node has for others, and others for it."""

    def __init__(self, node: NodeServices, store: Store, slots: Slots) -> None:
        self._node = node
        self._number = node.number
        self._store = store
        self._slots = slots
        self._mirrors: dict[int, Mirror] = {}
        self._syncing: dict[int, int] = {}  # by slot, the node that gets its keys just now
        self._unsent: dict[int, set[bytes]] = {}  # by slot, what an owner that syncs has not sent yet
        self._missing: dict[int, int] = {}  # by node, for how many looks
        self._unable: dict[int, float] = {}  # by node, until when it is not asked to take copies
        self._adopted: list[Pair] = []  # what was last put into the store
        self._looks = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Mirrors of node {self._number}, at {sorted(self._mirrors)}>"

    def commands(self) -> list[Command]:
        """What is served to other nodes."""
        name = "MEMORY.COPY."
        return [
            Command(name + "PUT", self._put, "write", 1, None, writes=True, usage="owner [key record...]"),
            Command(name + "BEGIN", self._begin, "write", 2, None, usage="owner slot [slot...]"),
            Command(name + "END", self._end, "write", 2, None, writes=True, usage="owner slot [slot...]"),
            Command("MEMORY.SLOTS.LEARN", self._learn, "write", summary="Between nodes."),
        ]

    def stats(self) -> dict[str, Any]:
        """Figures: slots that we own and that have a copy or none, copies for others, what is on its way."""
        pairs = [pair for pair in keyspace.pairs(self._slots.table) if pair.owner == self._number]
        return {
            "slots_kept_twice": sum(1 for pair in pairs if pair.mirror),
            "slots_kept_once": sum(1 for pair in pairs if not pair.mirror),
            "copies_for_others": sum(self._store.copies.values()),
            "copies_under_way": sum(len(mirror.dirty) for mirror in self._mirrors.values()),
        }

    def sinks(self, slot: int) -> Iterable[Sink]:
        """Where changes of a slot are sent."""
        if slot < MEMORY_SLOTS or self._slots.table[slot] != self._number:
            return ()
        numbers = {self._slots.table[slot + MEMORY_SLOTS], self._syncing.get(slot, 0)} - {0}
        return [self._mirror(number) for number in numbers]

    def _mirror(self, number: int) -> Mirror:
        if number not in self._mirrors:
            mirror = self._mirrors[number] = Mirror(self._node, self._store, number)
            self._node.spawn(mirror.run(), name=f"copies for node {number}")
        return self._mirrors[number]

    # --- served: as mirror ----------------------------------------------------------------------

    async def _put(self, _session: Session, request: list[bytes]) -> Encoded:
        """MEMORY.COPY.PUT owner [key record...]: have these; an empty record is a key that is gone."""
        owner, stored = integer(request[1], "the owner"), request[2::2]
        if len(stored) != len(request[3::2]) or not all(map(_is_kept_twice, stored)):
            raise BadArgument(
                "these are no keys that are kept twice", hint="It is for nodes, not for people."
            )
        await self._check_owner(owner, {each[0] << 8 | each[1] for each in stored})
        with self._store.batching() as batch:
            batch.writing()
            for each, record in zip(stored, request[3::2], strict=True):
                self._keep(batch, each, record)
        await self._store.keeper.settled()
        return OK

    def _keep(self, batch: OwnerBatch, stored: bytes, record: bytes) -> None:
        slot = stored[0] << 8 | stored[1]
        if slot in self._unsent:
            self._unsent[slot].discard(stored)
        self._store.copies.setdefault(slot, 0)  # counted when the batch is closed
        if record:
            batch.put_record(stored, record, keyspace.decode_entry(record).expires_ms)
        else:
            batch.delete_key(stored)

    async def _begin(self, _session: Session, request: list[bytes]) -> Encoded:
        """MEMORY.COPY.BEGIN owner slot...: all keys of these slots will be sent; then END."""
        owner, *slots = (integer(word, "the argument") for word in request[1:])
        await self._check_owner(owner, slots)
        with self._store.batching() as batch:
            for slot in slots:
                found = batch.in_slot(slot)
                self._unsent[slot] = set(found)
                self._store.copies[slot] = len(found)
        return OK

    async def _end(self, _session: Session, request: list[bytes]) -> Encoded:
        """MEMORY.COPY.END owner slot...: what was not sent since BEGIN is no longer there."""
        owner, *slots = (integer(word, "the argument") for word in request[1:])
        await self._check_owner(owner, slots)
        with self._store.batching() as batch:
            for slot in slots:
                for stored in self._unsent.pop(slot, ()):
                    self._keep(batch, stored, b"")
        await self._store.keeper.settled()
        return OK

    async def _check_owner(self, owner: int, slots: Iterable[int]) -> None:
        """Raise Conflict unless that node owns these slots as of now, and we do not."""
        wanted = list(slots)
        if owner == self._number or not all(MEMORY_SLOTS <= slot < MEMORY_SLOTS_ALL for slot in wanted):
            raise BadArgument(f"node {owner} has no copies of these slots here", hint="It is for nodes.")
        if any(self._slots.table[slot] != owner for slot in wanted):
            await self._slots.refresh()
        if any(self._slots.table[slot] != owner for slot in wanted):
            raise Conflict(f"node {owner} does not own these keys any more")

    async def _learn(self, _session: Session, _request: list[bytes]) -> Encoded:
        """MEMORY.SLOTS.LEARN: the owners or mirrors of some slots have changed."""
        await self._slots.refresh()
        self._adopt()
        return OK

    # --- owners and mirrors change --------------------------------------------------------------

    async def start(self) -> None:
        """Know what is ours; nothing is served until then."""
        await self._slots.refresh()
        self._adopt()

    async def follow(self) -> None:
        """Take over, let go, and look for mirrors as nodes come and go; runs until cancelled."""
        first = True
        for turn in itertools.count():
            await asyncio.sleep(MEMORY_MIRRORS_LOOK_S)
            # Who becomes a mirror learns that with the first copy, and needs not ask when there is none.
            if not (first or any(self._slots.table[MEMORY_SLOTS:]) or turn % _LOOKS_IDLE == 0):
                continue
            try:
                await self.look(resync=first)
                first = False
            except VirgoError as error:
                log.info("the mirrors of keys are looked after again in a moment: %s", error)

    async def look(self, *, resync: bool = False) -> None:
        """One look. With `resync` the mirrors are sent all, for we may have died with changes under way."""
        async with self._looks:
            await self._slots.refresh()
            self._adopt()
            if not any(self._slots.table[MEMORY_SLOTS:MEMORY_SLOTS_ALL]):
                return
            alive = {member.number for member in self._node.members()} | {self._number}
            await self._succeed(alive)
            ours = {
                MEMORY_SLOTS + index: pair.mirror
                for index, pair in enumerate(keyspace.pairs(self._slots.table))
                if pair.owner == self._number
            }
            if resync:
                await self._sync({slot: mirror for slot, mirror in ours.items() if mirror in alive})
            await self._seek([slot for slot, mirror in ours.items() if not mirror], alive)

    async def _succeed(self, alive: set[int]) -> None:
        """Take over what lost nodes owned, and let lost mirrors go."""
        table = self._slots.table
        for number in self._slots.owners() | self._slots.mirrors():
            self._missing[number] = 0 if number in alive else self._missing.get(number, 0) + 1
        lost = {number for number, looks in self._missing.items() if looks >= _LOOKS_LOST}
        unable = {number for number, mirror in self._mirrors.items() if mirror.unable is not None}
        if not keeping.succeed(keyspace.pairs(table), self._number, lost, unable):
            return

        def decide(now: list[int]) -> list[int]:
            changed = keeping.succeed(keyspace.pairs(now), self._number, lost, unable)
            return keyspace.with_pairs(now, changed)

        await self._slots.change(decide)
        log.warning("keys that were kept twice are kept once, here: lost %s, full %s", lost, unable)
        self._adopt()
        now = asyncio.get_running_loop().time()
        for number in lost | unable:
            self._unable[number] = now + MEMORY_MIRRORS_UNABLE_S * (number in unable)
            mirror = self._mirrors.get(number)
            if mirror is not None:
                mirror.unable = None
                mirror.give_up()
        await self._tell()

    async def _seek(self, slots: list[int], alive: set[int]) -> None:
        """Find mirrors for these slots of ours, if there are nodes that can be."""
        now = asyncio.get_running_loop().time()
        rooms = {
            member.number: member.load.pool_free_bytes
            for member in self._node.members()
            if member.number in alive and self._unable.get(member.number, 0.0) <= now
        }
        chosen = {slot: keeping.choose_mirror(self._number, rooms, random.randrange) for slot in slots}
        wanted = {slot: number for slot, number in chosen.items() if number}
        if not wanted:
            return
        await self._sync(wanted)

        def decide(table: list[int]) -> list[int]:
            pairs = keyspace.pairs(table)
            changed = {
                slot - MEMORY_SLOTS: Pair(self._number, number)
                for slot, number in wanted.items()
                if pairs[slot - MEMORY_SLOTS] == Pair(self._number, 0) and self._syncing.get(slot) == number
            }
            return keyspace.with_pairs(table, changed)

        try:
            await self._slots.change(decide)
        finally:
            for slot in wanted:
                self._syncing.pop(slot, None)
        await self._tell()

    async def _sync(self, wanted: dict[int, int]) -> None:
        """Send all keys of these slots to these nodes; changes made meanwhile are sent there, too."""
        for number in sorted(set(wanted.values())):
            slots = [slot for slot, each in wanted.items() if each == number]
            try:
                for start in range(0, len(slots), MEMORY_SYNC_SLOTS):
                    await self._sync_some(number, slots[start : start + MEMORY_SYNC_SLOTS])
            except VirgoError as error:
                log.warning("node %d does not get copies: %s", number, error)
                for slot in slots:
                    self._syncing.pop(slot, None)

    async def _sync_some(self, number: int, slots: list[int]) -> None:
        mirror = self._mirror(number)
        self._syncing.update(dict.fromkeys(slots, number))
        await self._node.call(number, b"MEMORY.COPY.BEGIN", self._number, *slots)
        for slot in slots:
            with self._store.batching() as batch:
                mirror.add(batch.in_slot(slot))
            if len(mirror.dirty) > MEMORY_SWEEP_KEYS_MAX:
                await self._settle(mirror)
        await self._settle(mirror)
        await self._node.call(number, b"MEMORY.COPY.END", self._number, *slots)

    async def _settle(self, mirror: Mirror) -> None:
        """Wait until it has all. Raises what keeps it from taking copies."""
        while not mirror.idle:
            if mirror.unable is not None:
                error, mirror.unable = mirror.unable, None
                self._unable[mirror.number] = asyncio.get_running_loop().time() + MEMORY_MIRRORS_UNABLE_S
                mirror.give_up()
                raise error
            if mirror.number not in {member.number for member in self._node.members()}:
                mirror.give_up()
                raise NodeLost(f"node {mirror.number} is lost")
            await asyncio.sleep(0.01)

    async def _tell(self) -> None:
        """Have the others read the table, so that they ask the right node; who misses it learns later."""
        for member in self._node.members():
            if member.number != self._number:
                try:
                    await self._node.call(member.number, b"MEMORY.SLOTS.LEARN")
                except VirgoError as error:
                    log.info("node %d was not told of new owners: %s", member.number, error)

    def _adopt(self) -> None:
        """Own what the table says we do, and forget keys that we neither own nor mirror."""
        pairs = keyspace.pairs(self._slots.table)
        if pairs == self._adopted:
            return
        owned = {MEMORY_SLOTS + index for index, pair in enumerate(pairs) if pair.owner == self._number}
        copies, budget = self._store.copies, MEMORY_SWEEP_KEYS_MAX
        with self._store.batching() as batch:
            for slot in owned ^ batch.held_slots():
                batch.hold(slot, slot in owned)
            for slot in owned:
                copies.pop(slot, None)
                self._unsent.pop(slot, None)
            for slot in self._present(batch) - owned:
                found = batch.in_slot(slot)
                owner, mirror = pairs[slot - MEMORY_SLOTS]
                if owner and mirror != self._number and slot not in self._unsent and budget > 0:
                    for stored in found:
                        batch.delete_key(stored)
                    budget -= len(found)
                    copies.pop(slot, None)
                else:
                    copies[slot] = len(found)
        self._adopted = pairs if budget > 0 else []  # the rest is for the next look

    def _present(self, batch: OwnerBatch) -> set[int]:
        """Slots of keys that are kept twice of which there are keys here."""
        found, slot = set(), MEMORY_SLOTS
        while slot < MEMORY_SLOTS_ALL:
            stored = batch.key_from(keyspace.SLOT_PREFIXES[slot])
            if stored is None:
                break
            slot = (stored[0] << 8 | stored[1]) + 1
            found.add(slot - 1)
        return found


def _is_kept_twice(stored: bytes) -> bool:
    """Whether that is the stored key of a key that is kept twice."""
    return stored.startswith(OPENING, 2) and keyspace.stored_key(stored[2:]) == stored
