"""MULTI, EXEC, DISCARD, WATCH and UNWATCH: commands on keys that take place as one.

Promises: the commands of an EXEC are run one after the other, with nobody in between, in one transaction of
the store; if the store has no room for them, none took place. If a watched key has changed since, the
answer is nil and nothing is done. The keys, watched ones too, have to lie on one node: else CrossNode is
answered, and nothing is done.

Only commands on keys can be queued, and a few that do nothing. As in Redis a command that is refused when
it is queued makes the EXEC fail, and one that fails when it is run leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from virgo.errors import BadArgument, TooLarge, TransactionAborted, VirgoError
from virgo.limits import MEMORY_QUEUED_BYTES_MAX, MEMORY_QUEUED_COMMANDS_MAX
from virgo.memory import generic, keyspace
from virgo.memory.batch import Batch
from virgo.memory.keys import VERSION, Keys
from virgo.memory.store import Store
from virgo.memory.verbs import BY_NAME, Verb
from virgo.module import NodeServices
from virgo.wire import resp
from virgo.wire.commands import Command
from virgo.wire.resp import OK, Encoded, Simple
from virgo.wire.session import Session

_QUEUED = Simple("QUEUED")
_IDLE = ("PING", "ECHO", "TIME", "SELECT", "UNWATCH")  # may be queued though they are no commands on keys
_WATCHED = "memory.watched"


class _Exec(msgspec.Struct, array_like=True, frozen=True):
    """What is to be done on the node that has the keys; versions as `generic.version` gives them."""

    protocol: int
    watched: dict[bytes, int]
    requests: list[list[bytes]]


class Transactions:
    """The commands, served by one node."""

    def __init__(self, node: NodeServices, store: Store, keys: Keys) -> None:
        self._node = node
        self._store = store
        self._keys = keys

    def __repr__(self) -> str:
        return f"<Transactions of node {self._node.number}>"

    def commands(self) -> list[Command]:
        """What is served."""
        return [
            Command("MULTI", self._multi, "read", summary="Queue commands, until EXEC or DISCARD."),
            Command("EXEC", _outside, "read", writes=True, summary="Run the queued commands as one."),
            Command("DISCARD", _outside, "read", summary="Forget the queued commands."),
            Command(
                *("WATCH", self._watch, "read", 1, None),
                usage="key [key...]",
                summary="Let the next EXEC do nothing if one of these has changed by then.",
            ),
            Command("UNWATCH", _unwatch, "read", summary="Forget what is watched."),
            Command("MEMORY.EXEC", self._serve, "read", 1, 1, writes=True, usage="work"),
        ]

    def _multi(self, session: Session, _request: list[bytes]) -> Encoded:
        session.intercept(_Queue(self))
        return OK

    def _watch(self, session: Session, request: list[bytes]) -> Any:
        keys = request[1:]
        if self._keys.all_here(keys):
            versions = generic.version(session.batch(b"memory", self._store.batch), request)
            return _note(session, keys, versions)
        return self._watch_elsewhere(session, keys)

    async def _watch_elsewhere(self, session: Session, keys: list[bytes]) -> Encoded:
        number = await self._keys.locate_together(keys, "WATCH", assigns=False)
        return _note(session, keys, await self._keys.at(number, VERSION, [b"MEMORY.KEY.VERSION", *keys]))

    # --- exec ---------------------------------------------------------------------------------

    def exec(self, session: Session, requests: list[list[bytes]]) -> Any:
        """Run requests that have been checked when they were queued."""
        watched = session.attached.pop(_WATCHED, {})
        work = _Exec(session.protocol, watched, requests)
        keys, creates = list(watched), False
        for request in requests:
            verb = _verb(session, request)
            if verb is not None:
                keys += verb.keys(request)
                creates = creates or verb.creates
        if self._keys.all_here(keys):
            return self._run(session, session.batch(b"memory", self._store.batch), work)
        return self._exec_elsewhere(session, work, keys, creates=creates)

    async def _exec_elsewhere(
        self, session: Session, work: _Exec, keys: list[bytes], *, creates: bool
    ) -> Any:
        number = await self._keys.locate_together(keys, "EXEC", assigns=creates)
        if number in (0, self._node.number):
            with self._store.batching() as batch:
                result = self._run(session, batch, work)
            await self._store.keeper.settled(map(keyspace.slot_of, keys))
            return result
        reply = await self._node.call(number, b"MEMORY.EXEC", msgspec.msgpack.encode(work))
        return None if reply is None else Encoded(reply)

    def _serve(self, session: Session, request: list[bytes]) -> bytes | None:
        """The work of another node's EXEC; answers the bytes of the whole answer."""
        try:
            work = msgspec.msgpack.decode(request[1], type=_Exec)
        except msgspec.DecodeError as error:
            raise BadArgument(f"MEMORY.EXEC got no work: {error}", hint="Use MULTI and EXEC.") from error
        for each in work.requests:
            command = session.table.find(each[0] if each else b"")
            session.require(command.role, command.name)
            command.check_arity(each)
            _check(session, command, each)
        found = self._run(session, session.batch(b"memory", self._store.batch), work)
        return None if found is None else resp.encode(found, work.protocol)

    def _run(self, session: Session, batch: Batch, work: _Exec) -> list[Any] | None:
        batch.writing()
        if generic.version(batch, [b"", *work.watched]) != list(work.watched.values()):
            return None
        return [_run_one(session, batch, request) for request in work.requests]


