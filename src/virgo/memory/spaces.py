"""Namespaces: the keys that begin with the same name and a colon, as `sessions:42` does.

A declared namespace has a generation, which is kept with each of its keys. To drop it is to give it the next
one: keys of earlier generations are as good as gone at once, whatever their number, and are removed in the
background. A namespace may be a cache: its keys are evicted when room is needed, the least used ones first.

Decisions and records, without I/O. Kept in the engine is one table with all namespaces; each node keeps of
it, by name, what `Space.encode` gives, with what it has yet to do itself.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from virgo.errors import BadArgument, Busy
from virgo.limits import MEMORY_SPACE_NAME_BYTES_MAX, MEMORY_SPACES_MAX
from virgo.memory.keeping import OPENING, PLAIN, keep_of
from virgo.memory.keyspace import NOWHERE

SEPARATOR = b":"
_RECORD = struct.Struct("<I???")


class Space(NamedTuple):
    """A namespace as one node knows it.

    Attributes:
        generation: of the keys that count; from 1 on.
        cache: whether its keys may be evicted.
        mixed: whether keys may be here that were set before it was declared, and have no generation.
        unswept: whether keys of earlier generations may be here.
    """

    generation: int
    cache: bool = False
    mixed: bool = False
    unswept: bool = False

    def encode(self) -> bytes:
        """The record."""
        return _RECORD.pack(*self)

    @classmethod
    def decode(cls, record: bytes) -> Space:
        """The namespace of a record."""
        return cls(*_RECORD.unpack(record))

    def counts(self, generation: int) -> bool:
        """Whether a key of that generation is there. Those without one are, until they are removed."""
        return generation in (self.generation, 0, NOWHERE)


class Declared(msgspec.Struct, frozen=True, array_like=True):
    """A namespace in the table that all nodes share."""

    generation: int = 1
    cache: bool = False


Table = dict[bytes, Declared]


def name_of(stored: bytes) -> bytes:
    """The name of the namespace that a stored key would be in, b"" for none."""
    end = stored.find(SEPARATOR, 2)
    return stored[2:end] if end > 2 else b""


def check_name(name: bytes) -> None:
    """Raise BadArgument unless a namespace may be called so."""
    mark = keep_of(name).mark
    inside = OPENING in name[len(mark) :]
    if name == mark or SEPARATOR in name or len(name) > MEMORY_SPACE_NAME_BYTES_MAX or inside:
        raise BadArgument(
            f"a namespace cannot be called {name[:40]!r}",
            hint=f"1 to {MEMORY_SPACE_NAME_BYTES_MAX} bytes without a colon; a mark, if any, is in front.",
        )


def decode_table(data: bytes) -> Table:
    """The table of the register's bytes."""
    return msgspec.msgpack.decode(data, type=Table) if data else {}


def encode_table(table: Mapping[bytes, Declared]) -> bytes:
    """The register's bytes."""
    return msgspec.msgpack.encode(table)


def declare(table: Mapping[bytes, Declared], name: bytes, cache: bool | None) -> Table:
    """The table with that namespace; `cache` None leaves it as it is. Raises BadArgument, Busy."""
    if cache and keep_of(name) is not PLAIN:
        raise BadArgument(
            "what is kept on disk or on two nodes is no cache", hint="Leave out cache, or copies and durable."
        )
    if name not in table and len(table) >= MEMORY_SPACES_MAX:
        raise Busy(
            f"this cloud has {len(table)} namespaces already, as many as it may",
            hint="Use fewer, and let the key say the rest: `users:42:cart`.",
        )
    old = table.get(name, Declared())
    return {**table, name: old if cache is None else msgspec.structs.replace(old, cache=cache)}


def drop(table: Mapping[bytes, Declared], name: bytes) -> Table:
    """The table in which all present keys of that namespace no longer count."""
    made = declare(table, name, None)
    old = made[name]
    return {**made, name: msgspec.structs.replace(old, generation=old.generation % (2**32 - 1) + 1)}


def learn(old: Space | None, new: Declared, *, has_keys: bool) -> Space:
    """What a node knows of a namespace once it has heard of `new`; `has_keys` of one it did not know."""
    if old is None:
        return Space(new.generation, new.cache, mixed=has_keys, unswept=has_keys and new.generation > 1)
    dropped = new.generation != old.generation
    return Space(new.generation, new.cache, old.mixed, old.unswept or dropped)
