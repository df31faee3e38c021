"""The key commands of a node, for keys that lie on any node.

A key whose slot is this node's is handled at once, in the batch of the chunk. Any other is looked up and
the command passed on to its node. A command on several keys is done node by node: each node's part is
atomic, the whole is not. What a node holds that does not answer is NodeLost, never "no such key".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any
from zlib import crc32

from virgo.errors import BadArgument
from virgo.limits import MEMORY_KEY_BYTES_MAX, MEMORY_SCAN_KEYS_MAX, MEMORY_SLOTS
from virgo.memory import core, parallel, strings
from virgo.memory.batch import Batch
from virgo.memory.slots import Slots
from virgo.memory.store import Store
from virgo.module import NodeServices
from virgo.wire.args import integer
from virgo.wire.commands import Command, Handler
from virgo.wire.resp import OK, Encoded, Simple
from virgo.wire.session import Session

Local = Callable[[Batch, list[bytes]], Any]
Merge = Callable[[list[tuple[list[int], Any]]], Any]
_SLOT_BITS = 16


class Keys:
    """The key commands of one node."""

    def __init__(self, node: NodeServices, store: Store, slots: Slots) -> None:
        self._node = node
        self._number = node.number
        self._store = store
        self._slots = slots
        self._table = slots.table
        self._batch = store.batch

    def __repr__(self) -> str:
        return f"<Keys of node {self._number}, {self._slots!r}>"

    def commands(self) -> list[Command]:
        """What is served."""
        one, many, here = self._one, self._many, self._here
        return [
            _read("GET", self.get, 1, 1, "key", "The value of a key, or nil."),
            _read("STRLEN", one(strings.strlen), 1, 1, "key", "Bytes of a value."),
            _read("TYPE", one(strings.type_, simple=True), 1, 1, "key", "`string`, or `none`."),
            _read("TTL", one(strings.ttl), 1, 1, "key", "Seconds left; -1 for ever, -2 no such key."),
            _read("PTTL", one(strings.pttl), 1, 1, "key", "Milliseconds left, as TTL."),
            _read("MGET", many(strings.mget, _in_order), 1, None, "key [key...]", "The values of keys."),
            _read("EXISTS", many(strings.exists, _total), 1, None, "key [key...]", "How many exist."),
            _read("DBSIZE", self._dbsize, 0, 0, "", "How many keys there are, over all nodes."),
            _read("KEYS", self._keys, 1, 1, "pattern", "All keys that match."),
            _read("SCAN", self._scan, 1, None, "cursor [MATCH pattern] [COUNT count]", "Keys, in turns."),
            _write("SET", self.set, 2, None, strings.SET_USAGE, "Set a key."),
            _write("SETNX", one(strings.setnx, assigns=True), 2, 2, "key value", "Set a key if absent."),
            _write(
                "GETDEL",
                _reading("GETDEL", one(strings.getdel)),
                1,
                1,
                "key",
                "The value of a key, which is deleted.",
            ),
            _write("EXPIRE", one(strings.expire), 2, 2, "key seconds", "Let a key expire."),
            _write("PEXPIRE", one(strings.pexpire), 2, 2, "key milliseconds", "Let a key expire."),
            _write("PERSIST", one(strings.persist), 1, 1, "key", "Let a key no longer expire."),
            _write("MSET", many(strings.mset, _ok, step=2), 2, None, "key value [key value...]", "Set keys."),
            _write("DEL", many(strings.delete, _total), 1, None, "key [key...]", "Delete keys.", "UNLINK"),
            _write("FLUSHDB", self._flush, 0, 1, "[SYNC|ASYNC]", "Delete all keys.", "FLUSHALL"),
            _read("MEMORY.KEYS.COUNT", here(strings.count), 0, 0, "", "How many keys this node holds."),
            _read("MEMORY.KEYS.SCAN", here(strings.scan), 2, 3, "slot count [pattern]", "Keys held here."),
            _write("MEMORY.KEYS.FLUSH", here(strings.flush), 0, 0, "", "Delete the keys held here."),
        ]

    # --- one key ------------------------------------------------------------------------------

    def get(self, session: Session, request: list[bytes]) -> Any:
        """GET, spelt out, since it is the most frequent command."""
        key = request[1]
        slot = crc32(key) % MEMORY_SLOTS
        if self._table[slot] != self._number or len(key) > MEMORY_KEY_BYTES_MAX:
            return self._elsewhere(strings.get, request)
        record = session.batch(b"memory", self._batch).key(core.SLOT_PREFIXES[slot] + key)
        if record is None:
            self._store.misses += 1
            return None
        if record[0]:
            return strings.get(session.batch(b"memory", self._batch), request)
        self._store.hits += 1
        return record[1:]

    def set(self, session: Session, request: list[bytes]) -> Any:
        """SET, spelt out for its plain form."""
        key = request[1]
        slot = crc32(key) % MEMORY_SLOTS
        if self._table[slot] != self._number or len(key) > MEMORY_KEY_BYTES_MAX:
            gives_old = _require_read_for_get(session, request)
            return self._elsewhere(strings.set_, request, assigns=True, simple=not gives_old)
        batch = session.batch(b"memory", self._batch)
        if len(request) > 3:
            _require_read_for_get(session, request)
            return strings.set_(batch, request)
        batch.put_key(core.SLOT_PREFIXES[slot] + key, core.PLAIN_KEY + request[2])
        return OK

    def _one(self, local: Local, *, assigns: bool = False, simple: bool = False) -> Handler:
        """The handler of a command on one key, its first argument."""

        def handle(session: Session, request: list[bytes]) -> Any:
            key = request[1]
            if self._table[core.slot_of(key)] != self._number or len(key) > MEMORY_KEY_BYTES_MAX:
                return self._elsewhere(local, request, assigns=assigns, simple=simple)
            return local(session.batch(b"memory", self._batch), request)

        return handle

    async def _elsewhere(
        self, local: Local, request: list[bytes], *, assigns: bool = False, simple: bool = False
    ) -> Any:
        """Do a command on one key where the key is, or would be."""
        core.check_key(request[1])
        slot = core.slot_of(request[1])
        await self._find((slot,), assigns=assigns)
        return await self._at(self._table[slot], local, request, simple=simple)

    async def _find(self, slots: Iterable[int], *, assigns: bool) -> None:
        """Know where the slots are; with `assigns` give each of them a node."""
        if assigns:
            await self._slots.assign(slots)
        else:
            await self._slots.look_up(slots)

    async def _at(self, number: int, local: Local, request: list[bytes], *, simple: bool = False) -> Any:
        """Do it on that node; 0 means a slot of nobody, which is as empty here as anywhere."""
        if number in (0, self._number):
            with self._store.batching() as batch:
                return local(batch, request)
        reply = await self._node.call(number, *request)
        return Simple(reply.decode()) if simple and isinstance(reply, bytes) else reply

    # --- several keys -------------------------------------------------------------------------

    def _many(self, local: Local, merge: Merge, *, step: int = 1) -> Handler:
        """The handler of a command on several keys, each with `step - 1` further arguments."""

        def handle(session: Session, request: list[bytes]) -> Any:
            keys = request[1::step]
            if (len(request) - 1) % step:
                raise BadArgument(
                    "MSET got a key without a value", hint="Usage: MSET key value [key value...]"
                )
            for key in keys:
                core.check_key(key)
            if all(self._table[crc32(key) % MEMORY_SLOTS] == self._number for key in keys):
                return local(session.batch(b"memory", self._batch), request)
            return self._many_elsewhere(local, merge, request, step)

        return handle

    async def _many_elsewhere(self, local: Local, merge: Merge, request: list[bytes], step: int) -> Any:
        slots = [core.slot_of(key) for key in request[1::step]]
        await self._find(slots, assigns=step > 1)
        groups: dict[int, list[int]] = {}
        for position, slot in enumerate(slots):
            groups.setdefault(self._table[slot] or self._number, []).append(position)
        work = []
        for number, positions in groups.items():
            part = [request[0]]
            for position in positions:
                part += request[1 + position * step : 1 + (position + 1) * step]
            work.append(self._at(number, local, part))
        return merge(list(zip(groups.values(), await parallel.gather(work), strict=True)))

    # --- all keys -----------------------------------------------------------------------------

    def _here(self, local: Local) -> Handler:
        """The handler of a command on this node's part."""
        return lambda session, request: local(session.batch(b"memory", self._batch), request)

    async def _everywhere(self, local: Local, request: list[bytes]) -> list[Any]:
        """Do it on every node that holds keys."""
        await self._slots.refresh()
        return await parallel.gather([self._at(number, local, request) for number in self._slots.owners()])

    async def _dbsize(self, _session: Session, _request: list[bytes]) -> int:
        return sum(await self._everywhere(strings.count, [b"MEMORY.KEYS.COUNT"]))

    async def _flush(self, _session: Session, _request: list[bytes]) -> Encoded:
        await self._everywhere(strings.flush, [b"MEMORY.KEYS.FLUSH"])
        return OK

    async def _keys(self, _session: Session, request: list[bytes]) -> list[bytes]:
        core.glob(request[1])
        await self._slots.refresh()
        parts = await parallel.gather([self._keys_of(number, request[1]) for number in self._slots.owners()])
        return [key for part in parts for key in part]

    async def _keys_of(self, number: int, pattern: bytes) -> list[bytes]:
        found: list[bytes] = []
        slot = 0
        while slot < MEMORY_SLOTS:
            slot, keys = await self._scan_at(number, slot, MEMORY_SCAN_KEYS_MAX, pattern)
            found += keys
            await asyncio.sleep(0)
        return found

    async def _scan(self, _session: Session, request: list[bytes]) -> list[Any]:
        """The cursor is a node's number and a slot; nodes are visited by number."""
        cursor = integer(request[1], "the cursor", low=0)
        pattern, count = _scan_options(request)
        await self._slots.refresh()
        owners = sorted(self._slots.owners())
        if not owners:
            return [b"0", []]
        number, slot = cursor >> _SLOT_BITS, cursor & (1 << _SLOT_BITS) - 1
        if not cursor:
            number = owners[0]
        elif number not in owners or slot >= MEMORY_SLOTS:
            raise BadArgument(f"no SCAN gave the cursor {cursor}", hint="Begin with 0.")
        slot, keys = await self._scan_at(number, slot, count, pattern)
        if slot >= MEMORY_SLOTS:
            number, slot = next((owner for owner in owners if owner > number), 0), 0
        return [b"%d" % (number << _SLOT_BITS | slot), keys]

    async def _scan_at(self, number: int, slot: int, count: int, pattern: bytes) -> tuple[int, list[bytes]]:
        request = [b"MEMORY.KEYS.SCAN", b"%d" % slot, b"%d" % count, pattern]
        onward, keys = await self._at(number, strings.scan, request)
        return int(onward), keys


