"""Regions that are kept more safely than others: on disk before the answer, or on two nodes; see `keeping`.

Such a region is a key that is kept so, which listings do not show and FLUSHDB leaves alone. Its id names no
node, for it may move: in place of a node's number there is 0, then how it is kept, then the number of the
node that gave the id, and a serial of its own. Its declared size is the mark beside its value.

Functions as in `strings`, and `KeptRegions`, which serves them from any node. Room is not reserved: a set may
find the pool full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from virgo.errors import BadArgument, PoolFull, TooLarge, UnknownId
from virgo.limits import MEMORY_KEPT_REGION_BYTES_MAX
from virgo.members import SERIAL_BITS
from virgo.memory.batch import Batch
from virgo.memory.core import Region, changed, check_part
from virgo.memory.entries import live, number
from virgo.memory.keeping import REGION, Keep, is_region
from virgo.memory.keys import Keys
from virgo.memory.keyspace import Entry, stored_key
from virgo.memory.store import Store
from virgo.memory.verbs import Verb
from virgo.module import NodeServices
from virgo.wire.commands import Command
from virgo.wire.resp import OK, Encoded

_SERIAL_BITS: Final = 31
_KEEP_BIT: Final = SERIAL_BITS - 2


def compose(keep: Keep, node: int, serial: int) -> int:
    """The id of a kept region. Raises PoolFull after the last serial of a node."""
    if serial >= 1 << _SERIAL_BITS:
        raise PoolFull(f"node {node} has given all of its {1 << _SERIAL_BITS} ids of kept regions")
    kind = (keep.copies == 2) << 1 | keep.durable
    return kind << _KEEP_BIT | node << _SERIAL_BITS | serial


def is_kept(identifier: int) -> bool:
    """Whether an id is one of a kept region."""
    return 1 << _KEEP_BIT <= identifier < 1 << SERIAL_BITS


def key_of(identifier: int) -> bytes:
    """The key under which it is."""
    kind = identifier >> _KEEP_BIT
    return Keep(2 if kind & 2 else 1, bool(kind & 1)).mark + REGION + b"%d" % identifier


def check_size(size: int) -> None:
    """Raise TooLarge if a kept region may not have that size."""
    if size > MEMORY_KEPT_REGION_BYTES_MAX:
        raise TooLarge(
            f"a region of {size} bytes exceeds the {MEMORY_KEPT_REGION_BYTES_MAX} of one that is kept",
            hint="Use several, or one with a single copy that is not durable.",
        )


# --- where the key is -------------------------------------------------------------------------


def _entry(batch: Batch, key: bytes) -> Entry:
    identifier = _identifier(key)
    entry = live(batch, stored_key(key))
    if entry is None:
        raise UnknownId(f"no region has the id {identifier} ({identifier:#x})")
    return entry


def _identifier(key: bytes) -> int:
    if not is_region(key):
        raise BadArgument(f"{key[:40]!r} is no region's key", hint="It is for nodes, not for people.")
    return number(key.rpartition(b":")[2], "the id", low=1)


def make(batch: Batch, request: list[bytes]) -> int:
    """MEMORY.KEPT.MAKE key size."""
    _identifier(request[1])
    batch.put_entry(stored_key(request[1]), Entry(b"", mark=number(request[2], "the size", low=1)))
    return 1


def set_(batch: Batch, request: list[bytes]) -> int:
    """MEMORY.KEPT.SET key data [offset]: all of it, or a part, a gap before which is zeros."""
    entry, identifier = _entry(batch, request[1]), _identifier(request[1])
    offset = number(request[3], "the offset") if len(request) > 3 else None
    value = changed(identifier, Region(entry.mark), lambda: entry.value, request[2], offset)
    if value is not None:
        batch.put_entry(stored_key(request[1]), entry._replace(value=value))
    return 1


def get(batch: Batch, request: list[bytes]) -> bytes:
    """MEMORY.KEPT.GET key [offset [size]]."""
    entry = _entry(batch, request[1])
    offset, *count = (number(word, "the part") for word in request[2:] or [b"0"])
    check_part(offset, count[0] if count else None, entry.mark, _identifier(request[1]))
    return entry.value[offset : offset + count[0] if count else None]


def info(batch: Batch, request: list[bytes]) -> list[int]:
    """MEMORY.KEPT.INFO key: declared size and length."""
    entry = _entry(batch, request[1])
    return [entry.mark, len(entry.value)]


def free(batch: Batch, request: list[bytes]) -> int:
    """MEMORY.KEPT.FREE key."""
    _entry(batch, request[1])
    batch.delete_key(stored_key(request[1]))
    return 1


def _verb(name: str, local: Callable[[Batch, list[bytes]], Any], usage: str, **more: Any) -> Verb:
    return Verb(name=f"MEMORY.KEPT.{name}", local=local, usage=usage, summary="Between nodes.", **more)


MAKE = _verb("MAKE", make, "key size", changes=True, creates=True)
SET = _verb("SET", set_, "key data [offset]", changes=True)
GET = _verb("GET", get, "key [offset [size]]")
INFO = _verb("INFO", info, "key")
FREE = _verb("FREE", free, "key", changes=True)
VERBS = (MAKE, SET, GET, INFO, FREE)


class KeptRegions:
    """The four calls for kept regions, from one node."""

    def __init__(self, node: NodeServices, store: Store, keys: Keys) -> None:
        self._node = node
        self._store = store
        self._keys = keys

    def __repr__(self) -> str:
        return f"<KeptRegions of node {self._node.number}>"

    def commands(self) -> list[Command]:
        """What is served to other nodes."""
        return self._keys.between(VERBS)

    async def _run(self, verb: Verb, identifier: int, *words: bytes | int) -> Any:
        key = key_of(identifier)
        [number] = await self._keys.locate([key], assigns=verb.creates)
        rest = [word if isinstance(word, bytes) else b"%d" % word for word in words]
        return await self._keys.at(number, verb, [verb.name.encode(), key, *rest])

    async def malloc(self, size: int, keep: Keep) -> int:
        """A new region; answers its id."""
        check_size(size)
        with self._store.batching() as batch:
            identifier = compose(keep, self._node.number, batch.next_serial())
        await self._run(MAKE, identifier, size)
        return identifier

    async def set(self, identifier: int, data: bytes, at: list[int]) -> Encoded:
        """Replace the value, or write over a part of it."""
        await self._run(SET, identifier, data, *at)
        return OK

    async def get(self, identifier: int, at: list[int]) -> bytes:
        """The value, or a part of it."""
        found: bytes = await self._run(GET, identifier, *at)
        return found

    async def free(self, identifier: int) -> Encoded:
        """Forget it."""
        await self._run(FREE, identifier)
        return OK

    async def segment(self, identifier: int) -> None:
        """None, for it is not shared. Raises UnknownId."""
        await self._run(INFO, identifier)

    async def describe(self, identifier: int) -> bytes:
        """Its figures as JSON; its node is the one that owns it now."""
        size, length = await self._run(INFO, identifier)
        owner, mirror = self._keys.holders(key_of(identifier))
        names = {member.number: member.name for member in self._node.known()}
        figures = {"id": identifier, "size": size, "length": length, "node": names.get(owner, "")}
        return msgspec.json.encode({**figures, "nodes": [mirror] if mirror else [], "shared": False})
