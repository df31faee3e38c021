"""One node's store: an LMDB environment in files, and the batch of one chunk of requests.

Promises: what a batch's `close` acknowledged outlasts the process, `kill -9` included, since the pages
are the kernel's by then; a batch takes place whole or not at all; readers, also those of other processes
that map the files, see whole values only; a full pool or disk is an error that leaves all earlier data as
it was; a serial is never given twice, even if the pool is lost.

Does not: survive a power loss. After a reboot without an orderly stop the files cannot be trusted, so the
pool begins empty, and says so in the log; `durable` then puts back what is kept on disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lmdb

from virgo.errors import Busy, DiskFull, FileRefused, VirgoError
from virgo.limits import (
    MEMORY_GROUND_FREE_BYTES,
    MEMORY_GROUND_SPARE_BYTES,
    MEMORY_READERS_MAX,
    MEMORY_SERIALS_BLOCK,
)
from virgo.memory import condense, core
from virgo.memory.eviction import Evictor
from virgo.memory.ground import Ground, opening
from virgo.memory.heads import PAGE_BYTES
from virgo.memory.keeper import Keeper
from virgo.memory.life import LifeFile, boot_id
from virgo.memory.owner import OwnerBatch
from virgo.memory.sketch import Sketch
from virgo.memory.tables import (
    DATABASES,
    FORMAT,
    IDENTITY,
    STATE,
    State,
    Tables,
    disk_free_bytes,
    fault,
)

log = logging.getLogger("virgo.memory")


class Store(Tables):
    """The store in `directory`; one process at a time owns it.

    Args:
        directory: made if need be, for the owner only.
        capacity_bytes: how much regions, reservations and keys may take together; may be changed later.
        map_bytes: address space; default: what the capacity needs.
        evicts: whether keys of no cache may be evicted too.

    Raises:
        Busy: another process owns it.
        DiskFull, FileRefused: the file system refused.
    """

    def __init__(
        self, directory: Path, *, capacity_bytes: int, map_bytes: int = 0, evicts: bool = False
    ) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory = directory
        self.unswept: set[bytes] = set()  # namespaces of which dropped keys may still be here
        self.kept_regions: set[bytes] = set()  # stored keys that are regions, which count as no keys
        self.copies: dict[int, int] = {}  # by slot, how many keys are here as second copies of another's
        self.keeper = Keeper()
        self.condenser = condense.Condenser()
        self._owner = self._own()
        try:
            self._life = self._begin_life()
            self._open(capacity_bytes, map_bytes or core.map_bytes(capacity_bytes), evicts=evicts)
        except lmdb.Error as error:
            os.close(self._owner)
            raise fault(directory, error) from error
        except BaseException:
            os.close(self._owner)
            raise

    def __repr__(self) -> str:
        state = self.state
        return f"<Store {self.directory} {state.declared_bytes} of {state.capacity_bytes} bytes declared>"

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
        cause = ""
        if data.exists() and file.life.format != FORMAT:
            cause = "was written by another version"
        elif data.exists() and not file.life.clean and file.life.boot != boot:
            cause = "was not closed before the machine stopped"
        if cause:
            log.warning("%s %s: the pool begins empty", data, cause)
            data.unlink()
            (self.directory / "lock.mdb").unlink(missing_ok=True)
        if file.life.clean or file.life.boot != boot or file.life.format != FORMAT:
            file.change(boot=boot, clean=False, format=FORMAT)
            file.change()  # both files are there now, so later changes need no room on the disk
        return file

    @functools.cached_property
    def evictor(self) -> Evictor:
        """Who makes room."""
        self.count_uses()
        return Evictor(self.sketch)

    def count_uses(self) -> None:
        """From now on count the uses of keys that may be evicted, those by other processes too."""
        if not self.sketch.counts:
            self.__dict__["sketch"] = Sketch(self.directory, create=True)

    def _open(self, capacity_bytes: int, map_bytes: int, *, evicts: bool) -> None:
        env, map_bytes, ground = self._map(map_bytes)
        super().__init__(env, self.directory, map_bytes, ground)
        with env.begin(write=True) as txn:
            self.measure_keys(txn)
            kept = State.read(txn)
            identity = txn.get(IDENTITY)
            if identity is None:
                identity = uuid.uuid4().hex.encode()
                txn.put(IDENTITY, identity)
                kept = State(serial=self._life.life.serial_ceiling)
        self.identity = identity.decode()
        if evicts:
            self.count_uses()
        self._become(kept._replace(capacity_bytes=capacity_bytes, open=True, evicts=evicts), kept)
        env.reader_check()
        with self.batching() as batch:
            self.kept_regions = batch.find_kept_regions()

    def attend(self) -> None:
        """While the disk is full write by system calls, which fail where the map would be a signal.

        They need no ground, so pages that were freed can be used for values of any length. And condense the
        store if need be. To be called now and then, when no batch is open.
        """
        try:
            self.condenser.attend(self)
        except VirgoError as error:
            log.warning("%s is not condensed: %s", self.directory, error)
        full = self.ground is None
        if full and disk_free_bytes(self.directory) < MEMORY_GROUND_FREE_BYTES:
            return
        if full or not self.grounded:
            self.env.close()
            self._reopen(through=full)
            log.warning("%s is %swritten through the map now", self.directory, "" if self.ground else "not ")

    def _reopen(self, *, through: bool = True) -> None:
        """Go on with the file that is in place; the environment is closed."""
        if self.ground is not None:
            self.ground.close()
        env, self.map_bytes, ground = self._map(self.map_bytes, through=through)
        self._use(env, ground)

    def condense(self) -> None:
        """Go on with a compact copy of the file; see `condense`. Others cannot write meanwhile.

        Raises:
            FileRefused, DiskFull: the file is the old one.
        """
        served = self.state
        shut = self.state = served._replace(open=False)
        try:
            self.waiting_since = time.monotonic()  # a stopped client may have to be let finish first
            told = self._tell_end()
            self.have_right()
            if not told:
                return
            condense.copy(self.env, self.directory)
            self.env.close()
            try:
                condense.put_in_place(self.directory)
            finally:
                self._reopen()
                self.last_id = 0  # so that all is measured anew
        except lmdb.Error as error:
            raise fault(self.directory, error) from error
        except OSError as error:
            raise FileRefused(f"{self.directory}: {error.strerror}", hint="Its file is as it was.") from error
        finally:
            self._become(served, shut)

    def live_bytes(self) -> int:
        """Of the pages that are in use."""
        with self.env.begin() as txn:
            stats = [txn.stat(getattr(self, name)) for name in DATABASES]
        return self._pages(stats) * PAGE_BYTES

    def _pages(self, stats: Iterable[dict[str, int]]) -> int:
        """Pages in use by these tables and the one of all tables."""
        kinds = ("branch_pages", "leaf_pages", "overflow_pages")
        return sum(stat[kind] for stat in (*stats, self.env.stat()) for kind in kinds)

    def _map(self, map_bytes: int, *, through: bool = True) -> tuple[Any, int, Ground | None]:
        """The environment, its address space, and the blocks under its file.

        It is written through the map if there is ground for that, and `through` is not False.
        """
        options: dict[str, Any] = {
            "max_dbs": len(DATABASES),
            "max_readers": MEMORY_READERS_MAX,
            "mode": 0o600,
        }
        options |= {"sync": False, "metasync": False}
        condense.finish(self.directory)
        with opening(self.directory, alone=True) as length:
            options["map_size"] = max(map_bytes, length)
            with lmdb.open(str(self.directory), **options) as env:
                for name in DATABASES:
                    env.open_db(name.encode())
                top = (env.info()["last_pgno"] + 1) * PAGE_BYTES
            ground = Ground(self.directory / "data.mdb", options["map_size"])
            try:
                if through:
                    ground.take(top + MEMORY_GROUND_SPARE_BYTES)
            except DiskFull:
                through = False
            if not through:
                ground.close()
                return lmdb.open(str(self.directory), **options), options["map_size"], None
            return lmdb.open(str(self.directory), writemap=True, **options), options["map_size"], ground

    def catch_up(self, txn: Any) -> None:
        """Others write only keys and values of regions, so what may have changed is the size of the keys."""
        self.measure_keys(txn)
        self.spare_bytes = -1

    def resize(self, capacity_bytes: int) -> None:
        """Change the capacity."""
        self._become(self.state._replace(capacity_bytes=capacity_bytes), self.state)

    def _become(self, state: State, told: State) -> None:
        """Let the others know a new state: now or, on a full disk, with the next change that finds room."""
        self.state = state
        if state != told:
            self.untold = True
            with contextlib.suppress(VirgoError), self.batching() as batch:
                batch.writing()

    def flush(self) -> None:
        """Write everything to disk: takes as long as the disk does."""
        if not self.broken:
            self.env.sync(True)

    def close(self) -> None:
        """Write everything to disk and close; data closed so survives a reboot."""
        if self._owner < 0:
            return
        try:
            self.state = self.state._replace(open=False)
            told = self._tell_end()
            self.flush()
            if told:
                self._life.change(clean=True)
        finally:
            self.env.close()
            if self.ground is not None:
                self.ground.close()
            os.close(self._owner)
            self._owner = -1

    def _tell_end(self) -> bool:
        """Keep others from writing from now on; False if that failed, so that they may still do so."""
        if self.broken:
            return False
        try:
            with self.env.begin(write=True) as txn:
                txn.put(STATE, self.state.encode())
        except lmdb.Error as error:
            log.warning("%s is not closed in order: %s", self.directory, error)
            return False
        return True

    # --- batches ------------------------------------------------------------------------------

    def batch(self) -> OwnerBatch:
        """The batch of one chunk of requests. At most one may write at a time: never await with it open."""
        return OwnerBatch(self)

    @contextlib.contextmanager
    def batching(self) -> Iterator[OwnerBatch]:
        """A batch that is closed at the end of the block, or dropped if the block fails."""
        batch = OwnerBatch(self)
        try:
            yield batch
        except BaseException:
            batch.abort()
            raise
        batch.close()

    def raise_ceiling(self, serial: int) -> None:
        """Make sure on disk that no later life gives this serial again."""
        if serial > self._life.life.serial_ceiling:
            self._life.change(serial_ceiling=serial + MEMORY_SERIALS_BLOCK)

    def room_bytes(self) -> int:
        """As `Tables` say, and what could be evicted."""
        with self.batching() as batch:
            return super().room_bytes() + batch.evictable_bytes()

    # --- figures ------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Figures."""
        with self.env.begin() as txn:
            stats = {name: txn.stat(getattr(self, name)) for name in DATABASES}
            keys_bytes = self.keys_bytes(txn)
        entries = {name: stat["entries"] for name, stat in stats.items()}
        used = self.state.declared_bytes + keys_bytes
        info = self.env.info()
        pages = self._pages(stats.values())
        return {
            "capacity_bytes": self.state.capacity_bytes,
            "used_bytes": used,
            "declared_bytes": self.state.declared_bytes,
            "keys_bytes": keys_bytes,
            "reusable_bytes": max(0, (info["last_pgno"] + 1 - pages) * PAGE_BYTES),
            "file_bytes": self.file_bytes(),
            "map_bytes": self.map_bytes,
            "regions": entries["regions"],
            "chunks": entries["chunks"],
            "keys": entries["keys"] - sum(self.copies.values()),
            "hits": self.hits,
            "misses": self.misses,
            "readers": info["num_readers"],
            "transactions": info["last_txnid"],
        }
