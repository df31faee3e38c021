"""The commands of memcached's protocol on the node that a client has reached.

A key that is here is served at once, in the batch of the chunk; any other by the node that has it. What
that node does not answer is SERVER_ERROR, never a miss.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from virgo import parallel
from virgo.context import NOBODY
from virgo.errors import TooLarge, VirgoError, WrongToken
from virgo.limits import MEMORY_KEY_BYTES_MAX, MEMORY_REPLY_BYTES_MAX
from virgo.memory.keys import Keys
from virgo.memory.keyspace import slot_of
from virgo.memory.memcached import meta
from virgo.memory.memcached.dump import Dump
from virgo.memory.memcached.figures import Figures
from virgo.memory.memcached.flagged import Flagged
from virgo.memory.memcached.items import STORED, Items
from virgo.memory.memcached.orders import GET, PREFIX, QUIT, SAY, SET, STORE, TOO_LARGE, WIDE
from virgo.memory.memcached.place import PLACE
from virgo.memory.slots import Slots
from virgo.memory.store import Store
from virgo.memory.verbs import Verb
from virgo.wire.commands import Command, Handler
from virgo.wire.resp import SILENT, Encoded
from virgo.wire.session import Session

_SELDOM_CREATE = (f"{PREFIX}MG", f"{PREFIX}MA")  # only with the flag N


class Front:
    """The commands on keys.

    Args:
        number: this node's.
        store: this node's.
        slots: which node has a key.
        keys: passes commands on.
        item_bytes_max: the largest item that is taken.
    """

    def __init__(self, number: int, store: Store, slots: Slots, keys: Keys, item_bytes_max: int) -> None:
        self._number = number
        self._store = store
        self._table = slots.table
        self._keys = keys
        self.figures = Figures()
        self.items = Items(item_bytes_max)
        flagged, dump = Flagged(self.items), Dump(self.items)
        self._get = _verb("GET", self.items.get, "cas seconds key [key...]", shape="rest")
        self._gat = replace(self._get, changes=True, lazy=True)  # the same, with a time
        self._verbs = [
            _verb(
                "STORE", self.items.store, "key quiet mode mark seconds cas value", changes=True, creates=True
            ),
            _verb("DELTA", self.items.delta, "key quiet sign amount", changes=True, reads=True),
            _verb("TOUCH", self.items.touch, "key quiet seconds", changes=True),
            _verb("DELETE", self.items.delete, "key quiet", changes=True),
            _verb("REFUSE", self.items.refuse, "key quiet answer", changes=True),
            _verb("MG", flagged.get, "key quiet [flag...]", changes=True, lazy=True, creates=True),
            _verb("MS", flagged.store, "key quiet value [flag...]", changes=True, creates=True),
            _verb("MD", flagged.delete, "key quiet [flag...]", changes=True),
            _verb("MA", flagged.add, "key quiet [flag...]", changes=True, creates=True),
            _verb("ME", dump.show, "key quiet form"),
        ]
        keys.readable.update({verb.name: verb for verb in (self._get, *self._verbs)})
        self.page = _verb("PAGE", dump.page, "slot count form")
        self._store_verb = self._verbs[0]

    def __repr__(self) -> str:
        return f"<Front of node {self._number} {self.figures!r}>"

    def commands(self) -> list[Command]:
        """What nodes ask each other, and what the listener serves."""
        between = [_command(verb, self._between(verb)) for verb in (self._get, self.page, *self._verbs)]
        listener = [_command(verb, self._handler(verb), place=PLACE) for verb in self._verbs]
        return [
            *between,
            *listener,
            local(WIDE, self.get, "read"),
            local(SET, self.set, ""),
            local(SAY, self.say, "login"),
            local(QUIT, _quit, ""),
        ]

    def say(self, _session: Session, request: list[bytes]) -> Encoded:
        """SAY answer outcome."""
        if request[2] == TOO_LARGE:
            self.figures.counts["store_too_large"] += 1
        return Encoded(request[1])

    # --- one key ------------------------------------------------------------------------------

    def _between(self, verb: Verb) -> Handler:
        """The handler for other nodes: whoever sends it knows that the key is here."""

        def handle(session: Session, request: list[bytes]) -> Any:
            _permit(session, verb, request)
            return verb.run(session.batch(b"memory", self._store.batch), request)

        return handle

    def _handler(self, verb: Verb) -> Handler:
        def handle(session: Session, request: list[bytes]) -> Any:
            _permit(session, verb, request)
            return self._serve(session, verb, request)

        return handle

    def _serve(self, session: Session, verb: Verb, request: list[bytes]) -> Any:
        try:
            if self._is_here(request[1]):
                found = verb.run(session.batch(b"memory", self._store.batch), request)
                return self._answer(session, verb, request, found)
            return self._elsewhere(session, verb, request)
        except VirgoError as error:
            self.figures.failed(error)
            if request[2] == b"1":
                return SILENT
            raise

    def _is_here(self, key: bytes) -> bool:
        return self._table[slot_of(key)] == self._number and len(key) <= MEMORY_KEY_BYTES_MAX

    async def _elsewhere(self, session: Session, verb: Verb, request: list[bytes]) -> Encoded:
        """Have it done where the key is, or would be."""
        creates = verb.creates and (verb.name not in _SELDOM_CREATE or _vivifies(request))
        try:
            numbers = await self._keys.locate([request[1]], assigns=creates)
            found = await self._keys.at(numbers[0], verb, request)
        except VirgoError as error:
            self.figures.failed(error)
            if request[2] == b"1":
                return SILENT
            raise
        return self._answer(session, verb, request, found)

    def _answer(self, session: Session, verb: Verb, request: list[bytes], found: bytes) -> Encoded:
        what = verb.name.removeprefix(PREFIX)
        if what == "DELTA":
            what = "incr" if request[3] == b"+" else "decr"
        elif what == "STORE" and request[3] == b"cas":
            what = "cas"
        self.figures.count(what, found)
        session.service.crowd.make_room(len(found))
        return SILENT if request[2] == b"1" else Encoded(found)

    # --- get of many keys -----------------------------------------------------------------------

    def get(self, session: Session, request: list[bytes]) -> Any:
        """get, gets, gat, gats."""
        request = [GET, *request[1:]]
        _permit(session, self._get, request)
        keys = request[3:]
        if all(map(self._is_here, keys)):
            parts = self._get.run(session.batch(b"memory", self._store.batch), request)
            return self._got(session, parts, request)
        return self._get_elsewhere(session, request, keys)

    async def _get_elsewhere(self, session: Session, request: list[bytes], keys: list[bytes]) -> Encoded:
        groups = await self._keys.grouped(keys, assigns=False)
        verb = self._gat if request[2] else self._get
        work = [
            self._keys.at(number, verb, [*request[:3], *(keys[position] for position in positions)])
            for (number, _), positions in groups.items()
        ]
        parts = [b""] * len(keys)
        for positions, found in zip(groups.values(), await parallel.gather(work), strict=True):
            for position, part in zip(positions, found, strict=True):
                parts[position] = part
        return self._got(session, parts, request)

    def _got(self, session: Session, parts: list[bytes], request: list[bytes]) -> Encoded:
        size = sum(map(len, parts))
        if size > MEMORY_REPLY_BYTES_MAX:
            raise TooLarge(f"these values have more than {MEMORY_REPLY_BYTES_MAX} bytes together")
        session.service.crowd.make_room(size)
        hits = sum(1 for part in parts if part)
        self.figures.got(hits, len(parts) - hits, touched=bool(request[2]))
        return Encoded(b"".join((*parts, b"END\r\n")))

    # --- set, which is also the login -----------------------------------------------------------

    def set(self, session: Session, request: list[bytes]) -> Any:
        """As memcached does where it asks for a login: the first set of a connection carries it."""
        if session.identity == NOBODY:
            return self._login(session, request)
        session.require("write", "set")
        return self._serve(session, self._store_verb, [STORE, *request[1:]])

    def _login(self, session: Session, request: list[bytes]) -> Encoded:
        self.figures.counts["auth_cmds"] += 1
        words = [word.decode("utf-8", "replace") for word in request[-1].split()]
        if len(words) < 2:
            return Encoded(b"CLIENT_ERROR bad authentication token format\r\n")
        try:
            session.login(session.service.authenticator.token(words[0], words[1]))
        except WrongToken:
            self.figures.counts["auth_errors"] += 1
            raise
        return Encoded(STORED)


def _vivifies(request: list[bytes]) -> bool:
    return meta.checked(request[3:]).has(b"N")


def _permit(session: Session, verb: Verb, request: list[bytes]) -> None:
    """Raise Denied unless who asks has the further role that the request needs."""
    if verb.reads or (verb.name == f"{PREFIX}MA" and meta.checked(request[3:]).has(b"v")):
        session.require("read", verb.name)
    elif verb.name == f"{PREFIX}GET" and request[2]:
        session.require("write", verb.name)
    elif verb.name == f"{PREFIX}MG":
        wanted = meta.checked(request[3:])
        if wanted.has(b"T") or wanted.has(b"N"):
            session.require("write", verb.name)


def _verb(name: str, local: Any, usage: str, **more: Any) -> Verb:
    return Verb(name=PREFIX + name, local=local, usage=usage, summary="Between nodes.", **more)


def _command(verb: Verb, handler: Handler, **more: Any) -> Command:
    return Command(
        verb.name,
        handler,
        "write" if verb.changes and not verb.lazy else "read",
        verb.arguments_min,
        verb.arguments_max,
        writes=verb.changes or verb.name == f"{PREFIX}GET",  # with a time it does
        usage=verb.usage,
        summary=verb.summary,
        **more,
    )


def local(name: bytes, handler: Handler, role: str) -> Command:
    """A command of the listener alone."""
    return Command(name.decode(), handler, role, 0, None, writes=name in (SET, WIDE), place=PLACE)


def _quit(session: Session, _request: list[bytes]) -> Encoded:
    session.close()
    return Encoded(b"")
