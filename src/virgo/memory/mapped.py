"""A node's store as mapped by other processes of its machine: reads and writes with nobody in between.

Promises: what is read is a whole value that was acknowledged, as of some moment during the read; a change
takes place whole or not at all, is made one at a time with those of all other processes, and outlasts the
process once it has returned. `maps` sees to it that a process maps a store once, and not across a fork.

Whoever is killed during a change leaves nothing of it, and the kernel lets the next one go on; one that is
stopped is let go on by the node (see `guard`). Only processes of the files' owner may write.

Does not know which node holds what: that is the client's business.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import lmdb

from virgo.errors import NotRunning
from virgo.limits import MEMORY_READERS_MAX
from virgo.memory import keyspace, spaces
from virgo.memory.batch import Batch, Interrupted
from virgo.memory.entries import now_ms, tired
from virgo.memory.ground import Ground, opening
from virgo.memory.held import Held, any_held
from virgo.memory.keyspace import HEAD_BYTES, Entry
from virgo.memory.recall import Clock, Recall
from virgo.memory.sketch import Sketch
from virgo.memory.spaces import Space
from virgo.memory.tables import DATABASES, IDENTITY, Tables
from virgo.memory.writers import Announcement

T = TypeVar("T")
MISSING: Any = object()  # the answer of a read that the node has to give
_pack_id = struct.Struct(">Q").pack
_LONG_BYTES = 32 * 1024
CHECK_S = 1.0  # how often to look whether the files are still the same ones
_CLOSE_WAIT_S = 1.0  # closing waits for the reads of other threads, which take microseconds
_FORK_WAIT_S = 0.1  # a fork too, but not for views, which may be the forking thread's own


class Mapped:
    """The store in `directory`, mapped.

    A read or change says that it is going on by an entry in `_active`, a view in `_viewing`, and needs
    no lock, for that costs as much as a third of the read; whoever closes the map first takes `_begin` away
    and then waits for the entries to go. Under the interpreter's lock each of these steps is atomic. Each is
    the first one of a `try` block, so that an exception of a signal handler, Ctrl-C for one, leaves no entry.

    Attributes:
        opening: whoever maps or unmaps holds it.

    Args:
        directory: of the store.
        identity: the store's, so that another one that happens to have the same path is not mistaken for it.
        map_bytes: its address space.

    Raises:
        NotRunning: it cannot be mapped from here; ask the node instead.
    """

    def __init__(self, directory: str, identity: str, map_bytes: int) -> None:
        self.directory = directory
        self.identity = identity
        self._data_path = Path(directory) / "data.mdb"
        self._map_bytes = map_bytes
        self.opening = threading.RLock()
        self._long = False  # whether the last value that was read was long
        self._active: list[None] = []
        self._enter, self._leave = self._active.append, self._active.pop
        self._viewing: dict[int, weakref.ref[Held]] = {}
        self._env: Any = None
        self._begin: Any = None
        self._keys: Any = None
        self._data: Any = None
        self._spaces: Any = None
        self._held: Any = None
        self._sketch: Sketch | None = None
        self._tables: Tables | None = None  # to write with
        self._announced: Announcement | None = None
        self._inode = 0
        self._check_at = 0.0
        self._clock: Clock | None = None
        with self.opening:
            self._open()

    def __del__(self) -> None:
        # Not left to whoever forgets the last transaction, the traceback of an exception for example: until
        # then nobody could map the store anew, since a process can do so but once.
        env = self.__dict__.get("_env")
        if env is not None and not any_held(self._viewing):
            env.close()

    def __repr__(self) -> str:
        return f"<Mapped {self.directory} {'open' if self._env is not None else 'closed'}>"

    @property
    def writable(self) -> bool:
        """Whether changes can be made from here."""
        return self._tables is not None

    def key(self, stored: bytes, recall: Recall | None = None, name: Any = None) -> Any:
        """The value of a key, None if it is absent, MISSING if its use is to be noted. Raises NotRunning.

        If it does not expire it is noted in `recall` under that name.
        """
        if self._long:  # the last one was: then a copy less is worth more steps
            held = self.view(stored)
            self._long = held is not None
            if held is not None:
                with held as memory:
                    self._long = len(memory) > _LONG_BYTES
                    value = bytes(memory)
                    if recall is not None and self._clock is not None:
                        recall.note(name, value, held.number, self._clock)
                    return value
        try:
            self._enter(None)
            if monotonic() > self._check_at:
                raise _Stale
            txn = self._begin(self._keys)
            record = txn.get(stored)
            number, clock = txn.id(), self._clock
        except (_Stale, TypeError, lmdb.Error):
            record, clock = self._retry("_keys", stored), None
        finally:
            self._leave()
        if record is None:
            return None
        if record[0]:
            value, lasts = self._living(stored, record)
        else:
            self._long = len(record) > _LONG_BYTES
            value, lasts = record[HEAD_BYTES:], True
        if lasts and recall is not None and clock is not None:
            recall.note(name, value, number, clock)
        return value

    def _living(self, stored: bytes, record: bytes) -> tuple[Any, bool]:
        """What `key` answers for a record with more than a value, and whether time leaves it as it is."""
        entry = keyspace.decode_entry(record)
        if entry.expires_ms and entry.expires_ms <= now_ms():
            return None, False
        if entry.generation >= 0 and not self._counts(stored, entry):
            return None, False
        if not entry.expires_ms:
            return entry.value, True
        return MISSING if entry.sliding_ms and tired(entry) else entry.value, False

    def view(self, stored: bytes) -> Held | None:
        """The value of a plain key, held where it lies; None if `key` is to be used."""
        return self._hold("_keys", stored, HEAD_BYTES)

    def view_data(self, identifier: int) -> Held | None:
        """The value of a plain region, held where it lies; None if `data` is to be used."""
        return self._hold("_data", _pack_id(identifier), 0)

    def _hold(self, database: str, key: bytes, head: int) -> Held | None:
        """A value behind the head that it may have, if that says that it is a plain one."""
        held = Held(self._viewing)
        try:
            if monotonic() <= self._check_at:
                held.txn = txn = self._begin(None, None, False, True)
                record = txn.get(key, None, getattr(self, database))
                if record is not None and (not head or record[0] == 0):
                    held.memory = memoryview(record)[head:]
                    return held
        except (TypeError, lmdb.Error):
            pass  # it is closed, or has grown: who reads it the usual way sees to that
        held.end()
        return None

    def _counts(self, stored: bytes, entry: Entry) -> bool:
        """Whether a key with a generation is there; if so its use is counted."""
        record = self._read("_spaces", spaces.name_of(stored)) if entry.generation else None
        if record is not None and not Space.decode(record).counts(entry.generation):
            return False
        if self._sketch is None or not self._sketch.counts:
            self._sketch = Sketch(Path(self.directory), create=False)
        self._sketch.use(stored)
        return True

    def data(self, identifier: int, recall: Recall | None = None) -> bytes | None:
        """The value of a plain region, None if it has none; noted in `recall`. Raises NotRunning."""
        found, number, clock = self._look("_data", _pack_id(identifier))
        if recall is not None and found is not None and clock is not None:
            recall.note(identifier, found, number, clock)
        return found

    def holds(self, slot: int) -> bool:
        """Whether the node owns a slot of keys that are kept twice. Raises NotRunning."""
        return self._read("_held", keyspace.SLOT_PREFIXES[slot]) is not None

    def _read(self, database: str, key: bytes) -> bytes | None:
        """One value. Raises NotRunning."""
        return self._look(database, key)[0]

    def _look(self, database: str, key: bytes) -> tuple[bytes | None, int, Clock | None]:
        """One value, and after which change of which store it was; no clock if that is unknown."""
        try:
            self._enter(None)
            if monotonic() > self._check_at:
                raise _Stale
            txn = self._begin(getattr(self, database))
            return txn.get(key), txn.id(), self._clock
        except (_Stale, TypeError, lmdb.Error):
            return self._retry(database, key), 0, None
        finally:
            self._leave()

    def part(self, identifier: int, start: int, stop: int | None) -> bytes | None:
        """Bytes of the value of a plain region, None if it does not reach so far. Raises NotRunning."""
        try:
            self._enter(None)
            if monotonic() <= self._check_at:
                with self._begin(self._data, None, False, True) as txn:  # of the mapped pages, no copy
                    return _cut(txn.get(_pack_id(identifier)), start, stop)
        except (TypeError, lmdb.Error):
            pass  # closed, or outgrown: `data` maps anew
        finally:
            self._leave()
        return _cut(self.data(identifier), start, stop)

    def change(self, work: Callable[[Batch], T]) -> T:
        """Do `work` in a batch, and make it final. It may be called again, each time with a new batch.

        Raises:
            NotRunning: not from here, or not now.
            VirgoError: what `work` raised, or the end of the batch: then nothing has changed.
        """
        thread = threading.get_ident()
        outer = step_aside()
        try:
            self._enter(None)
            tables = self._tables if monotonic() <= self._check_at else None
            tables = tables or self._renewed()
            while True:
                batch = Batch(tables)
                try:
                    _changing[thread] = batch
                    result = work(batch)
                    batch.close()
                    return result
                except (Interrupted, lmdb.Error):
                    if not batch.interrupted:
                        raise
                finally:
                    batch.abort()
                    if outer is None:
                        _changing.pop(thread, None)
                    else:
                        _changing[thread] = outer
        finally:
            self._leave()

    def _renewed(self) -> Tables:
        """The tables, after a look whether the files are still the same ones. Raises NotRunning."""
        try:
            self._leave()  # as in `_retry`
            with self.opening:
                self._renew()
        finally:
            self._enter(None)
        tables = self._tables
        if tables is None:  # or it was closed in between, for a fork
            raise NotRunning(f"{self.directory} cannot be written from here")
        return tables

    def close(self) -> None:
        """Unmap; the next read maps again."""
        with self.opening:
            self._close()

    def _retry(self, database: str, key: bytes) -> Any:
        """A read that found the map closed, unchecked, or too small for what the node has written."""
        try:
            self._leave()  # while waiting for the right to open, it must not be waited for
            with self.opening:
                self._renew()
                try:
                    return self._begin(getattr(self, database)).get(key)
                except lmdb.MapResizedError:
                    self._close()
                    self._open()
                    return self._begin(getattr(self, database)).get(key)
        except lmdb.Error as error:
            raise NotRunning(f"{self.directory} cannot be read: {error}") from error
        finally:
            self._enter(None)

    def _renew(self) -> None:
        """Map, or map anew if these are other files. `opening` is held."""
        if self._env is not None and not self._same_files():
            self._close()
        if self._env is None:
            self._open()
        self._see_until(monotonic() + CHECK_S)

    def _see_until(self, when: float) -> None:
        self._check_at = when
        if self._clock is not None:
            self._clock.until = when

    def _same_files(self) -> bool:
        """Whether these are still the files of the path: a cloud may have been removed and made anew."""
        try:
            return self._data_path.stat().st_ino == self._inode
        except OSError:
            return False

    def _open(self) -> None:
        """Map and check whose it is."""
        try:
            # A reader that made a lock file would make it with its own settings.
            if not (Path(self.directory) / "lock.mdb").exists():
                raise NotRunning(f"{self.directory} holds no store")
            found = self._data_path.stat()
            # The node has to be able to let a writer go on that is stopped, so it must be the same user's.
            writable = found.st_uid == os.geteuid()
            env = self._map(writable=writable)
            clock = Clock(self._data_path)
        except (OSError, lmdb.Error) as error:
            raise NotRunning(f"{self.directory} cannot be mapped: {error}") from error
        try:
            with env.begin() as txn:
                if txn.get(IDENTITY) != self.identity.encode() or clock.inode != found.st_ino:
                    raise NotRunning(f"{self.directory} is another store")
            self._keys, self._data, self._spaces, self._held = (
                env.open_db(name, create=False) for name in (b"keys", b"data", b"spaces", b"held")
            )
            if writable:
                ground = Ground(self._data_path, self._map_bytes)
                self._tables = Tables(env, Path(self.directory), self._map_bytes, ground)
                self._announced = Announcement(Path(self.directory))
        except lmdb.Error as error:
            env.close()
            raise NotRunning(f"{self.directory} cannot be read: {error}") from error
        except NotRunning:
            env.close()
            raise
        self._env, self._inode = env, found.st_ino
        self._clock = clock
        self._see_until(monotonic() + CHECK_S)
        self._begin = env.begin

    def _map(self, *, writable: bool) -> Any:
        """Open the environment. Raises OSError, lmdb.Error."""
        options: dict[str, Any] = {
            "max_dbs": len(DATABASES),
            "max_readers": MEMORY_READERS_MAX,
            "create": False,
        }
        if not writable:
            return lmdb.open(self.directory, map_size=self._map_bytes, readonly=True, **options)
        options |= {"sync": False, "metasync": False, "writemap": True}
        with opening(Path(self.directory), alone=False) as length:
            self._map_bytes = max(self._map_bytes, length)
            return lmdb.open(self.directory, map_size=self._map_bytes, **options)

    def _close(self) -> None:
        """Unmap once no read goes on. `opening` is held, so none begins anew."""
        env, self._env, self._begin = self._env, None, None
        self._see_until(0.0)
        self._clock = None
        self._tables = self._sketch = None
        if env is None:
            return
        if not self._idle(_CLOSE_WAIT_S):
            _abandoned.append(env)  # a read hangs, on a dying disk for one: never unmap under it
            return
        env.close()
        if self._announced is not None:
            self._announced.close()

    def _idle(self, wait_s: float) -> bool:
        """Whether no read, change or view goes on, if need be after a while."""
        deadline = monotonic() + wait_s
        while self._active or any_held(self._viewing):
            if monotonic() > deadline:
                return False
            time.sleep(0)
        return True

    def before_fork(self) -> bool:
        """Close it; False if it has to stay open, for a view is held."""
        begin, self._begin = self._begin, None  # so that nothing begins
        if self._idle(_FORK_WAIT_S):
            self._close()
            return True
        self._begin = begin
        return False

    def leave_to_parent(self) -> None:
        """In a child: the map is the parent's, to be neither used nor closed; here the node is asked."""
        _abandoned.append(self._env)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._env))  # not even at the end of the process
        self._env = self._begin = self._tables = self._sketch = None
        self._see_until(0.0)
        self._clock = None
        self._active.clear()
        self._viewing.clear()


def _cut(value: Any, start: int, stop: int | None) -> bytes | None:
    """The part, if the value has all of it."""
    if value is None or not 0 <= start <= (start if stop is None else stop) <= len(value):
        return None
    return bytes(value[start:stop])


class _Stale(Exception):
    """It is time to look whether the files are still the same ones."""


_abandoned: list[Any] = []
_changing: dict[int, Batch] = {}  # by thread


def step_aside() -> Batch | None:
    """Give up the change that this thread is in the middle of; it is begun anew later.

    Then we are in a signal handler, or a finalizer, that came in between. Whatever it does that needs the
    right to write, here or at the node, would wait for itself without end.
    """
    outer = _changing.get(threading.get_ident()) if _changing else None
    if outer is not None:
        outer.interrupt()
    return outer
