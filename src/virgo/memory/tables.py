"""The tables of a node's store as a process has them open: the owner, or a client that may write.

Knows what must be known to change something: how much room there is, which transaction was the last, what
an error of LMDB means. Several processes write, one at a time: whoever finds that another one has written
since catches up first.
"""

from __future__ import annotations

import functools
import os
import struct
import time
from pathlib import Path
from typing import Any, NamedTuple

import lmdb

from virgo.errors import BadArgument, DiskFull, FileRefused, PoolFull, VirgoError
from virgo.limits import MEMORY_GROUND_SPARE_BYTES, MiB
from virgo.memory.ground import Ground
from virgo.memory.heads import PAGE_BYTES
from virgo.memory.sketch import Sketch

DATABASES = ("regions", "data", "chunks", "reserved", "keys", "due", "gone", "spaces", "claims", "held")
FORMAT = 3  # of all that is kept; a change of it empties the pool
STATE, IDENTITY = b"state", b"identity"
_STATE = struct.Struct("<QQQ?I?")
_LAST_BYTES = 1 * MiB  # of the ground, for the owner to say how things are
_NEARLY_FULL_BYTES = 1 * MiB
_POLL_S = 0.0005
_READERS_CHECK_TRANSACTIONS = 64  # so that looking costs nothing, and little can be written in between


class State(NamedTuple):
    """What the owner lets the others know.

    Attributes:
        serial: the last serial given to a region.
        declared_bytes: of regions and reservations.
        capacity_bytes: how much these and the keys may take together.
        open: whether an owner has the store; one that was killed leaves it so.
        spaces: how many namespaces are declared.
        evicts: whether keys outside of caches may be evicted too.
    """

    serial: int = 0
    declared_bytes: int = 0
    capacity_bytes: int = 0
    open: bool = False
    spaces: int = 0
    evicts: bool = False

    def encode(self) -> bytes:
        """The record under STATE."""
        return _STATE.pack(*self)

    @classmethod
    def read(cls, txn: Any) -> State:
        """The state as of a transaction."""
        record = txn.get(STATE)
        return cls(*_STATE.unpack(record)) if record else cls()