def _run_one(session: Session, batch: Batch, request: list[bytes]) -> Any:
    verb = _verb(session, request)
    try:
        if verb is not None:
            return verb.run(batch, request)
        return session.table.find(request[0]).handler(session, request)
    except VirgoError as error:
        return error  # takes its place among the answers


class _Queue:
    """Between MULTI and EXEC: the session's `Interceptor`."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._requests: list[list[bytes]] = []
        self._bytes = 0
        self._broken = False

    def __repr__(self) -> str:
        return f"<Queue of {len(self._requests)} requests{', broken' if self._broken else ''}>"

    def refused(self) -> None:
        """A request was refused, so EXEC will be, too."""
        self._broken = True

    def __call__(self, session: Session, command: Command, request: list[bytes]) -> Any:
        """Queue a request, or end the queue."""
        session.check(command, request)
        if command.name == "EXEC":
            session.intercept(None)
            if self._broken:
                session.attached.pop(_WATCHED, None)
                raise TransactionAborted("a command was refused when it was queued, so none was run")
            return self._transactions.exec(session, self._requests)
        if command.name == "DISCARD":
            session.intercept(None)
            return _unwatch(session, request)
        if command.name in ("QUIT", "RESET"):
            session.intercept(None)
            return command.handler(session, request)
        if command.name in ("MULTI", "WATCH"):  # as in Redis this does no harm to what is queued
            return BadArgument(f"{command.name} inside of MULTI", hint="EXEC or DISCARD comes first.")
        _check(session, command, request)
        self._add(request)
        return _QUEUED

    def _add(self, request: list[bytes]) -> None:
        self._bytes += sum(map(len, request))
        if len(self._requests) >= MEMORY_QUEUED_COMMANDS_MAX or self._bytes > MEMORY_QUEUED_BYTES_MAX:
            self._requests.clear()  # they will not be run
            raise TooLarge(
                f"a MULTI may have {MEMORY_QUEUED_COMMANDS_MAX} commands and {MEMORY_QUEUED_BYTES_MAX} bytes",
                hint="DISCARD, then use several.",
            )
        self._requests.append(request)


def _verb(session: Session, request: Sequence[bytes]) -> Verb | None:
    """The command on keys that a request is for, if it is one."""
    return BY_NAME.get(session.table.find(request[0]).name)


def _check(session: Session, command: Command, request: list[bytes]) -> None:
    """Raise BadArgument or Denied if the request cannot be part of a transaction."""
    verb = BY_NAME.get(command.name)
    if verb is None:
        if command.name not in _IDLE:
            raise BadArgument(
                f"{request[0].decode('utf-8', 'backslashreplace')[:40]} cannot be queued",
                hint="MULTI takes commands on keys: GET, SET, INCR, ...",
            )
        return
    verb.keys(request)
    if verb.shows(request):
        session.require("read", command.name)


def _note(session: Session, keys: Sequence[bytes], versions: Sequence[int]) -> Encoded:
    """Remember the versions; of a key that is watched twice the first counts."""
    watched = session.attached.setdefault(_WATCHED, {})
    for key, version in zip(keys, versions, strict=True):
        watched.setdefault(key, version)
    return OK


def _unwatch(session: Session, _request: list[bytes]) -> Encoded:
    session.attached.pop(_WATCHED, None)
    return OK


def _outside(_session: Session, request: list[bytes]) -> None:
    name = request[0].decode("ascii", "replace").upper()
    raise BadArgument(f"{name} without MULTI", hint="MULTI begins a transaction.")