def _read(name: str, handler: Handler, low: int, high: int | None, usage: str, summary: str) -> Command:
    return Command(name, handler, "read", low, high, usage=usage, summary=summary)


def _write(
    name: str, handler: Handler, low: int, high: int | None, usage: str, summary: str, *aliases: str
) -> Command:
    return Command(
        name, handler, "write", low, high, writes=True, usage=usage, summary=summary, aliases=aliases
    )


def _in_order(parts: list[tuple[list[int], Any]]) -> list[Any]:
    """The values, each at its key's position."""
    placed = {
        position: value
        for positions, values in parts
        for position, value in zip(positions, values, strict=True)
    }
    return [placed[position] for position in range(len(placed))]


def _total(parts: list[tuple[list[int], Any]]) -> int:
    return sum(reply for _, reply in parts)


def _ok(_parts: list[tuple[list[int], Any]]) -> Encoded:
    return OK


_SCAN_USAGE = "SCAN cursor [MATCH pattern] [COUNT number] [TYPE string]"


def _scan_options(request: list[bytes]) -> tuple[bytes, int]:
    """Pattern and count of a SCAN."""
    pattern, count = b"*", 10
    words = request[2:]
    for option, value in zip(words[::2], words[1::2], strict=False):
        if option.upper() == b"MATCH":
            pattern = value
        elif option.upper() == b"COUNT":
            count = min(MEMORY_SCAN_KEYS_MAX, integer(value, "the count", low=1))
        elif option.upper() != b"TYPE" or value.lower() != b"string":
            raise BadArgument(f"SCAN has no option {option[:20]!r} {value[:20]!r}", hint=_SCAN_USAGE)
    if len(words) % 2:
        raise BadArgument("SCAN got an option without its value", hint=_SCAN_USAGE)
    return pattern, count


def _reading(name: str, handler: Handler) -> Handler:
    """A changing command that also shows the old value: it needs the role `read` too."""

    def handle(session: Session, request: list[bytes]) -> Any:
        session.require("read", name)
        return handler(session, request)

    return handle


def _require_read_for_get(session: Session, request: list[bytes]) -> bool:
    """Whether a SET asks for the old value, which needs the role `read` too."""
    gives_old = any(option.upper() == b"GET" for option in request[3:])
    if gives_old:
        session.require("read", "SET with GET")
    return gives_old
