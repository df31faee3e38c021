"""What is read in one transaction of a store; a `Batch` is one that also writes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from virgo.limits import MEMORY_SLOTS_ALL
from virgo.memory import keyspace, spaces
from virgo.memory.core import Region
from virgo.memory.keyspace import NOWHERE, Entry
from virgo.memory.spaces import Space

if TYPE_CHECKING:
    from virgo.memory.tables import Tables

_U64 = struct.Struct(">Q")
FLUSHED = b"*"  # in `gone`: when all keys were forgotten
_pack_id = _U64.pack


class Snapshot:
    """Reads go on from what was there when the first one was made. Ids are those of regions."""

    __slots__ = ("_state", "_tables", "_txn")

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._txn: Any = None
        self._state = tables.state

    def _read(self) -> Any:
        txn = self._txn
        if txn is None:
            txn = self._txn = self._tables.env.begin()
        return txn

    def _keys_from(self, database: Any, key: bytes) -> Iterator[bytes]:
        cursor = self._read().cursor(database)
        if cursor.set_range(key):
            yield from cursor.iternext(keys=True, values=False)

    def data(self, identifier: int) -> bytes | None:
        """The value of a plain region, None if there is none (unknown, never set, or spread)."""
        found: bytes | None = self._read().get(_pack_id(identifier), None, self._tables.data)
        return found

    def key(self, stored: bytes) -> bytes | None:
        """A key's record, past its time or not."""
        txn = self._txn
        if txn is None:
            txn = self._txn = self._tables.env.begin()
        found: bytes | None = txn.get(stored, None, self._tables.keys)
        return found

    def space(self, name: bytes) -> Space | None:
        """The namespace of that name."""
        record = self._read().get(name, None, self._tables.spaces) if name else None
        return None if record is None else Space.decode(record)

    def counts(self, stored: bytes, entry: Entry) -> bool:
        """Whether a key is there that has a generation."""
        if entry.generation <= 0:
            return True
        space = self.space(spaces.name_of(stored))
        return space is None or space.counts(entry.generation)

    def generation(self, stored: bytes) -> int:
        """What is kept with a key that is set now."""
        space = self.space(spaces.name_of(stored))
        if space is not None:
            return space.generation
        return 0 if self._state.evicts else NOWHERE

    def claim(self, stored: bytes) -> bytes | None:
        """The record of a claim to fill a key."""
        found: bytes | None = self._read().get(stored, None, self._tables.claims)
        return found

    def region(self, identifier: int) -> Region | None:
        """The region, None if it is unknown."""
        record = self._read().get(_pack_id(identifier), None, self._tables.regions)
        return None if record is None else Region.decode(record)

    def gone(self, stored: bytes) -> int:
        """The version as of which a key of the slot, or all keys, were last forgotten here; 0 for never."""
        get, database = self._read().get, self._tables.gone
        found = (get(stored[:2], None, database), get(FLUSHED, None, database))
        return max(_U64.unpack(version)[0] if version else 0 for version in found)

    def key_from(self, position: bytes) -> bytes | None:
        """The first stored key from there on."""
        cursor = self._read().cursor(self._tables.keys)
        return cursor.key() if cursor.set_range(position) else None

    def with_prefix(self, prefix: bytes, slot: int = 0) -> Iterator[bytes]:
        """Stored keys from `slot` on that begin with the prefix. Others are leapt over, not looked at."""
        cursor = self._read().cursor(self._tables.keys)
        position = keyspace.SLOT_PREFIXES[slot] + prefix
        while cursor.set_range(position):
            stored: bytes = cursor.key()
            here = stored[:2] + prefix
            while stored.startswith(here):
                yield stored
                if not cursor.next():
                    return
                stored = cursor.key()
            position = stored[:2] + prefix
            if stored >= position and not stored.startswith(position):
                slot = (stored[0] << 8 | stored[1]) + 1
                if slot >= MEMORY_SLOTS_ALL:
                    return
                position = keyspace.SLOT_PREFIXES[slot] + prefix

    def scan(
        self, slot: int, count: int, matches: Callable[[bytes], object] | None, prefix: bytes = b""
    ) -> tuple[int, list[bytes]]:
        """Keys of whole slots from `slot` on, until there are `count`; and the slot to go on from.

        Expired keys that have not been removed yet are among them, as in Redis.
        """
        found: list[bytes] = []
        current = slot
        for seen, stored in enumerate(self.with_prefix(prefix, slot)):
            here = stored[0] << 8 | stored[1]
            if here != current:
                if seen >= count:
                    return here, found
                current = here
            if matches is None or matches(stored[2:]):
                found.append(stored[2:])
        return MEMORY_SLOTS_ALL, found

    def count_keys(self) -> int:
        """How many keys there are, those included that are past their time but not yet removed."""
        return int(self._read().stat(self._tables.keys)["entries"])
