"""Durable keys on disk: a second store beside the first one, in which each commit is an fsync.

The first store answers; this one is only written, and read when a node starts. After a reboot that was no
orderly stop the first store begins empty, and the durable keys are put back into it from here.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb

from virgo.errors import VirgoError
from virgo.limits import MEMORY_SWEEP_KEYS_MAX
from virgo.memory import keyspace
from virgo.memory.keeper import Sink
from virgo.memory.keeping import OPENING, keep_of
from virgo.memory.tables import fault

if TYPE_CHECKING:
    from virgo.memory.store import Store

_NAME = "durable"


class Disk(Sink):
    """The durable keys of a store.

    Args:
        store: the first store, whose map is as large.

    Raises:
        DiskFull, FileRefused: it cannot be opened.
    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store
        self._open = threading.Lock()  # held by a thread that writes
        self.directory = directory_of(store.directory)
        try:
            self.directory.mkdir(mode=0o700, exist_ok=True)
            self._env: Any = lmdb.open(str(self.directory), map_size=store.map_bytes, mode=0o600)
        except (OSError, lmdb.Error) as error:
            raise _failure(self.directory, error) from error

    def forgives(self, error: VirgoError) -> bool:
        """Nobody waits for a full disk."""
        return False

    async def send(self, some: list[bytes], *, emptied: bool) -> None:
        """See `Sink`."""
        with self._store.batching() as batch:
            records = [(stored, batch.key(stored)) for stored in some]
        await asyncio.to_thread(self._write, records, emptied=emptied)

    def _write(self, records: list[tuple[bytes, bytes | None]], *, emptied: bool) -> None:
        try:
            with self._open, self._env.begin(write=True) as txn:
                if emptied:
                    txn.drop(self._env.open_db(txn=txn), delete=False)
                for stored, record in records:
                    if record is None:
                        txn.delete(stored)
                    else:
                        txn.put(stored, record)
        except lmdb.Error as error:
            raise _failure(self.directory, error) from error

    def restore(self) -> int:
        """Put back what the first store lacks, and send what it has newer; returns how many it lacked."""
        lacking = 0
        for some in self._rounds():
            with self._store.batching() as batch:
                for stored, record in some:
                    present = batch.key(stored)
                    if present is None:
                        entry = keyspace.decode_entry(record)
                        batch.put_record(stored, record, entry.expires_ms)
                        lacking += 1
                    elif present != record:
                        self.add((stored,))
        with self._store.batching() as batch:
            for stored in batch.with_prefix(OPENING):
                if keep_of(stored[2:]).durable and not self._has(stored):
                    self.add((stored,))
        return lacking

    def _rounds(self) -> Iterator[list[tuple[bytes, bytes]]]:
        with self._env.begin() as txn:
            cursor, some = txn.cursor(), []
            for stored, record in cursor:
                some.append((stored, record))
                if len(some) >= MEMORY_SWEEP_KEYS_MAX:
                    yield some
                    some = []
            yield some

    def _has(self, stored: bytes) -> bool:
        with self._env.begin() as txn:
            return txn.get(stored) is not None

    def close(self) -> None:
        """Close the files; all that was acknowledged is in them."""
        with self._open:
            self._env.close()


def directory_of(store: Path) -> Path:
    """Where the durable keys of the store in a directory are."""
    return store / _NAME


def _failure(directory: Path, error: Exception) -> VirgoError:
    known = error if isinstance(error, lmdb.Error) else lmdb.DiskError(str(error))
    return fault(directory, known)
