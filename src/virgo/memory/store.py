"""One node's store: an LMDB environment in files, and the batch of one chunk of requests.

Promises: what a batch's `close` acknowledged outlasts the process, `kill -9` included, since the pages
are the kernel's by then; a batch takes place whole or not at all; readers, also those of other processes
that map the files, see whole values only; a full pool or disk is an error that leaves all earlier data as
it was; a serial is never given twice, even if the pool is lost.

Does not: survive a power loss. After a reboot without an orderly stop the files cannot be trusted, so the
pool begins empty, and says so in the log.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb

from virgo.errors import BadArgument, Busy, DiskFull, FileRefused, PoolFull, VirgoError
from virgo.limits import MEMORY_READERS_MAX, MEMORY_SERIALS_BLOCK, MiB
from virgo.memory import core
from virgo.memory.batch import Batch
from virgo.memory.life import LifeFile, boot_id

log = logging.getLogger("virgo.memory")

DATABASES = ("regions", "data", "chunks", "reserved", "keys", "due", "gone")
STATE, IDENTITY = b"state", b"identity"
_STATE = struct.Struct("<QQ")
_PAGE_BYTES: int = os.sysconf("SC_PAGE_SIZE")  # LMDB's pages are the system's
_NEARLY_FULL_BYTES = 1 * MiB
_READERS_CHECK_TRANSACTIONS = 64  # so that looking costs nothing, and little can be written in between


class Store:
    """The store in `directory`; one process at a time owns it.

    Args:
        directory: made if need be, for the owner only.
        capacity_bytes: how much regions, reservations and keys may take together; may be changed later.
        map_bytes: address space; default: what the capacity needs.

    Raises:
        Busy: another process owns it.
        DiskFull, FileRefused: the file system refused.
    """

    def __init__(self, directory: Path, *, capacity_bytes: int, map_bytes: int = 0) -> None:
        self.directory = directory
        self.capacity_bytes = capacity_bytes
        self.map_bytes = map_bytes or core.map_bytes(capacity_bytes)
        self.broken = ""
        self.pressed = True  # room may have run out before; see `age`
        self.hits = self.misses = 0
        self.serial = self.declared_bytes = 0
        self.keys_size_bytes = 0  # when they were last measured
        self.keys_grown_bytes = 0  # at most, since then
        self.last_id = 0  # of the last transaction that is known to have written
        self._readers_checked_id = 0
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.env: Any = None
        self._owner = self._own()
        try:
            self._life = self._begin_life()
            self._open()
        except lmdb.Error as error:
            os.close(self._owner)
            raise self.fault(error) from error
        except BaseException:
            os.close(self._owner)
            raise

    def __repr__(self) -> str:
        return f"<Store {self.directory} {self.declared_bytes} of {self.capacity_bytes} bytes declared>"

    def _own(self) -> int:
        """A lock that the kernel drops with the process, and that a fork does not inherit."""
        descriptor = os.open(self.directory / "owner", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise Busy(f"another process owns {self.directory}", hint="Is the node running twice?") from error
        return descriptor

    def _begin_life(self) -> LifeFile:
        """Find out whether the files can be trusted, and remove them if not."""
        file, data, boot = LifeFile(self.directory), self.directory / "data.mdb", boot_id()
        if data.exists() and not file.life.clean and file.life.boot != boot:
            log.warning("%s was not closed before the machine stopped: the pool begins empty", data)
            data.unlink()
            (self.directory / "lock.mdb").unlink(missing_ok=True)
        if file.life.clean or file.life.boot != boot:
            file.change(boot=boot, clean=False)
            file.change()  # both files are there now, so later changes need no room on the disk
        return file

    def _open(self) -> None:
        self.env = lmdb.open(
            str(self.directory),
            map_size=self.map_bytes,
            max_dbs=len(DATABASES),
            max_readers=MEMORY_READERS_MAX,
            mode=0o600,
            sync=False,
            metasync=False,
            writemap=False,  # with it a full disk would be a SIGBUS, not an error
        )
        self.regions, self.data, self.chunks, self.reserved, self.keys, self.due, self.gone = (
            self.env.open_db(name.encode()) for name in DATABASES
        )
        with self.env.begin(write=True) as txn:
            self.measure_keys(txn)
            self.last_id = txn.id()
            self.serial, self.declared_bytes = _STATE.unpack(txn.get(STATE) or _STATE.pack(0, 0))
            identity = txn.get(IDENTITY)
            if identity is None:
                identity = uuid.uuid4().hex.encode()
                txn.put(IDENTITY, identity)
                self.serial = max(self.serial, self._life.life.serial_ceiling)
                txn.put(STATE, self.state(self.serial, 0))
        self.identity = identity.decode()
        self.env.reader_check()

    def flush(self) -> None:
        """Write everything to disk: takes as long as the disk does."""
        if not self.broken:
            self.env.sync(True)

    def close(self) -> None:
        """Write everything to disk and close; data closed so survives a reboot."""
        if self._owner < 0:
            return
        try:
            self.flush()
            if not self.broken:
                self._life.change(clean=True)
        finally:
            self.env.close()
            os.close(self._owner)
            self._owner = -1

    # --- batches ------------------------------------------------------------------------------

    def batch(self) -> Batch:
        """The batch of one chunk of requests. At most one may write at a time: never await with it open."""
        return Batch(self)

    @contextlib.contextmanager
    def batching(self) -> Iterator[Batch]:
        """A batch that is closed at the end of the block, or dropped if the block fails."""
        batch = Batch(self)
        try:
            yield batch
        except BaseException:
            batch.abort()
            raise
        batch.close()

    def age(self) -> None:
        """Let pages that were just freed be used by the next change, after room had run out.

        LMDB gives them out two transactions later. The next change would still fail for lack of them, and
        as a failed one does not count as a transaction, so would all that follow.
        """
        try:
            for _ in range(2):
                with self.env.begin(write=True) as txn:
                    txn.put(STATE, self.state(self.serial, self.declared_bytes))
            self.pressed = False
        except lmdb.Error:
            self.pressed = True  # not even room for that: tried again with the next change

    def free_dead_readers(self) -> None:
        """Now and then, once half of the map is in use: what a killed reader saw is kept until then."""
        if self.last_id - self._readers_checked_id >= _READERS_CHECK_TRANSACTIONS:
            self._readers_checked_id = self.last_id
            if self.env.info()["last_pgno"] * _PAGE_BYTES > self.map_bytes // 2:
                self.env.reader_check()

    def raise_ceiling(self, serial: int) -> None:
        """Make sure on disk that no later life gives this serial again."""
        if serial > self._life.life.serial_ceiling:
            self._life.change(serial_ceiling=serial + MEMORY_SERIALS_BLOCK)

    @staticmethod
    def state(serial: int, declared_bytes: int) -> bytes:
        """The record that is kept under STATE."""
        return _STATE.pack(serial, declared_bytes)

    def fault(self, error: lmdb.Error) -> VirgoError:
        """The typed error for one of LMDB."""
        what = f"the memory pool in {self.directory}"
        if isinstance(error, (lmdb.MapFullError, lmdb.TxnFullError)):
            self.pressed = True
            return PoolFull(f"{what} is full")
        if isinstance(error, lmdb.BadValsizeError):
            return BadArgument(f"{what} does not take a key of that size", hint="1 to 500 bytes.")
        # A short write is reported as an I/O error, so look at the disk itself.
        if isinstance(error, lmdb.DiskError) or self.disk_free_bytes() < _NEARLY_FULL_BYTES:
            self.pressed = True
            return DiskFull(f"the disk under {what} is full")
        if isinstance(error, (lmdb.PanicError, lmdb.CorruptedError)):
            self.broken = str(error)
        return FileRefused(f"{what}: {error}", hint="The node's log and the kernel's say more.")

    # --- figures ------------------------------------------------------------------------------

    def disk_free_bytes(self) -> int:
        """Room on the file system below."""
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize

    def keys_bytes(self, txn: Any = None) -> int:
        """Bytes of the pages that hold keys."""
        if txn is None:
            with self.env.begin() as reading:
                stat = reading.stat(self.keys)
        else:
            stat = txn.stat(self.keys)
        pages: int = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return pages * _PAGE_BYTES

    def measure_keys(self, txn: Any) -> None:
        """Take the exact size of the keys as the base of what is counted on."""
        self.keys_size_bytes, self.keys_grown_bytes = self.keys_bytes(txn), 0

    def catch_up(self, txn: Any) -> None:
        """Another process has written: only keys and values of regions, and so the size of the keys."""
        self.measure_keys(txn)

    def used_bytes(self) -> int:
        """What counts against the capacity."""
        return self.declared_bytes + self.keys_bytes()

    def file_bytes(self) -> int:
        """What the file takes on the disk; it grows as values are set, and never shrinks."""
        return (self.directory / "data.mdb").stat().st_blocks * 512

    def room_bytes(self) -> int:
        """What may still be added: within the capacity, and on the disk besides what is only declared."""
        used = self.used_bytes()
        disk = self.disk_free_bytes() - max(0, used - self.file_bytes())
        return max(0, min(self.capacity_bytes - used, disk))

    def stats(self) -> dict[str, Any]:
        """Figures."""
        with self.env.begin() as txn:
            entries = {name: txn.stat(getattr(self, name))["entries"] for name in DATABASES}
            used = self.declared_bytes + self.keys_bytes(txn)
        info = self.env.info()
        return {
            "capacity_bytes": self.capacity_bytes,
            "used_bytes": used,
            "declared_bytes": self.declared_bytes,
            "file_bytes": self.file_bytes(),
            "map_bytes": self.map_bytes,
            "regions": entries["regions"],
            "chunks": entries["chunks"],
            "keys": entries["keys"],
            "hits": self.hits,
            "misses": self.misses,
            "readers": info["num_readers"],
            "transactions": info["last_txnid"],
        }