class Tables:
    """The tables, open.

    Args:
        env: the LMDB environment.
        directory: its files.
        map_bytes: its address space.
        ground: the blocks under its file; None if it is not written through the map.

    Attributes:
        regions, data, chunks, reserved, keys, due, gone, spaces, claims, held: the databases.
        state: as last written or read here.
        untold: whether the next change has to write the state.
        pressed: whether room may have run out; see `Batch.close`.
        broken: why the files have to be opened anew, or "".
        grounded: False once there was no ground for a change.
        hits, misses: gets of keys that were there, or not.
        waiting_since: monotonic time since when the right to write is waited for here, or 0.
        helped: whether a stopped client is being let go on, so that it gives that right up.
    """

    def __init__(self, env: Any, directory: Path, map_bytes: int, ground: Ground | None) -> None:
        self.directory = directory
        self.map_bytes = map_bytes
        self._use(env, ground)
        self.state = State()
        self.untold = False
        self.broken = ""
        self.pressed = True
        self.hits = self.misses = 0
        self.keys_size_bytes = 0  # when they were last measured
        self.keys_grown_bytes = 0  # at most, since then
        self.last_id = 0  # of the last transaction that is known to have written
        self.waiting_since = 0.0
        self.helped = False
        self._readers_checked_id = 0
        self.apart_bytes = 0  # declared, of regions that have files of their own

    def __repr__(self) -> str:
        return f"<Tables in {self.directory}>"

    def _use(self, env: Any, ground: Ground | None) -> None:
        """Go on with that environment."""
        self.env = env
        self.ground = ground
        self.grounded = True
        self.spare_bytes = -1  # of the ground, beyond what is in use; below 0 if it has to be measured
        databases = [env.open_db(name.encode()) for name in DATABASES]
        self.regions, self.data, self.chunks, self.reserved, self.keys, self.due = databases[:6]
        self.gone, self.spaces, self.claims, self.held = databases[6:]

    @functools.cached_property
    def sketch(self) -> Sketch:
        """The uses of keys that may be evicted."""
        return Sketch(self.directory, create=False)

    def catch_up(self, txn: Any) -> None:
        """Know what others have written. `txn` writes."""
        self.state = State.read(txn)
        self.measure_keys(txn)
        self.spare_bytes = -1

    def stand(self, using_bytes: int) -> int:
        """Have ground for so much beyond what is in use, and tell how much is left. Raises DiskFull.

        On a full disk what is to spare may be used, since most changes use pages that others have left.
        """
        ground = self.ground
        if ground is None or ground.taken >= ground.bytes_max:
            return self.map_bytes
        upto = (self.env.info()["last_pgno"] + 1) * PAGE_BYTES + using_bytes
        spare = MEMORY_GROUND_SPARE_BYTES
        try:
            if upto + spare > ground.taken:
                ground.take(upto + spare)
        except DiskFull:
            spare = _LAST_BYTES
            if upto + spare > ground.taken:
                self.grounded = False
                raise
        return int(ground.taken - upto - spare)

    def have_right(self) -> None:
        """The right to write is waited for no longer.

        If a stopped client was let go on for it, this is where it is stopped again: now it cannot be in the
        middle of its next change, in which the next to write would have to wait for it anew.
        """
        self.waiting_since = 0.0
        while self.helped:
            time.sleep(_POLL_S)

    def free_dead_readers(self) -> None:
        """Now and then, once half of the map is in use: what a killed reader saw is kept until then."""
        if self.last_id - self._readers_checked_id >= _READERS_CHECK_TRANSACTIONS:
            self._readers_checked_id = self.last_id
            if self.env.info()["last_pgno"] * PAGE_BYTES > self.map_bytes // 2:
                self.env.reader_check()

    def fault(self, error: lmdb.Error) -> VirgoError:
        """The typed error for one of LMDB; what it means for the tables is noted."""
        failure = fault(self.directory, error)
        if isinstance(failure, PoolFull | DiskFull):
            self.pressed = True
        elif isinstance(error, (lmdb.PanicError, lmdb.CorruptedError)):
            self.broken = str(error)
        return failure

    # --- figures ------------------------------------------------------------------------------

    def keys_bytes(self, txn: Any = None) -> int:
        """Bytes of the pages that hold keys."""
        if txn is None:
            with self.env.begin() as reading:
                stat = reading.stat(self.keys)
        else:
            stat = txn.stat(self.keys)
        pages: int = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return pages * PAGE_BYTES

    def measure_keys(self, txn: Any) -> None:
        """Take the exact size of the keys as the base of what is counted on."""
        self.keys_size_bytes, self.keys_grown_bytes = self.keys_bytes(txn), 0

    def used_bytes(self) -> int:
        """What counts against the capacity."""
        return self.state.declared_bytes + self.keys_bytes()

    def file_bytes(self) -> int:
        """What the file takes on the disk; it grows as values are set, and never shrinks."""
        return (self.directory / "data.mdb").stat().st_blocks * 512

    def room_bytes(self) -> int:
        """What may still be added: within the capacity, and on the disk besides what is only declared."""
        used = self.used_bytes()
        disk = disk_free_bytes(self.directory) - max(0, used - self.apart_bytes - self.file_bytes())
        return max(0, min(self.state.capacity_bytes - used, disk))


def disk_free_bytes(directory: Path) -> int:
    """Room on the file system below."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def fault(directory: Path, error: lmdb.Error) -> VirgoError:
    """The typed error for one of LMDB."""
    what = f"the memory pool in {directory}"
    if isinstance(error, (lmdb.MapFullError, lmdb.TxnFullError)):
        return PoolFull(f"{what} is full")
    if isinstance(error, lmdb.BadValsizeError):
        return BadArgument(f"{what} does not take a key of that size", hint="1 to 500 bytes.")
    # A short write is reported as an I/O error, so look at the disk itself.
    if isinstance(error, lmdb.DiskError) or disk_free_bytes(directory) < _NEARLY_FULL_BYTES:
        return DiskFull(f"the disk under {what} is full")
    return FileRefused(f"{what}: {error}", hint="The node's log and the kernel's say more.")
