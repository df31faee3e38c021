"""What only the owner of a store does in a batch: serials, room for regions, regions and chunks."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from virgo.errors import PoolFull
from virgo.memory.batch import Batch
from virgo.memory.core import Region

if TYPE_CHECKING:
    from virgo.memory.store import Store

_U64 = struct.Struct(">Q")
_CHUNK = struct.Struct(">QQI")
_pack_id = _U64.pack


class OwnerBatch(Batch):
    """A batch of the node. Ids are those of regions."""

    __slots__ = ("_store",)

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._store = store

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
        self._state = self._state._replace(declared_bytes=self._state.declared_bytes + change_bytes)
        self._room -= change_bytes

    def next_serial(self) -> int:
        """A number that this store has never given before."""
        self._write()
        serial = self._state.serial + 1
        self._store.raise_ceiling(serial)
        self._state = self._state._replace(serial=serial)
        return serial

    # --- regions ---------------------------------------------------------------------------

    def put_region(self, identifier: int, region: Region) -> None:
        """Keep the region; a plain one's size has to be declared."""
        self._put(self._tables.regions, _pack_id(identifier), region.encode())

    def delete_region(self, identifier: int, region: Region) -> None:
        """Forget the region and its value."""
        key = _pack_id(identifier)
        self._delete(self._tables.regions, key)
        if not region.spread:
            self._delete(self._tables.data, key)
            self.declare(-region.size)

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
