"""A batch of reads and changes: one LMDB transaction, made final by `close`.

A batch begins as a reader and becomes the writer with its first change; what it has changed it also sees.
Whoever decides by what it reads becomes the writer first (`writing`): other processes write too.
If a change fails for lack of room, the whole batch has failed: later changes and `close` raise the same
error, and reads go on from what was there before.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable
from time import monotonic
from typing import TYPE_CHECKING, Any

import lmdb

from virgo.errors import NotRunning, PoolFull, TooLarge, VirgoError
from virgo.limits import MEMORY_VALUE_BYTES_MAX
from virgo.memory import keyspace
from virgo.memory.heads import PAGE_BYTES
from virgo.memory.keeping import OPENING
from virgo.memory.keyspace import NOWHERE, Entry
from virgo.memory.snapshot import FLUSHED, Snapshot
from virgo.memory.tables import STATE, State

if TYPE_CHECKING:
    from virgo.memory.tables import Tables

_U64 = struct.Struct(">Q")
_KEY_OVERHEAD_BYTES = 16  # LMDB's own, per entry of a page
_SHARING_BYTES_MAX = 1024  # records that share their page with others, for sure
_PAGES_BYTES = 3 * PAGE_BYTES  # that a change takes beside its own bytes, for its leaf and one that is split
_MEASURE_AFTER_BYTES = 256 * 1024
_VERSION_BITS = 20  # changes of one transaction that get versions of their own
_NOTHING, _TRUE = (None,), (True,)
_pack_id = _U64.pack


class Interrupted(VirgoError):
    """The batch was given up by who came in between, and has to be begun anew; see `Batch.interrupt`."""


def _too_large(value: bytes) -> TooLarge:
    return TooLarge(f"a value of {len(value)} bytes exceeds the limit of {MEMORY_VALUE_BYTES_MAX}")


class Batch(Snapshot):
    """See the module. Ids are those of regions; stored keys are `keyspace.stored_key`."""

    __slots__ = (
        "_bytes",
        "_failure",
        "_grown",
        "_held",
        "_id",
        "_room",
        "_sorts",
        "_spare",
        "_using",
        "_version",
        "_writing",
        "interrupted",
    )

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables)
        self._writing = False
        self._failure: VirgoError | None = None
        self._held: list[Any] = []  # the transaction that writes; see `_write`
        self.interrupted = False
        self._room = 0
        self._grown = 0  # by keys, not counting what they replace
        self._spare = 0  # bytes of the ground that may still be used without a look
        self._bytes = self._using = 0  # that were written; with the pages that this may take
        self._sorts = False  # whether some keys have a generation
        self._id = 0  # of the transaction that writes
        self._version = 0  # the last one given

    def __repr__(self) -> str:
        kind = "failed" if self._failure else "writing" if self._writing else "reading"
        return f"<Batch {kind}>"

    # --- life ---------------------------------------------------------------------------------

    def _write(self) -> Any:
        if self._writing:
            return self._txn
        if self._failure is not None:
            raise self._failure
        tables = self._tables
        self._txn = None
        try:
            tables.free_dead_readers()
            tables.waiting_since = monotonic()
            self._txn = self._begin()
        except lmdb.Error as error:
            self._failure = tables.fault(error)
            raise self._failure from error
        finally:
            tables.have_right()
        self._writing = True
        self._id = self._txn.id()
        self._version = self._id << _VERSION_BITS
        if self._id != tables.last_id + 1:
            tables.catch_up(self._txn)
        elif tables.keys_grown_bytes > _MEASURE_AFTER_BYTES:
            tables.measure_keys(self._txn)
        state = self._state = tables.state
        self._sorts = state.spaces > 0 or state.evicts
        if not state.open:
            self.abort()
            raise NotRunning(f"{tables.directory} is closed", hint="`virgo up` starts its node.")
        self._room = (
            state.capacity_bytes - state.declared_bytes - tables.keys_size_bytes - tables.keys_grown_bytes
        )
        self._grown = self._bytes = self._using = 0
        self._spare = tables.spare_bytes
        if self._spare < 0:
            self._stand()
        return self._txn

    def _begin(self) -> Any:
        """A transaction that writes. Raises Interrupted, lmdb.Error."""
        # As one step: a signal handler that comes in between finds the transaction, and can abort it.
        self._held.extend(map(self._tables.env.begin, _NOTHING, _NOTHING, _TRUE))
        if not self._held:
            raise Interrupted
        return self._held[0]

    def _stand(self) -> None:
        """Have ground for what was written and for what is coming. Raises DiskFull."""
        tables = self._tables
        # A change of a leaf makes a new page, but each page is new at most once, and there are only so many.
        most = tables.keys_size_bytes + tables.keys_grown_bytes + 3 * self._bytes
        try:
            self._spare = tables.stand(min(self._using, most))
        except VirgoError as failure:
            tables.pressed = True
            self.abort()
            self._failure = failure
            raise

    def writing(self) -> Batch:
        """This batch as the writer: what it reads from now on nobody else changes until it is closed."""
        if not self._writing:
            self._write()
        return self

    def _measure(self) -> None:
        """Know the room exactly; in between it is estimated from below, which costs nothing."""
        self._tables.measure_keys(self._txn)
        self._grown = 0
        used = self._state.declared_bytes + self._tables.keys_size_bytes
        self._room = self._state.capacity_bytes - used

    def _fail(self, error: lmdb.Error) -> VirgoError:
        failure = Interrupted() if self.interrupted else self._tables.fault(error)
        self.abort()
        self._failure = failure
        return failure

    def close(self) -> Awaitable[None] | None:
        """Make the changes final. Raises PoolFull, DiskFull or FileRefused: then none took place.

        Returns:
            What to await before they are acknowledged, or None.
        """
        if self._failure is not None:
            raise self._failure
        if not self._writing:
            self._txn = None
            return None
        tables, txn = self._tables, self._txn
        try:
            if self._state is not tables.state or tables.untold:
                txn.put(STATE, self._state.encode())
            txn.commit()
        except lmdb.Error as error:
            raise self._fail(error) from error
        self._txn, self._writing = None, False
        self._held.clear()
        tables.state, tables.last_id, tables.untold = self._state, self._id, False
        tables.keys_grown_bytes += self._grown
        tables.spare_bytes = self._spare
        if tables.pressed:
            self._age()
        return None

    def _age(self) -> None:
        """Let pages that were just freed be used by the next change, after room had run out.

        LMDB gives them out two transactions later. The next change would still fail for lack of them, and
        as a failed one does not count as a transaction, so would all that follow. If that fails, for lack
        of room or because somebody came in between, it is tried again with the next change.
        """
        try:
            for _ in range(2):
                txn = self._begin()
                txn.put(STATE, State.read(txn).encode())
                txn.commit()
                self._held.clear()
            self._tables.pressed = False
        except (Interrupted, lmdb.Error):
            self.abort()

    def abort(self) -> None:
        """Drop the changes."""
        self._txn, self._writing = None, False
        if self._held:
            self._tables.keys_grown_bytes = _MEASURE_AFTER_BYTES + 1  # it may have been measured with these
            self._held.pop().abort()

    def interrupt(self) -> None:
        """Give it up, unless it is final already, for another batch of the same thread, which waits for it.

        Whatever it is used for from then on fails with Interrupted, or with an error of LMDB.
        """
        if not self._held:
            return
        try:
            self._held[0].id()
        except lmdb.Error:  # it is final already
            return
        self.interrupted = True
        self._held.pop().abort()

    def _put(self, database: Any, key: bytes, value: bytes) -> None:
        txn = self._write()
        self._use(len(value))
        try:
            txn.put(key, value, db=database)
        except lmdb.Error as error:
            raise self._fail(error) from error

    def _use(self, length: int) -> None:
        """Be about to write so many bytes. Raises DiskFull."""
        self._bytes += length
        self._using += length + _PAGES_BYTES
        self._spare -= length + _PAGES_BYTES
        if self._spare < 0:
            self._stand()

    def _delete(self, database: Any, key: bytes) -> bool:
        txn = self._write()
        self._use(0)
        try:
            return bool(txn.delete(key, db=database))
        except lmdb.Error as error:
            raise self._fail(error) from error

    # --- values of plain regions ---------------------------------------------------------------

    def put_data(self, identifier: int, value: bytes) -> None:
        """Set the value of a plain region."""
        self._put(self._tables.data, _pack_id(identifier), value)

    # --- keys ---------------------------------------------------------------------------------

    def count_get(self, hit: bool) -> None:
        """Take note of a hit or a miss."""
        if hit:
            self._tables.hits += 1
        else:
            self._tables.misses += 1

    def count_use(self, stored: bytes) -> None:
        """Take note that a key was used that may be evicted."""
        self._tables.sketch.use(stored)

    def put_plain(self, stored: bytes, value: bytes) -> None:
        """Keep a value that does not expire. Raises PoolFull, TooLarge."""
        if len(value) > MEMORY_VALUE_BYTES_MAX:
            raise _too_large(value)
        if not self._writing:
            self._write()
        if self._sorts or stored.startswith(OPENING, 2):
            self.put_entry(stored, Entry(value))
            return
        self._version += 1
        self._keep(stored, keyspace.encode_plain(value, self._version))

    def put_entry(self, stored: bytes, entry: Entry) -> int:
        """Keep an entry, whose version is given here and returned. Raises PoolFull, TooLarge."""
        if len(entry.value) > MEMORY_VALUE_BYTES_MAX:
            raise _too_large(entry.value)
        if not self._writing:
            self._write()
        generation = self.generation(stored) if self._sorts else NOWHERE
        if generation != entry.generation:
            entry = entry._replace(generation=generation)
        if stored.startswith(OPENING, 2):
            old = self.key(stored)  # perhaps of another node's making
            self._version = max(self._version, 0 if old is None else keyspace.decode_entry(old).version)
        self._version += 1
        self.put_record(stored, keyspace.encode_entry(entry, self._version), entry.expires_ms)
        return self._version

    def put_record(self, stored: bytes, record: bytes, expires_ms: int) -> None:
        """Keep a record as it is."""
        if not self._writing:
            self._write()
        self._keep(stored, record)
        if expires_ms:
            self._put(self._tables.due, _U64.pack(expires_ms) + stored, b"")
        if stored.startswith(OPENING, 2):
            self._touch(stored)

    def _keep(self, stored: bytes, record: bytes) -> None:
        growth = len(stored) + len(record) + _KEY_OVERHEAD_BYTES
        if growth > self._room:
            self._squeeze(stored, record, growth)
            return
        self._use(growth)
        try:
            self._txn.put(stored, record, True, True, False, self._tables.keys)
        except lmdb.Error as error:
            raise self._fail(error) from error
        self._room -= growth
        self._grown += growth

    def _squeeze(self, stored: bytes, record: bytes, growth: int) -> None:
        """Keep a record where room seems to be lacking: it may replace another, or fit a half-empty page."""
        self._measure()
        old = self.key(stored)
        more = growth - (len(stored) + len(old) + _KEY_OVERHEAD_BYTES if old is not None else 0)
        lacks = more > max(0, self._room)
        # A long record takes pages of its own, so trying it would not make it fit.
        if lacks and len(record) > _SHARING_BYTES_MAX and not self._evict(more, stored):
            raise self._full(record)
        before = min(0, self._room)
        self._put(self._tables.keys, stored, record)
        self._measure()
        if self._room >= before or more <= 0 or self._evict(0, stored):
            return
        if old is None:
            self._delete(self._tables.keys, stored)
        else:
            self._put(self._tables.keys, stored, old)
        self._measure()
        raise self._full(record)

    def _full(self, record: bytes) -> PoolFull:
        return PoolFull(f"a key of {len(record)} bytes is set, {max(0, self._room)} are free here")

    def _evict(self, need_bytes: int, _keep: bytes = b"") -> bool:
        """Make so much room by forgetting keys, but not that one; only the owner can."""
        return self._room >= need_bytes

    def delete_key(self, stored: bytes) -> bool:
        """Forget a key; False if there was none."""
        if not self._delete(self._tables.keys, stored):
            return False
        self._version += 1
        self._put(self._tables.gone, stored[:2], _U64.pack(self._version))
        if stored.startswith(OPENING, 2):
            self._touch(stored)
        return True

    def _touch(self, stored: bytes) -> None:
        """A key was changed that is kept elsewhere too; only the owner may."""
        raise NotRunning(f"{stored[2:42]!r} is kept more than once", hint="Its node changes it.")

    def put_claim(self, stored: bytes, record: bytes) -> None:
        """Keep a claim."""
        self._put(self._tables.claims, stored, record)

    def drop_claim(self, stored: bytes) -> None:
        """Forget the claim on a key, if there is one."""
        self._delete(self._tables.claims, stored)

    def flush_keys(self) -> None:
        """Forget all keys."""
        try:
            txn = self._write()
            self._use(self._tables.keys_size_bytes // 256)  # the list of the pages that become free
            txn.drop(self._tables.keys, delete=False)
            txn.drop(self._tables.due, delete=False)
            txn.drop(self._tables.claims, delete=False)
            self._version += 1
            txn.put(FLUSHED, _U64.pack(self._version), db=self._tables.gone)
        except lmdb.Error as error:
            raise self._fail(error) from error

    def expire_keys(self, now_ms: int, count: int) -> int:
        """Remove up to `count` keys whose time has passed; returns how many were looked at."""
        due: list[bytes] = []
        for entry in self._keys_from(self._tables.due, b"\0"):
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
            self._delete(self._tables.due, entry)
        return len(due)
