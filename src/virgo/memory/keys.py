"""The key commands of a node, for keys that lie on any node.

A key whose slot is this node's is handled at once, in the batch of the chunk. Any other is looked up and
the command passed on to its node. A command on several keys is done node by node: each node's part is
atomic, the whole is not, unless the command says that its keys have to lie together. What a node holds
that does not answer is NodeLost, never "no such key".
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from typing import Any
from zlib import crc32

from virgo import parallel
from virgo.errors import BadArgument, Busy, Conflict, CrossNode, NodeLost, NotRunning, VirgoError
from virgo.limits import (
    MEMORY_KEY_BYTES_MAX,
    MEMORY_RENAME_ATTEMPTS_MAX,
    MEMORY_SLOTS,
    MEMORY_TAKEOVER_S,
)
from virgo.memory import generic, keyspace, strings
from virgo.memory.keeping import OPENING
from virgo.memory.keyspace import HEAD_BYTES, slot_of
from virgo.memory.remote import Known, RemoteValues
from virgo.memory.slots import Slots
from virgo.memory.store import Store
from virgo.memory.verbs import BY_NAME, GET, SET, VERBS, Local, Verb
from virgo.module import NodeServices
from virgo.wire import resp
from virgo.wire.commands import Command, Handler
from virgo.wire.resp import OK, Simple
from virgo.wire.session import Session

_AGAIN_S = 0.1  # between looks whether a mirror has taken over
_RUN_VALUE_BYTES_MAX = 4096  # larger ones are not worth to be handled together


class Keys:
    """The commands on named keys of one node.

    Attributes:
        remote: values of other nodes that are kept here.
        readable: commands by name, those among which read can be answered from second copies.
    """

    def __init__(self, node: NodeServices, store: Store, slots: Slots) -> None:
        self._node = node
        self._number = node.number
        self._store = store
        self._slots = slots
        self._table = slots.table
        self._batch = store.batch
        self.remote = RemoteValues(store.state.capacity_bytes)
        self.readable = dict(BY_NAME)

    def __repr__(self) -> str:
        return f"<Keys of node {self._number}, {self._slots!r}>"

    def commands(self) -> list[Command]:
        """What is served."""
        return [
            _command(GET, self.get, run=self.get_run, run_words=2),
            _command(SET, self.set, run=self.set_run, run_words=3),
            *(_command(verb, self._handler(verb)) for verb in VERBS if verb not in (GET, SET)),
            *self.between(_BETWEEN_NODES),
            Command(
                *("MEMORY.COPY.RUN", self._run_copy, "read", 2, None),
                usage="command key...",
                summary="Between nodes: read from second copies.",
            ),
        ]

    # --- one key ------------------------------------------------------------------------------

    def get(self, session: Session, request: list[bytes]) -> Any:
        """GET, spelt out, since it is the most frequent command."""
        key = request[1]
        slot = crc32(key) % MEMORY_SLOTS if b"{" not in key else slot_of(key)
        if self._table[slot] != self._number or len(key) > MEMORY_KEY_BYTES_MAX:
            return self._elsewhere(GET, request)
        batch = session.batch(b"memory", self._batch)
        record = batch.key(keyspace.SLOT_PREFIXES[slot] + key)
        if record is None:
            self._store.misses += 1
            return None
        if record[0]:
            return strings.get(batch, request)
        self._store.hits += 1
        return record[HEAD_BYTES:]

    def set(self, session: Session, request: list[bytes]) -> Any:
        """SET, spelt out for its plain form."""
        key = request[1]
        slot = crc32(key) % MEMORY_SLOTS if b"{" not in key else slot_of(key)
        if self._table[slot] != self._number or len(key) > MEMORY_KEY_BYTES_MAX or len(request) > 3:
            return self._serve_one(SET, session, request)
        session.batch(b"memory", self._batch).put_plain(keyspace.SLOT_PREFIXES[slot] + key, request[2])
        return OK

    def get_run(self, session: Session, requests: list[list[bytes]]) -> list[bytes]:
        """Answers to several GETs; ends before one of a key that is elsewhere, expires, or is large."""
        table, number, prefixes = self._table, self._number, keyspace.SLOT_PREFIXES
        read = session.batch(b"memory", self._batch).key
        nil = resp.NIL if session.protocol == 2 else resp.NIL3
        answers: list[bytes] = []
        misses = 0
        for request in requests:
            key = request[1]
            slot = crc32(key) % MEMORY_SLOTS if b"{" not in key else slot_of(key)
            if table[slot] != number or len(key) > MEMORY_KEY_BYTES_MAX:
                break
            record = read(prefixes[slot] + key)
            if record is None:
                misses += 1
                answers.append(nil)
                continue
            if record[0] or len(record) > _RUN_VALUE_BYTES_MAX:
                break
            value = record[HEAD_BYTES:]
            answers.append(b"$%d\r\n%b\r\n" % (len(value), value))
        self._store.misses += misses
        self._store.hits += len(answers) - misses
        return answers

    def set_run(self, session: Session, requests: list[list[bytes]]) -> list[bytes]:
        """Answers to several SETs without options; ends before one of a key elsewhere, or without room."""
        table, number, prefixes = self._table, self._number, keyspace.SLOT_PREFIXES
        put = session.batch(b"memory", self._batch).put_plain
        done = 0
        try:
            for request in requests:
                key = request[1]
                slot = crc32(key) % MEMORY_SLOTS if b"{" not in key else slot_of(key)
                if table[slot] != number or len(key) > MEMORY_KEY_BYTES_MAX:
                    break
                put(prefixes[slot] + key, request[2])
                done += 1
        except VirgoError:  # of the request that it stands at, which fails again by itself, and says so
            return [OK] * done
        return [OK] * done

    def _handler(self, verb: Verb) -> Handler:
        serve = {"one": self._serve_one, "two": self._serve_two}.get(verb.shape, self._serve_many)
        return lambda session, request: serve(verb, session, request)

    def _here(self, verb: Verb) -> Handler:
        """The handler of a command between nodes: whoever sends it knows that the key is here."""
        return lambda session, request: verb.run(session.batch(b"memory", self._batch), request)

    def _serve_one(self, verb: Verb, session: Session, request: list[bytes]) -> Any:
        if verb.shows(request):
            session.require("read", verb.name)
        key = request[1]
        if self._table[slot_of(key)] != self._number or len(key) > MEMORY_KEY_BYTES_MAX:
            return self._elsewhere(verb, request)
        return verb.run(session.batch(b"memory", self._batch), request)

    async def _elsewhere(self, verb: Verb, request: list[bytes]) -> Any:
        """Do a command whose keys lie together where they are, or would be."""
        numbers = await self.locate(verb.keys(request), assigns=verb.creates)
        if verb is GET and numbers[0] not in (0, self._number):
            return await self._get_from(numbers[0], request)
        return await self.at(numbers[0], verb, request)

    async def _get_from(self, number: int, request: list[bytes]) -> bytes | None:
        """A value of another node, which is sent only if it is not here already."""
        key = request[1]
        if not self.remote.wanted(key):
            value: bytes | None = await self.at(number, GET, request)
            self.remote.sight(key, value)
            return value
        known = self.remote.get(key, number)
        version = 0 if known is None else known.version
        reply = await self.at(number, CHANGED, [b"MEMORY.KEY.CHANGED", key, b"%d" % version])
        if reply is None:
            self.remote.forget(key)
            return None
        if len(reply) == 1 and known is not None:
            self.remote.hit(key)
            return known.value
        self.remote.keep(key, Known(number, *reply))
        return bytes(reply[1])

    # --- where keys are -----------------------------------------------------------------------

    async def locate(self, keys: Iterable[bytes], *, assigns: bool) -> list[int]:
        """The node of each key; without `assigns` it is 0 for a slot that no node has yet.

        Raises:
            TooLarge: a key is too long. PoolFull: no node has room for a new slot. EngineUnavailable.
        """
        slots = []
        for key in keys:
            keyspace.check_key(key)
            slots.append(slot_of(key))
        if assigns:
            await self._slots.assign(slots)
        else:
            await self._slots.look_up(slots)
        if any(slot >= MEMORY_SLOTS for slot in slots):
            await self._slots.freshen()
        return [self._table[slot] for slot in slots]

    async def locate_together(self, keys: list[bytes], what: str, *, assigns: bool) -> int:
        """The node that has all of the keys, as `locate`. Raises CrossNode if there is none."""
        numbers = set(await self.locate(keys, assigns=assigns)) - {0}
        if len(numbers) > 1:
            raise CrossNode(f"the keys of {what} lie on {len(numbers)} nodes")
        return numbers.pop() if numbers else 0

    async def at(self, number: int, verb: Verb, request: list[bytes]) -> Any:
        """Do it on that node; 0 means a slot of nobody, which is as empty here as anywhere."""
        kept = [slot_of(key) for key in verb.keys(request) if key.startswith(OPENING)]
        if number in (0, self._number):
            with self._store.batching() as batch:
                result = verb.run(batch, request)
            if kept and verb.changes:
                await self._store.keeper.settled(kept)
            return result
        try:
            reply = await self._node.call(number, *request)
        except NodeLost as error:
            if not kept or min(kept) < MEMORY_SLOTS:
                raise
            return await self._survive(number, kept[0], verb, request, error)
        simple = verb.simple and isinstance(reply, bytes) and not verb.shows(request)
        return Simple(reply.decode()) if simple else reply

    async def _survive(self, lost: int, slot: int, verb: Verb, request: list[bytes], error: NodeLost) -> Any:
        """Go on after the loss of the node that owns a slot of keys which are kept twice.

        A change is only made if it has surely not been made: then it waits for the mirror to take over.
        """
        if verb.changes and not isinstance(error.__cause__, NotRunning):
            raise error
        deadline = time.monotonic() + MEMORY_TAKEOVER_S
        while time.monotonic() < deadline:
            await self._slots.refresh()
            owner, mirror = self._table[slot], self._table[slot + MEMORY_SLOTS]
            if owner != lost:
                return await self.at(owner, verb, request)
            if not verb.changes and mirror:
                with contextlib.suppress(NodeLost, Conflict):
                    if mirror == self._number:
                        return self._run_copy(None, [b"", *request])
                    return await self._node.call(mirror, b"MEMORY.COPY.RUN", *request)
            await asyncio.sleep(_AGAIN_S)
        raise error

    def _run_copy(self, _session: Session | None, request: list[bytes]) -> Any:
        """MEMORY.COPY.RUN command key...: its answer, from what is here of another node's keys."""
        verb = self.readable.get(request[1].decode("ascii", "replace").upper())
        if verb is None or verb.changes:
            raise BadArgument(
                "only reads can be answered from copies", hint="It is for nodes, not for people."
            )
        table = self._table
        for slot in map(slot_of, verb.keys(request[1:])):
            if slot < MEMORY_SLOTS or self._number not in (table[slot], table[slot + MEMORY_SLOTS]):
                raise Conflict("these keys have no copy here")
        with self._store.batching() as batch:
            return verb.run(batch, request[1:])

    def holders(self, key: bytes) -> tuple[int, int]:
        """Numbers of the nodes with a key and its copy, as known here; 0 for none."""
        slot = slot_of(key)
        return self._table[slot], self._table[slot + MEMORY_SLOTS] if slot >= MEMORY_SLOTS else 0

    def between(self, verbs: tuple[Verb, ...]) -> list[Command]:
        """Commands that only nodes send, to the one that has the keys."""
        self.readable.update((verb.name, verb) for verb in verbs)
        return [_command(verb, self._here(verb)) for verb in verbs]

    def all_here(self, keys: Iterable[bytes]) -> bool:
        """Whether all keys are known to be this node's."""
        table, number = self._table, self._number
        return all(table[slot_of(key)] == number and len(key) <= MEMORY_KEY_BYTES_MAX for key in keys)

    # --- several keys -------------------------------------------------------------------------

    def _serve_many(self, verb: Verb, session: Session, request: list[bytes]) -> Any:
        if self.all_here(verb.keys(request)):
            return verb.run(session.batch(b"memory", self._batch), request)
        return self._many_elsewhere(verb, request)

    async def _many_elsewhere(self, verb: Verb, request: list[bytes]) -> Any:
        keys = verb.keys(request)
        if verb.together:
            return await self.at(
                await self.locate_together(keys, verb.name, assigns=verb.creates), verb, request
            )
        step = 2 if verb.shape == "pairs" else 1
        groups = await self.grouped(keys, assigns=verb.creates)
        work = []
        for (number, _), positions in groups.items():
            part = [request[0]]
            for position in positions:
                part += request[1 + position * step : 1 + (position + 1) * step]
            work.append(self.at(number, verb, part))
        return _merge(list(groups.values()), await parallel.gather(work))

    async def grouped(self, keys: list[bytes], *, assigns: bool) -> dict[tuple[int, int], list[int]]:
        """Positions of keys, by their node and mirror: those with the same ones survive together."""
        groups: dict[tuple[int, int], list[int]] = {}
        numbers = await self.locate(keys, assigns=assigns)
        for position, (key, number) in enumerate(zip(keys, numbers, strict=True)):
            slot = slot_of(key)
            mirror = self._table[slot + MEMORY_SLOTS] if slot >= MEMORY_SLOTS else -1
            groups.setdefault((number or self._number, mirror), []).append(position)
        return groups

    def _serve_two(self, verb: Verb, session: Session, request: list[bytes]) -> Any:
        if self.all_here(request[1:3]):
            return verb.run(session.batch(b"memory", self._batch), request)
        return self._two_elsewhere(verb, request)

    async def _two_elsewhere(self, verb: Verb, request: list[bytes]) -> Any:
        """RENAME, RENAMENX and COPY; over two nodes nothing is lost, but for a moment both keys are there."""
        replaces = verb.name == "RENAME" or (verb.name == "COPY" and generic.copies_over(request))
        source, target = await self.locate(request[1:3], assigns=True)
        if source == target:
            return await self.at(source, verb, request)
        kept = False
        for _ in range(MEMORY_RENAME_ATTEMPTS_MAX):
            record = await self.at(source, DUMP, [b"MEMORY.KEY.DUMP", request[1]])
            if record is None:
                if kept or verb.name == "COPY":  # deleted meanwhile by another: then it is moved all the same
                    break
                raise generic.no_such_key(request[1])
            over = b"1" if replaces or kept else b"0"
            kept = bool(await self.at(target, PUT, [b"MEMORY.KEY.PUT", request[2], over, record]))
            if not kept or verb.name == "COPY":
                break
            version = b"%d" % keyspace.decode_entry(record).version
            if await self.at(source, DROP, [b"MEMORY.KEY.DROP", request[1], version]):
                break  # else it was set anew meanwhile, and the new value is to be moved
        else:
            raise Busy(f"{verb.name}: the key is set anew all the time, and stays where it is")
        return OK if verb.name == "RENAME" else int(kept)


