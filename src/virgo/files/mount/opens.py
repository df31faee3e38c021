"""Files of this machine that programs have open: passed through to the kernel, else by descriptors at hand.

All programs that have a file open share one registration with the kernel (`backing`), as it demands, and
one record in the table. A process that needs a descriptor of an open file, to sync it for example, opens it
by its names; if it has none any more, it takes that of the process which opened it.

What lets its user do more than he may (set-user-ID) ends with a write, which the kernel leaves to us. So a
file of that kind is not passed through to who may write, and one that is cannot become of that kind
meanwhile.

Only who may register files (CAP_SYS_ADMIN) can pass through; without it the server reads and writes itself.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace

from virgo.files import posix
from virgo.files.mount import counters
from virgo.files.mount.table import OpenFile, Table
from virgo.files.posix import Descriptor
from virgo.kernel import at
from virgo.kernel.fuse import device
from virgo.kernel.fuse.protocol import OPEN_OUT, Opened, version_of
from virgo.limits import MOUNT_OPEN_SPARE_MAX, MOUNT_SWEEP_S

log = logging.getLogger("virgo.files.mount")
_CANNOT = (errno.EPERM, errno.ELOOP, errno.EOPNOTSUPP, errno.EINVAL)


class LocalOpens:
    """See the module; `OpenFiles` of one tree in one worker.

    Args:
        mount: descriptor of the mount.
        passes: whether files are passed through, if they can be.
        counts: see `counters`.

    Attributes:
        reopen: opens a node by its names, with flags; set by the tree.
    """

    reopen: Callable[[int, int], Descriptor]

    def __init__(self, mount: int, table: Table, *, passes: bool, counts: memoryview[int]) -> None:
        self._mount = mount
        self._table = table
        self._passes = passes
        self._held: dict[tuple[int, bool], Descriptor] = {}
        self._swept = time.monotonic()
        self._counts = counts

    def __repr__(self) -> str:
        return f"<LocalOpens {len(self._held)} at hand>"

    # --- opening and closing ------------------------------------------------------------------

    def opened(self, node: int, flags: int, handle: Descriptor) -> bytes:
        """See `OpenFiles`."""
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        privileged = writes and posix.privileged(handle.number)
        holder = (os.getpid(), handle.number)
        with self._table.changing() as txn:
            before = self._table.opened(node, txn)
            file = before or OpenFile(0, 0 if privileged else self._register(handle))
            if privileged and file.backing:
                posix.drop_privileges(handle.number)
            if writes and not file.writer[0]:
                file = replace(file, writer=holder)
                self._held[node, True] = handle
            elif not writes and not file.reader[0]:
                file = replace(file, reader=holder)
                self._held[node, False] = handle
            self._table.set_open(node, replace(file, count=file.count + 1), txn)
            how = Opened.PASSTHROUGH
            if not file.backing:
                version = version_of(posix.look_at(handle.number).attributes)
                how = Opened.KEEP_CACHE if self._table.see(node, version, txn) else Opened(0)
        self._counts[counters.PASSED_THROUGH if file.backing else counters.SERVED] += 1
        return OPEN_OUT.pack(0, how, file.backing)

    def _register(self, opened: Descriptor) -> int:
        if not self._passes:
            return 0
        try:
            return device.backing_open(self._mount, opened.number)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            log.warning("files are not passed through: %s", error.strerror)
            self._passes = error.errno != errno.EPERM
            return 0

    def may_be_privileged(self, node: int) -> bool:
        """See `OpenFiles`."""
        file = self._table.opened(node)
        return file is None or not file.backing or file.writer == (0, 0)

    def release(self, node: int) -> None:
        """See `OpenFiles`."""
        with self._table.changing() as txn:
            closed = self._table.release(node, txn)
            if closed is not None:
                self._held.pop((node, True), None)
                self._held.pop((node, False), None)
                if closed.backing:
                    device.backing_close(self._mount, closed.backing)
        self._sweep()

    # --- descriptors --------------------------------------------------------------------------

    def descriptor(self, node: int, *, writes: bool) -> Descriptor:
        """A descriptor to read or write an open file by, or one that is just to be changed."""
        found = self._held.get((node, writes)) or (None if writes else self._held.get((node, True)))
        if found is not None:
            return found
        try:
            found = self.reopen(node, os.O_RDWR if writes else os.O_RDONLY)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            found = self._borrowed(node, writes=writes)
        with self._table.changing() as txn:
            if self._table.opened(node, txn) is not None:
                found = self._held.setdefault((node, writes), found)
        self._sweep()
        return found

    def nameless(self, node: int) -> Descriptor:
        """A descriptor of a file that has no name. Raises ESTALE."""
        with contextlib.suppress(OSError):
            return self._borrowed(node, writes=True)
        return self._borrowed(node, writes=False)

    def _borrowed(self, node: int, *, writes: bool) -> Descriptor:
        file = self._table.opened(node)
        if file is None:
            raise posix.stale()
        process, number = file.writer if writes or not file.reader[0] else file.reader
        if not process:
            raise posix.stale()
        if process == os.getpid():
            held = self._held.get((node, True)) if writes else None
            held = held or self._held.get((node, False)) or self._held.get((node, True))
            if held is None:
                raise posix.stale()
            return held
        try:
            found = Descriptor(at.descriptor_of(process, number))
        except OSError as error:
            raise posix.stale() from error
        if posix.identity_of(found.number) != self._table.identity(node):
            raise posix.stale()
        return found

    def _sweep(self) -> None:
        """Let go of descriptors whose files were closed by way of another process."""
        now = time.monotonic()
        if now - self._swept < MOUNT_SWEEP_S and len(self._held) < MOUNT_OPEN_SPARE_MAX:
            return
        self._swept = now
        with self._table.changing() as txn:
            for node, writes in list(self._held):
                if self._table.opened(node, txn) is None:
                    self._held.pop((node, writes), None)

    # --- data that is not passed through ------------------------------------------------------

    def read(self, node: int, offset: int, size: int) -> bytes:
        """See `OpenFiles`."""
        held = self.descriptor(node, writes=False)
        return os.pread(held.number, size, offset)

    def write(self, node: int, offset: int, data: memoryview, *, append: bool, drop: bool) -> int:
        """See `OpenFiles`; of one machine the kernel itself says where the end is."""
        held = self.descriptor(node, writes=True)
        if drop:
            posix.drop_privileges(held.number)
        return os.pwrite(held.number, data, offset)

    def sync(self, node: int, *, data_only: bool) -> None:
        """See `OpenFiles`."""
        held = self.descriptor(node, writes=False)
        (os.fdatasync if data_only else os.fsync)(held.number)

    def allocate(self, node: int, mode: int, offset: int, length: int) -> None:
        """See `OpenFiles`."""
        held = self.descriptor(node, writes=True)
        at.allocate(held.number, mode, offset, length)

    def seek(self, node: int, offset: int, whence: int) -> int:
        """See `OpenFiles`; by a descriptor of its own, for that has the position."""
        opened = self.reopen(node, os.O_RDONLY)
        return os.lseek(opened.number, offset, whence)

    def copy(self, node: int, offset: int, target: int, target_offset: int, length: int) -> int:
        """See `OpenFiles`."""
        source = self.descriptor(node, writes=False)
        sink = self.descriptor(target, writes=True)
        return os.copy_file_range(source.number, sink.number, length, offset, target_offset)
