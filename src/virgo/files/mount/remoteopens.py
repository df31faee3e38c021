"""Files of another machine that programs have open: one descriptor of the cloud for all of them, or two.

Close-to-open: who opens a file sees what others had written when they closed it. So each open asks the node
for the file's attributes, and if they are not those of the last time, the kernel forgets what it had read.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from virgo.errors import BadDescriptor, VirgoError
from virgo.files.mount import counters
from virgo.files.mount.far import Far
from virgo.files.mount.table import OpenFile, Table
from virgo.kernel.fuse import device
from virgo.kernel.fuse.protocol import OPEN_OUT, Opened, version_of

_INT = msgspec.msgpack.Decoder(int)
_OF_THE_CLOUD = 0  # in place of a process


@dataclass(frozen=True, slots=True)
class Handle:
    """A file that was just opened: the cloud's descriptor, and the attributes it had then."""

    descriptor: int
    attributes: bytes


class RemoteOpens:
    """See the module; `OpenFiles` of one tree in one worker.

    Args:
        mount: descriptor of the mount.
        far_of: the node that has the file of a descriptor.
        counts: see `counters`.
    """

    def __init__(
        self, mount: int, table: Table, far_of: Callable[[int], Far], counts: memoryview[int]
    ) -> None:
        self._mount = mount
        self._table = table
        self._far_of = far_of
        self._counts = counts

    def __repr__(self) -> str:
        return f"<RemoteOpens of mount {self._mount}>"

    # --- opening and closing ------------------------------------------------------------------

    def opened(self, node: int, flags: int, handle: Handle) -> bytes:
        """See `OpenFiles`."""
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        held = (_OF_THE_CLOUD, handle.descriptor)
        surplus = False
        with self._table.changing() as txn:
            file = self._table.opened(node, txn) or OpenFile(0)
            if writes and not file.writer[1]:
                file = replace(file, writer=held)
            elif not writes and not file.reader[1]:
                file = replace(file, reader=held)
            else:
                surplus = True
            self._table.set_open(node, replace(file, count=file.count + 1), txn)
            known = self._table.see(node, version_of(handle.attributes), txn)
        if surplus:
            self._close(handle.descriptor)
        if not known:
            self._counts[counters.INVALIDATIONS] += 1
            device.invalidate_node(self._mount, node, -1)  # attributes; the content goes with this open
        self._counts[counters.SERVED] += 1
        how = Opened.KEEP_CACHE if known else Opened(0)
        if flags & os.O_APPEND:  # only the node knows where the end is
            how |= Opened.DIRECT_IO
        return OPEN_OUT.pack(0, how, 0)

    def release(self, node: int) -> None:
        """See `OpenFiles`."""
        with self._table.changing() as txn:
            closed = self._table.release(node, txn)
        if closed is not None:
            for _, descriptor in (closed.reader, closed.writer):
                if descriptor:
                    self._close(descriptor)

    def _close(self, descriptor: int) -> None:
        with contextlib.suppress(VirgoError):  # the node is away: it closes what nobody uses
            self._far_of(descriptor).execute("VIRGO_CLOSE", descriptor)

    def may_be_privileged(self, node: int) -> bool:
        """See `OpenFiles`; every write comes by here."""
        return True

    def descriptor(self, node: int, *, writes: bool = False) -> int:
        """The cloud's descriptor of an open file, 0 if it has none of that kind."""
        file = self._table.opened(node)
        if file is None:
            return 0
        return file.writer[1] if writes else file.reader[1] or file.writer[1]

    def _needed(self, node: int, *, writes: bool = False) -> int:
        found = self.descriptor(node, writes=writes)
        if not found:
            raise BadDescriptor("the file is not open")
        return found

    # --- data ---------------------------------------------------------------------------------

    def read(self, node: int, offset: int, size: int) -> bytes:
        """See `OpenFiles`."""
        descriptor = self._needed(node)
        return bytes(self._far_of(descriptor).execute("VIRGO_READ", descriptor, size, offset))

    def write(self, node: int, offset: int, data: memoryview, *, append: bool, drop: bool) -> int:
        """See `OpenFiles`."""
        descriptor = self._needed(node, writes=True)
        far = self._far_of(descriptor)
        if drop:
            far.do("DROP_PRIVILEGES", descriptor)
        if append:
            far.act(_INT, "APPEND", descriptor, bytes(data))
            return len(data)
        return int(far.execute("VIRGO_WRITE", descriptor, bytes(data), offset))

    def sync(self, node: int, *, data_only: bool) -> None:
        """See `OpenFiles`."""
        descriptor = self._needed(node)
        self._far_of(descriptor).execute("FILES.SYNC", descriptor)

    def allocate(self, node: int, mode: int, offset: int, length: int) -> None:
        """See `OpenFiles`."""
        descriptor = self._needed(node, writes=True)
        self._far_of(descriptor).do("ALLOCATE", descriptor, mode, offset, length)

    def seek(self, node: int, offset: int, whence: int) -> int:
        """See `OpenFiles`."""
        descriptor = self._needed(node)
        return self._far_of(descriptor).act(_INT, "SEEK", descriptor, offset, whence)

    def copy(self, node: int, offset: int, target: int, target_offset: int, length: int) -> int:
        """See `OpenFiles`."""
        source, sink = self._needed(node), self._needed(target, writes=True)
        far = self._far_of(source)
        if far is not self._far_of(sink):  # on two nodes: the program copies
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return far.act(_INT, "COPY", source, offset, sink, target_offset, length)


def always(far: Far) -> Callable[[int], Far]:
    """For files that all are of one node."""
    return lambda _descriptor: far
