"""The table of commands on named keys: what each does on the node that holds the keys, and where they stand.

`keys` serves them from any node, `transactions` queues them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from virgo.memory import expiry, fills, generic, strings, versioned
from virgo.memory.batch import Batch
from virgo.memory.entries import refuse

Local = Callable[[Batch, list[bytes]], Any]
Shape = Literal["one", "two", "many", "pairs", "rest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One command.

    Attributes:
        name: in capitals.
        local: does it, given a batch and the request.
        usage: its arguments; those in brackets may be left out.
        summary: one line.
        shape: which arguments are keys: the first; the first two; all; every other one; all but two.
        changes: whether it may change something: then it gets a batch that writes.
        creates: whether it may make a key, which needs a slot.
        lazy: although it may change something it gets a batch that reads, and writes when it has to.
        reads: although it changes something it also shows a value, so it needs that role too.
        simple: its text is a simple string on the wire.
        together: its keys have to lie on one node.
        aliases: further names.
    """

    name: str
    local: Local
    usage: str
    summary: str
    shape: Shape = "one"
    changes: bool = False
    lazy: bool = False
    creates: bool = False
    reads: bool = False
    simple: bool = False
    together: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def arguments_min(self) -> int:
        """Count of arguments outside of brackets."""
        return len(self.usage.partition("[")[0].split())

    @property
    def arguments_max(self) -> int | None:
        """The same, or None if there are brackets."""
        return None if "[" in self.usage else self.arguments_min

    def run(self, batch: Batch, request: list[bytes]) -> Any:
        """Do it on this node."""
        return self.local(batch.writing() if self.changes and not self.lazy else batch, request)

    def keys(self, request: list[bytes]) -> list[bytes]:
        """The keys of a request. Raises BadArgument if one lacks its value."""
        if self.shape == "one":
            return request[1:2]
        if self.shape == "two":
            return request[1:3]
        if self.shape == "many":
            return request[1:]
        if self.shape == "rest":
            return request[3:]
        if not len(request) % 2:
            raise refuse(f"{self.name} {self.usage}", f"{self.name} got a key without a value")
        return request[1::2]

    def shows(self, request: list[bytes]) -> bool:
        """Whether this request needs the role to read, besides the one to write."""
        return self.reads or (self.name == "SET" and any(word.upper() == b"GET" for word in request[3:]))


def _verb(name: str, local: Local, usage: str, summary: str, **more: Any) -> Verb:
    return Verb(name=name, local=local, usage=usage, summary=summary, **more)


def _create(name: str, local: Local, usage: str, summary: str, **more: Any) -> Verb:
    return _verb(name, local, usage, summary, changes=True, creates=True, **more)


def _change(name: str, local: Local, usage: str, summary: str, **more: Any) -> Verb:
    return _verb(name, local, usage, summary, changes=True, **more)


def _add(name: str, local: Local, usage: str, summary: str, **more: Any) -> Verb:
    return _create(name, local, usage, summary, reads=True, **more)


def _expire(name: str, unit: bytes) -> Verb:
    return _change(name, expiry.expire_in(unit), expiry.EXPIRE_USAGE, "Let a key expire; if past, delete it.")


GET = _verb("GET", strings.get, "key", "The value of a key, or nil.")
SET = _create("SET", strings.set_, strings.SET_USAGE, "Set a key.", simple=True)
_PAIRS, _KEYS = "key value [key value...]", "key [key...]"

VERBS = (
    GET,
    SET,
    _verb("STRLEN", strings.strlen, "key", "Bytes of a value."),
    _verb("GETRANGE", strings.getrange, "key start end", "Part of a value.", aliases=("SUBSTR",)),
    _verb("TYPE", generic.type_, "key", "`string`, or `none`.", simple=True),
    _verb("TTL", expiry.ttl, "key", "Seconds left; -1 for ever, -2 no such key."),
    _verb("PTTL", expiry.pttl, "key", "Milliseconds left, as TTL."),
    _verb("EXPIRETIME", expiry.expiretime, "key", "When it is over, in seconds since 1970."),
    _verb("PEXPIRETIME", expiry.pexpiretime, "key", "As EXPIRETIME, in milliseconds."),
    _verb("MGET", strings.mget, _KEYS, "The values of keys.", shape="many"),
    _verb("EXISTS", generic.exists, _KEYS, "How many exist.", shape="many"),
    _verb("TOUCH", generic.touch, _KEYS, "How many exist; sliding ones live on.", shape="many"),
    _change("DEL", generic.delete, _KEYS, "Delete keys.", shape="many", aliases=("UNLINK",)),
    _create("SETNX", strings.setnx, "key value", "Set a key if absent."),
    _create("SETEX", strings.setex, "key seconds value", "Set a key that expires.", simple=True),
    _create("PSETEX", strings.psetex, "key milliseconds value", "Set a key that expires.", simple=True),
    _create("MSET", strings.mset, _PAIRS, "Set keys.", shape="pairs", simple=True),
    _create("MSETNX", strings.msetnx, _PAIRS, "Set keys if none is there.", shape="pairs", together=True),
    _add("GETSET", strings.getset, "key value", "Set a key; answers its old value."),
    _change("GETDEL", strings.getdel, "key", "The value of a key, which is deleted.", reads=True),
    _change("GETEX", strings.getex, strings.GETEX_USAGE, "A value; its expiry is changed.", reads=True),
    _create("APPEND", strings.append, "key value", "Add to the end of a value."),
    _create("SETRANGE", strings.setrange, "key offset value", "Replace part of a value."),
    _add("INCR", strings.incr, "key", "Add 1 to a number."),
    _add("DECR", strings.decr, "key", "Take 1 from a number."),
    _add("INCRBY", strings.incrby, "key step", "Add to a number."),
    _add("DECRBY", strings.decrby, "key step", "Take from a number."),
    _add("INCRBYFLOAT", strings.incrbyfloat, "key step", "Add to a decimal number."),
    _expire("EXPIRE", b"EX"),
    _expire("PEXPIRE", b"PX"),
    _expire("EXPIREAT", b"EXAT"),
    _expire("PEXPIREAT", b"PXAT"),
    _change("PERSIST", expiry.persist, "key", "Let a key no longer expire."),
    _create("RENAME", generic.rename, "key new", "Give a value another key.", shape="two", simple=True),
    _create("RENAMENX", generic.renamenx, "key new", "As RENAME, if the new key is free.", shape="two"),
    _create("COPY", generic.copy, generic.COPY_USAGE, "Set a key to another's value.", shape="two"),
    _verb("MEMORY.READ", versioned.read, "key", "Value, version, ms left, and whether its time slides."),
    _create("MEMORY.WRITE", versioned.write, versioned.WRITE_USAGE, "Set a key; answers its version."),
    _add("MEMORY.FETCH", fills.fetch, fills.FETCH_USAGE, "A value, or the claim to make it.", lazy=True),
    _create("MEMORY.FILL", fills.fill, fills.FILL_USAGE, "Set a key that one has the claim to fill."),
    _change("MEMORY.RELEASE", fills.release, "key token", "Give up a claim to fill a key."),
)
BY_NAME = {verb.name: verb for verb in VERBS}
