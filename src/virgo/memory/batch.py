"""The batch of one chunk of requests: one LMDB transaction, made final by `close`.

A batch begins as a reader and becomes the writer with its first change; what it has changed it also sees.
Whoever decides by what it reads becomes the writer first (`writing`): other processes write too.
If a change fails for lack of room, the whole batch has failed: later changes and `close` raise the same
error, and reads go on from what was there before.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import lmdb

from virgo.errors import PoolFull, VirgoError
from virgo.limits import MEMORY_SLOTS
from virgo.memory import keyspace
from virgo.memory.core import Region
from virgo.memory.keyspace import Entry

if TYPE_CHECKING:
    from virgo.memory.store import Store

_U64 = struct.Struct(">Q")
_CHUNK = struct.Struct(">QQI")
_KEY_OVERHEAD_BYTES = 16  # LMDB's own, per entry of a page
_MEASURE_AFTER_BYTES = 256 * 1024
_VERSION_BITS = 20  # changes of one transaction that get versions of their own
_FLUSHED = b"*"  # in `gone`: when all keys were forgotten
_pack_id = _U64.pack


class Batch:
    """See the module. Ids are those of regions; stored keys are `keyspace.stored_key`."""

    __slots__ = (
        "_declared",
        "_failure",
        "_grown",
        "_id",
        "_room",
        "_serial",
        "_store",
        "_txn",
        "_version",
        "_writing",
    )

    def __init__(self, store: Store) -> None:
        self._store = store
        self._txn: Any = None
        self._writing = False
        self._failure: VirgoError | None = None
        self._room = 0
        self._grown = 0  # by keys, not counting what they replace
        self._serial = 0
        self._declared = 0
        self._id = 0  # of the transaction that writes
        self._version = 0  # the last one given

    def __repr__(self) -> str:
        kind = "failed" if self._failure else "writing" if self._writing else "reading"
        return f"<Batch {kind}>"

    # --- life ---------------------------------------------------------------------------------

    def _read(self) -> Any:
        txn = self._txn
        if txn is None:
            txn = self._txn = self._store.env.begin()
        return txn

    def _write(self) -> Any:
        if self._writing:
            return self._txn
        if self._failure is not None:
            raise self._failure
        store = self._store
        self._txn = None
        try:
            store.free_dead_readers()
            self._txn = store.env.begin(write=True)
        except lmdb.Error as error:
            self._failure = store.fault(error)
            raise self._failure from error
        self._writing = True
        self._id = self._txn.id()
        self._version = self._id << _VERSION_BITS
        if self._id != store.last_id + 1:
            store.catch_up(self._txn)
        elif store.keys_grown_bytes > _MEASURE_AFTER_BYTES:
            store.measure_keys(self._txn)
        self._serial, self._declared = store.serial, store.declared_bytes
        self._room = store.capacity_bytes - self._declared - store.keys_size_bytes - store.keys_grown_bytes
        self._grown = 0
        return self._txn

    def writing(self) -> Batch:
        """This batch as the writer: what it reads from now on nobody else changes until it is closed."""
        if not self._writing:
            self._write()
        return self

    def _measure(self) -> None:
        """Know the room exactly; in between it is estimated from below, which costs nothing."""
        self._store.measure_keys(self._txn)
        self._grown = 0
        self._room = self._store.capacity_bytes - self._declared - self._store.keys_size_bytes

    def _fail(self, error: lmdb.Error) -> VirgoError:
        failure = self._store.fault(error)
        self.abort()
        self._failure = failure
        return failure

    def close(self) -> None:
        """Make the changes final. Raises PoolFull, DiskFull or FileRefused: then none took place."""
        if self._failure is not None:
            raise self._failure
        txn, self._txn = self._txn, None
        if not self._writing:
            return
        self._writing = False
        store = self._store
        try:
            if self._serial != store.serial or self._declared != store.declared_bytes:
                txn.put(b"state", store.state(self._serial, self._declared))
            txn.commit()
        except lmdb.Error as error:
            txn.abort()
            self._failure = store.fault(error)
            raise self._failure from error
        store.serial, store.declared_bytes, store.last_id = self._serial, self._declared, self._id
        store.keys_grown_bytes += self._grown
        if store.pressed:
            store.age()

    def abort(self) -> None:
        """Drop the changes."""
        txn, self._txn = self._txn, None
        if self._writing:
            self._writing = False
            self._store.keys_grown_bytes = _MEASURE_AFTER_BYTES + 1  # it may have been measured with these
            txn.abort()

    def _put(self, database: Any, key: bytes, value: bytes) -> None:
        try:
            self._write().put(key, value, db=database)
        except lmdb.Error as error:
            raise self._fail(error) from error

    def _delete(self, database: Any, key: bytes) -> bool:
        try:
            return bool(self._write().delete(key, db=database))
        except lmdb.Error as error:
            raise self._fail(error) from error

    # --- room and serials -----------------------------------------------------------------------

    def room_bytes(self) -> int:
        """What may still be declared or kept as keys."""
        self._write()
        self._measure()
        return self._room

    def declare(self, change_bytes: int) -> None:
        """Reserve room, or give it back. Raises PoolFull."""
        self._write()
        if change_bytes > max(0, self._room):
            self._measure()
        if change_bytes > max(0, self._room):
            raise PoolFull(f"{change_bytes} bytes are asked for, {max(0, self._room)} are free on this node")
        self._declared += change_bytes
        self._room -= change_bytes

    def next_serial(self) -> int:
        """A number that this store has never given before."""
        self._write()
        serial = self._serial + 1
        self._store.raise_ceiling(serial)
        self._serial = serial
        return serial

    # --- regions ------------------------------------------------------------------------------

    def data(self, identifier: int) -> bytes | None:
        """The value of a plain region, None if there is none (unknown, never set, or spread)."""
        found: bytes | None = self._read().get(_pack_id(identifier), None, self._store.data)
        return found

    def region(self, identifier: int) -> Region | None:
        """The region, None if it is unknown."""
        record = self._read().get(_pack_id(identifier), None, self._store.regions)
        return None if record is None else Region.decode(record)

    def put_region(self, identifier: int, region: Region) -> None:
        """Keep the region; a plain one's size has to be declared."""
        self._put(self._store.regions, _pack_id(identifier), region.encode())

    def put_data(self, identifier: int, value: bytes) -> None:
        """Set the value of a plain region."""
        self._put(self._store.data, _pack_id(identifier), value)

    def delete_region(self, identifier: int, region: Region) -> None:
        """Forget the region and its value."""
        key = _pack_id(identifier)
        self._delete(self._store.regions, key)
        if not region.spread:
            self._delete(self._store.data, key)
            self.declare(-region.size)

    # --- chunks of spread regions, whose home may be another node -----------------------------

    def reserved(self, identifier: int) -> int:
        """Bytes reserved here for chunks of a region."""
        record = self._read().get(_pack_id(identifier), None, self._store.reserved)
        return _U64.unpack(record)[0] if record else 0

    def reserve(self, identifier: int, total_bytes: int) -> None:
        """Reserve that much for chunks of a region; with 0 its chunks go too. Raises PoolFull."""
        before = self.reserved(identifier)
        if total_bytes == before:
            return
        self.declare(total_bytes - before)
        key = _pack_id(identifier)
        if total_bytes:
            self._put(self._store.reserved, key, _U64.pack(total_bytes))
        else:
            self._delete(self._store.reserved, key)
            for version in {version for _, version in self.chunk_versions(identifier)}:
                self.drop_chunks(identifier, version)

    def chunk(self, identifier: int, version: int, index: int) -> bytes | None:
        """One chunk."""
        found: bytes | None = self._read().get(
            _CHUNK.pack(identifier, version, index), None, self._store.chunks
        )
        return found

    def put_chunk(self, identifier: int, version: int, index: int, data: bytes) -> None:
        """Keep one chunk."""
        self._put(self._store.chunks, _CHUNK.pack(identifier, version, index), data)

    def drop_chunks(self, identifier: int, version: int) -> int:
        """Forget all chunks of one version; returns how many there were."""
        prefix, keys = _CHUNK.pack(identifier, version, 0), []
        for key in self._keys_from(self._store.chunks, prefix):
            if key[:16] != prefix[:16]:
                break
            keys.append(key)
        for key in keys:
            self._delete(self._store.chunks, key)
        return len(keys)

    def chunk_versions(self, identifier: int | None = None) -> Iterator[tuple[int, int]]:
        """(region, version) of the chunks here, of one region or of all."""
        key = _CHUNK.pack(identifier or 0, 0, 0)
        cursor = self._read().cursor(self._store.chunks)
        while cursor.set_range(key):
            region, version, _ = _CHUNK.unpack(cursor.key())
            if identifier is not None and region != identifier:
                return
            yield region, version
            key = _CHUNK.pack(region, version, 2**32 - 1)

    def reservations(self) -> Iterator[tuple[int, int]]:
        """(region, bytes) of all reservations here."""
        for key, value in self._read().cursor(self._store.reserved):
            yield _U64.unpack(key)[0], _U64.unpack(value)[0]

    def _keys_from(self, database: Any, key: bytes) -> Iterator[bytes]:
        cursor = self._read().cursor(database)
        if cursor.set_range(key):
            yield from cursor.iternext(keys=True, values=False)

    # --- keys ---------------------------------------------------------------------------------

    def count_get(self, hit: bool) -> None:
        """Take note of a hit or a miss."""
        if hit:
            self._store.hits += 1
        else:
            self._store.misses += 1

    def key(self, stored: bytes) -> bytes | None:
        """A key's record, past its time or not."""
        txn = self._txn
        if txn is None:
            txn = self._txn = self._store.env.begin()
        found: bytes | None = txn.get(stored, None, self._store.keys)
        return found

    def put_plain(self, stored: bytes, value: bytes) -> None:
        """Keep a value that does not expire. Raises PoolFull."""
        if not self._writing:
            self._write()
        self._version += 1
        self._keep(stored, keyspace.encode_plain(value, self._version))

    def put_entry(self, stored: bytes, entry: Entry) -> int:
        """Keep an entry, whose version is given here and returned. Raises PoolFull."""
        if not self._writing:
            self._write()
        self._version += 1
        self._keep(stored, keyspace.encode_entry(entry, self._version))
        if entry.expires_ms:
            self._put(self._store.due, _U64.pack(entry.expires_ms) + stored, b"")
        return self._version

    def _keep(self, stored: bytes, record: bytes) -> None:
        growth = len(stored) + len(record) + _KEY_OVERHEAD_BYTES
        if growth > self._room:
            self._measure()
            old = self.key(stored)
            more = growth - (len(stored) + len(old) + _KEY_OVERHEAD_BYTES if old is not None else 0)
            if more > max(0, self._room):
                raise PoolFull(f"a key of {len(record)} bytes is set, {max(0, self._room)} are free here")
        try:
            self._txn.put(stored, record, True, True, False, self._store.keys)
        except lmdb.Error as error:
            raise self._fail(error) from error
        self._room -= growth
        self._grown += growth

    def delete_key(self, stored: bytes) -> bool:
        """Forget a key; False if there was none."""
        if not self._delete(self._store.keys, stored):
            return False
        self._version += 1
        self._put(self._store.gone, stored[:2], _U64.pack(self._version))
        return True

    def gone(self, stored: bytes) -> int:
        """The version as of which a key of the slot, or all keys, were last forgotten here; 0 for never."""
        get, database = self._read().get, self._store.gone
        found = (get(stored[:2], None, database), get(_FLUSHED, None, database))
        return max(_U64.unpack(version)[0] if version else 0 for version in found)

    def scan(
        self, slot: int, count: int, matches: Callable[[bytes], object] | None
    ) -> tuple[int, list[bytes]]:
        """Keys of whole slots from `slot` on, until there are `count`; and the slot to go on from.

        Expired keys that have not been removed yet are among them, as in Redis.
        """
        found: list[bytes] = []
        current = slot
        for seen, stored in enumerate(self._keys_from(self._store.keys, keyspace.SLOT_PREFIXES[slot])):
            here = stored[0] << 8 | stored[1]
            if here != current:
                if seen >= count:
                    return here, found
                current = here
            if matches is None or matches(stored[2:]):
                found.append(stored[2:])
        return MEMORY_SLOTS, found

    def count_keys(self) -> int:
        """How many keys there are, those included that are past their time but not yet removed."""
        return int(self._read().stat(self._store.keys)["entries"])

    def flush_keys(self) -> None:
        """Forget all keys."""
        try:
            txn = self._write()
            txn.drop(self._store.keys, delete=False)
            txn.drop(self._store.due, delete=False)
            self._version += 1
            txn.put(_FLUSHED, _U64.pack(self._version), db=self._store.gone)
        except lmdb.Error as error:
            raise self._fail(error) from error

    def expire_keys(self, now_ms: int, count: int) -> int:
        """Remove up to `count` keys whose time has passed; returns how many were looked at."""
        due: list[bytes] = []
        for entry in self._keys_from(self._store.due, b"\0"):
            if len(due) >= count or _U64.unpack_from(entry)[0] > now_ms:
                break
            due.append(entry)
        if due:
            self.writing()  # lest a key be removed that another process sets anew meanwhile
        for entry in due:
            stored = entry[8:]
            record = self.key(stored)
            # A key that was set anew has another expiry, or none.
            if record and keyspace.decode_entry(record).expires_ms == _U64.unpack_from(entry)[0]:
                self.delete_key(stored)
            self._delete(self._store.due, entry)
        return len(due)
