"""What only the owner of a store does in a batch: serials, room, regions and chunks, namespaces."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import TYPE_CHECKING

from virgo.errors import PoolFull
from virgo.limits import MEMORY_EVICT_BYTES_MIN, MEMORY_EVICT_SHARE, MEMORY_SLOTS_ALL
from virgo.memory import eviction, keyspace
from virgo.memory.batch import Batch
from virgo.memory.core import Region
from virgo.memory.fills import Claim
from virgo.memory.keeping import OPENING, REGION, is_region, marks
from virgo.memory.keyspace import NOWHERE
from virgo.memory.segments import total_bytes
from virgo.memory.spaces import SEPARATOR, Declared, Space, learn, name_of

if TYPE_CHECKING:
    from virgo.memory.store import Store

_U64 = struct.Struct(">Q")
_CHUNK = struct.Struct(">QQI")
_pack_id = _U64.pack


class OwnerBatch(Batch):
    """A batch of the node. Ids are those of regions."""

    __slots__ = ("_emptied", "_store", "_touched")

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._store = store
        self._touched: set[bytes] = set()  # keys that are kept elsewhere too
        self._emptied = False  # whether all keys were forgotten before that

    def close(self) -> Awaitable[None] | None:
        """See `Batch.close`."""
        super().close()
        if not (self._touched or self._emptied):
            return None
        copies = self._store.copies
        regions = {stored for stored in self._touched if is_region(stored[2:])}
        self._store.kept_regions -= regions
        self._store.kept_regions |= {stored for stored in regions if self.key(stored) is not None}
        for slot in {stored[0] << 8 | stored[1] for stored in self._touched} & copies.keys():
            copies[slot] = len(self.in_slot(slot))
        self._txn = None
        return self._store.keeper.note(self._touched, emptied=self._emptied)

    def _touch(self, stored: bytes) -> None:
        self._touched.add(stored)

    def flush_keys(self) -> None:
        """Forget all keys; what is a region stays."""
        regions = [
            (stored, self.key(stored) or b"")
            for mark in marks()
            for stored in self.with_prefix(mark + REGION)
        ]
        super().flush_keys()
        self._touched.clear()
        self._emptied = True
        copies = self._store.copies
        copies.update(dict.fromkeys(copies, 0))
        for stored, record in regions:
            self.put_record(stored, record, 0)

    # --- second copies --------------------------------------------------------------------------

    def held(self, slot: int) -> bool:
        """Whether this node owns a slot of keys that are kept twice."""
        return self._read().get(keyspace.SLOT_PREFIXES[slot], None, self._tables.held) is not None

    def hold(self, slot: int, held: bool) -> None:
        """Own such a slot, or own it no longer."""
        if held:
            self._put(self._tables.held, keyspace.SLOT_PREFIXES[slot], b"")
        else:
            self._delete(self._tables.held, keyspace.SLOT_PREFIXES[slot])

    def held_slots(self) -> set[int]:
        """All that it owns."""
        return {prefix[0] << 8 | prefix[1] for prefix in self._keys_from(self._tables.held, b"\0")}

    def in_slot(self, slot: int) -> list[bytes]:
        """The stored keys of one slot."""
        found = []
        for stored in self.with_prefix(b"", slot):
            if stored[0] << 8 | stored[1] != slot:
                break
            found.append(stored)
        return found

    def count_keys(self) -> int:
        """Keys that count here: without the second copies of others', and without regions."""
        copies = self._store.copies
        regions = sum(1 for stored in self._store.kept_regions if (stored[0] << 8 | stored[1]) not in copies)
        return super().count_keys() - sum(copies.values()) - regions

    def find_kept_regions(self) -> set[bytes]:
        """The stored keys of all kept regions that are here."""
        return {stored for mark in marks() for stored in self.with_prefix(mark + REGION)}

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
        if change_bytes > max(0, self._room) and not self._evict(change_bytes):
            raise PoolFull(f"{change_bytes} bytes are asked for, {max(0, self._room)} are free on this node")
        self._state = self._state._replace(declared_bytes=self._state.declared_bytes + change_bytes)
        self._room -= change_bytes

    def next_serial(self) -> int:
        """A number that this store has never given before."""
        self._write()
        serial = self._state.serial + 1
        self._store.raise_ceiling(serial)
        self._state = self._state._replace(serial=serial)
        return serial

    def _evict(self, need_bytes: int, keep: bytes = b"") -> bool:
        prefixes = self._prefixes()
        spare = max(MEMORY_EVICT_BYTES_MIN, int(self._state.capacity_bytes * MEMORY_EVICT_SHARE))
        while prefixes and self._room < need_bytes + spare:
            lacking = need_bytes + spare - max(0, self._room)
            gained = self._store.evictor.make_room(self, prefixes, lacking, keep)
            self._measure()  # pages are what counts, and one that is half empty is still there
            if not gained:
                break
        return self._room >= need_bytes

    def evictable_bytes(self) -> int:
        """About how much could be made free."""
        prefixes = self._prefixes()
        return int(eviction.share(self, prefixes) * self._tables.keys_bytes()) if prefixes else 0

    def _prefixes(self) -> list[bytes]:
        """Of the keys that may be evicted."""
        caches = [name for name, space in self.spaces() if space.cache] if self._state.spaces else []
        return eviction.prefixes(caches, evicts=self._state.evicts)

    # --- namespaces ------------------------------------------------------------------------

    def spaces(self) -> list[tuple[bytes, Space]]:
        """All namespaces by name."""
        cursor = self._read().cursor(self._tables.spaces)
        return [(name, Space.decode(record)) for name, record in cursor]

    def learn(self, name: bytes, new: Declared) -> Space:
        """Hear of a namespace as it is now."""
        self._write()
        old = self.space(name)
        has_keys = old is None and any(True for _ in self.with_prefix(name + SEPARATOR))
        known = learn(old, new, has_keys=has_keys)
        if known != old:
            self.put_space(name, known)
        return known

    def put_space(self, name: bytes, space: Space) -> None:
        """Keep what is known of a namespace."""
        self._put(self._tables.spaces, name, space.encode())
        count = self._txn.stat(self._tables.spaces)["entries"]
        if count != self._state.spaces:
            self._state = self._state._replace(spaces=count)
            self._sorts = True

    def sweep(self, name: bytes, slot: int, count: int) -> tuple[int, int]:
        """Remove keys of a namespace that do not count any more, those without a generation among them.

        Args:
            name: of the namespace.
            slot: where to begin.
            count: how many keys to look at; then the slot is finished.

        Returns:
            The slot to go on from, past the last one at the end; and how many keys were removed.
        """
        space = self.writing().space(name)
        if space is None:
            return MEMORY_SLOTS_ALL, 0
        slot, dead = self._generations(name, slot, count, lambda found: found != space.generation)
        for stored, _ in dead:
            self.delete_key(stored)
        return slot, len(dead)

    def measure(self, name: bytes, generation: int, slot: int, count: int) -> tuple[int, int, int]:
        """Where to go on, count and bytes of keys of a namespace that count; otherwise as `sweep`."""
        slot, found = self._generations(name, slot, count, lambda found: found in (generation, 0, NOWHERE))
        copies = self._store.copies  # which count where their owner is
        found = [each for each in found if (each[0][0] << 8 | each[0][1]) not in copies]
        return slot, len(found), sum(len(stored) + size for stored, size in found)

    def drop_claims(self, now_ms: int, count: int) -> int:
        """Forget up to `count` claims that are over; returns how many there were."""
        over = []
        for stored, record in self._read().cursor(self._tables.claims):
            if Claim.decode(record).until_ms <= now_ms:
                over.append(stored)
            if len(over) >= count:
                break
        for stored in over:
            self.drop_claim(stored)
        return len(over)

    def _generations(
        self, name: bytes, slot: int, count: int, wanted: Callable[[int], bool]
    ) -> tuple[int, list[tuple[bytes, int]]]:
        """Stored keys of a namespace whose generation is wanted, with the length of their records."""
        slot, keys = super().scan(slot, count, None, name + SEPARATOR)
        found = []
        for key in keys:
            stored = keyspace.stored_key(key)
            record = self.key(stored)
            if record is not None and wanted(keyspace.decode_entry(record).generation):
                found.append((stored, len(record)))
        return slot, found

    def scan(
        self, slot: int, count: int, matches: Callable[[bytes], object] | None, prefix: bytes = b""
    ) -> tuple[int, list[bytes]]:
        """As any batch does, without the keys of dropped namespaces, and second copies of others' keys."""
        slot, keys = super().scan(slot, count, matches, prefix)
        keys = [key for key in keys if not (key.startswith(OPENING) and is_region(key))]
        unswept, copies = self._store.unswept, self._store.copies
        if copies:
            keys = [key for key in keys if keyspace.slot_of(key) not in copies]
        return slot, [key for key in keys if self._seen(key, unswept)] if unswept else keys

    def _seen(self, key: bytes, unswept: set[bytes]) -> bool:
        stored = keyspace.stored_key(key)
        if name_of(stored) not in unswept:
            return True
        record = self.key(stored)
        return record is not None and self.counts(stored, keyspace.decode_entry(record))

    # --- regions ---------------------------------------------------------------------------

    def put_region(self, identifier: int, region: Region) -> None:
        """Keep the region; a plain one's size has to be declared."""
        self._put(self._tables.regions, _pack_id(identifier), region.encode())

    def delete_region(self, identifier: int, region: Region) -> None:
        """Forget the region and its value."""
        key = _pack_id(identifier)
        self._delete(self._tables.regions, key)
        if region.shared:
            self.declare(-total_bytes(region.size))
        elif not region.spread:
            self._delete(self._tables.data, key)
            self.declare(-region.size)

    def shared_regions(self) -> Iterator[tuple[int, Region]]:
        """All shared regions, by a look at every region."""
        for key, record in self._read().cursor(self._tables.regions):
            if Region.is_shared(record):
                yield _U64.unpack(key)[0], Region.decode(record)

    # --- chunks of spread regions, whose home may be another node -----------------------------

    def reserved(self, identifier: int) -> int:
        """Bytes reserved here for chunks of a region."""
        record = self._read().get(_pack_id(identifier), None, self._tables.reserved)
        return _U64.unpack(record)[0] if record else 0

    def reserve(self, identifier: int, total_bytes: int) -> None:
        """Reserve that much for chunks of a region; with 0 its chunks go too. Raises PoolFull."""
        before = self.reserved(identifier)
        if total_bytes == before:
            return
        self.declare(total_bytes - before)
        key = _pack_id(identifier)
        if total_bytes:
            self._put(self._tables.reserved, key, _U64.pack(total_bytes))
        else:
            self._delete(self._tables.reserved, key)
            for version in {version for _, version in self.chunk_versions(identifier)}:
                self.drop_chunks(identifier, version)

    def chunk(self, identifier: int, version: int, index: int) -> bytes | None:
        """One chunk."""
        found: bytes | None = self._read().get(
            _CHUNK.pack(identifier, version, index), None, self._tables.chunks
        )
        return found

    def put_chunk(self, identifier: int, version: int, index: int, data: bytes) -> None:
        """Keep one chunk."""
        self._put(self._tables.chunks, _CHUNK.pack(identifier, version, index), data)

    def drop_chunks(self, identifier: int, version: int, indices: Collection[int] | None = None) -> int:
        """Forget chunks of one version, all or some; returns how many there were."""
        if indices is None:
            indices = self.chunk_indices(identifier, version)
        keys = [_CHUNK.pack(identifier, version, index) for index in indices]
        return sum(self._delete(self._tables.chunks, key) for key in keys)

    def chunk_indices(self, identifier: int, version: int) -> list[int]:
        """Which chunks of one version are here."""
        prefix, found = _CHUNK.pack(identifier, version, 0), []
        for key in self._keys_from(self._tables.chunks, prefix):
            if key[:16] != prefix[:16]:
                break
            found.append(_CHUNK.unpack(key)[2])
        return found

    def chunk_versions(self, identifier: int | None = None) -> Iterator[tuple[int, int]]:
        """(region, version) of the chunks here, of one region or of all."""
        key = _CHUNK.pack(identifier or 0, 0, 0)
        cursor = self._read().cursor(self._tables.chunks)
        while cursor.set_range(key):
            region, version, _ = _CHUNK.unpack(cursor.key())
            if identifier is not None and region != identifier:
                return
            yield region, version
            key = _CHUNK.pack(region, version, 2**32 - 1)

    def reservations(self) -> Iterator[tuple[int, int]]:
        """(region, bytes) of all reservations here."""
        for key, value in self._read().cursor(self._tables.reserved):
            yield _U64.unpack(key)[0], _U64.unpack(value)[0]
