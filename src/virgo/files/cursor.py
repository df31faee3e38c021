"""An open file apart from I/O: its position, what its mode allows, and the requests that follow from both.

`Cursor` gives plans (see `virgo.files.calls`), which the blocking and the asyncio file objects drive, so both
move and refuse alike. A position changes only when its plan has ended: a read or write that fails or is
cancelled can be tried again.
"""

from __future__ import annotations

import errno
import io
import os
from typing import Any

from virgo.files import calls
from virgo.files.calls import FileStatus, Plan
from virgo.files.core import Mode


class Cursor:
    """Where the next read or write of a descriptor happens.

    Attributes:
        descriptor: the cloud's number of the file.
        name: its path.
        can: what it was opened for.
    """

    __slots__ = ("_position", "can", "descriptor", "name")

    def __init__(self, descriptor: int, *, name: str, mode: Mode) -> None:
        self.descriptor = descriptor
        self.name = name
        self.can = mode
        self._position: int | None = None if mode.append else 0  # None: at the end, wherever that is

    def __repr__(self) -> str:
        return f"<Cursor {self.name!r} at {'the end' if self._position is None else self._position}>"

    @property
    def mode(self) -> str:
        """The mode as a raw file of Python shows it: `rb`, `rb+`, `wb`, `ab`, `xb`, ..."""
        if self.can.exclusive:
            kind = "xb"
        elif self.can.append:
            kind = "ab"
        elif self.can.read:
            return "rb+" if self.can.write else "rb"
        else:
            kind = "wb"
        return kind + "+" if self.can.read else kind

    def tell(self) -> Plan[int]:
        """The position of the next read or write."""
        if self._position is None:
            self._position = (yield from self.status()).size
        return self._position

    def seek(self, offset: int, whence: int) -> Plan[int]:
        """Move to an offset from the start, the position (1) or the end (2)."""
        base = 0
        if whence == os.SEEK_CUR:
            base = yield from self.tell()
        elif whence == os.SEEK_END:
            base = (yield from self.status()).size
        if whence not in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END) or base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = base + offset
        return self._position

    def back(self, count: int) -> None:
        """Move back by what was read and is not wanted after all; the position is known then."""
        if count:
            assert self._position is not None and self._position >= count
            self._position -= count

    def read(self, size: int) -> Plan[bytes]:
        """At most `size` bytes, fewer only at the end of the file."""
        self.check(self.can.read, "reading")
        position = yield from self.tell()
        data = yield from calls.reading(self.descriptor, size, position)
        self._position = position + len(data)
        return data

    def read_all(self) -> Plan[bytes]:
        """All bytes to the end of the file."""
        self.check(self.can.read, "reading")
        position = yield from self.tell()
        data = yield from calls.reading_all(self.descriptor, position)
        self._position = position + len(data)
        return data

    def write(self, data: Any) -> Plan[int]:
        """Write; the count written, which is less only if the disk filled in the middle."""
        self.check(self.can.write, "writing")
        view = memoryview(data).cast("B")
        if not view:
            return 0
        position = 0 if self.can.append else (yield from self.tell())
        count = yield from calls.writing(self.descriptor, view, position)
        self._position = None if self.can.append else position + count
        return count

    def truncate(self, size: int | None) -> Plan[int]:
        """Set the file's size, by default to the position; the position stays."""
        self.check(self.can.write, "writing")
        position = yield from self.tell()  # known before the end moves
        size = position if size is None else size
        if size < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        yield from calls.single(calls.truncate_file(self.descriptor, size))
        return size

    def status(self) -> Plan[FileStatus]:
        """Size and times now."""
        return calls.single(calls.descriptor_status(self.descriptor))

    def sync(self) -> Plan[None]:
        """On its end what was written is on the disk of its node."""
        return calls.single(calls.sync_file(self.descriptor))

    def close(self) -> Plan[None]:
        """End the descriptor."""
        return calls.single(calls.close_file(self.descriptor))

    def check(self, may: bool, what: str) -> None:
        """Raise UnsupportedOperation if the mode does not allow it."""
        if not may:
            raise io.UnsupportedOperation(f"{self.name!r} is not open for {what}")