def _between(name: str, local: Local, usage: str, **more: Any) -> Verb:
    return Verb(name=f"MEMORY.KEY.{name}", local=local, usage=usage, summary="Between nodes.", **more)


DUMP = _between("DUMP", generic.dump, "key")
PUT = _between("PUT", generic.put, "key replace record", changes=True)
DROP = _between("DROP", generic.drop, "key version", changes=True)
VERSION = _between("VERSION", generic.version, "key [key...]", shape="many")
CHANGED = _between("CHANGED", generic.changed, "key version")
_BETWEEN_NODES = (DUMP, PUT, DROP, VERSION, CHANGED)


def _command(verb: Verb, handler: Handler, **more: Any) -> Command:
    return Command(
        verb.name,
        handler,
        "write" if verb.changes else "read",
        verb.arguments_min,
        verb.arguments_max,
        writes=verb.changes,
        usage=verb.usage,
        summary=verb.summary,
        aliases=verb.aliases,
        **more,
    )


def _merge(groups: list[list[int]], replies: list[Any]) -> Any:
    """One answer of those of several nodes: values in the order of their keys, or the sum, or OK."""
    if isinstance(replies[0], list):
        placed = {
            position: value
            for positions, values in zip(groups, replies, strict=True)
            for position, value in zip(positions, values, strict=True)
        }
        return [placed[position] for position in range(len(placed))]
    return sum(replies) if isinstance(replies[0], int) else OK
