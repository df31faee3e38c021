"""File objects: what `FilesClient.open` returns, built as Python's own `open` builds them.

`RemoteFile` is a raw file (`io.RawIOBase`) over one descriptor; `open_stream` puts the standard buffers and
text layers on it, so that everything that takes a file object takes these. Buffers are large, since a
read that leaves the process costs a round trip.

Not promised: `fileno()` (there is no descriptor of this process), and a position shared with other
holders of the same descriptor.
"""

from __future__ import annotations

import errno
import io
import os
import warnings
from typing import IO, TYPE_CHECKING, Any

from virgo.files import calls
from virgo.files.calls import AnyPath
from virgo.files.core import Mode, parse_mode
from virgo.limits import FILE_BUFFER_BYTES
from virgo.wire.call import Runner

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class RemoteFile(io.RawIOBase):
    """An open file somewhere in the cloud, unbuffered.

    Attributes:
        name: its path.
        mode: as a raw file of Python shows it: `rb`, `rb+`, `wb`, `ab`, `xb`, ...
        descriptor: the cloud's number of it.
    """

    def __init__(self, runner: Runner, descriptor: int, *, name: str, mode: Mode) -> None:
        super().__init__()
        self._runner = runner
        self._can = mode
        self._position: int | None = None if mode.append else 0  # None: at the end, wherever that is
        self.descriptor = descriptor
        self.name = name
        self.mode = _raw_mode(mode)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"descriptor={self.descriptor}"
        return f"<RemoteFile {self.name!r} mode={self.mode!r} {state}>"

    def readable(self) -> bool:
        """Whether it was opened for reading."""
        self._check_open()
        return self._can.read

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        self._check_open()
        return self._can.write

    def seekable(self) -> bool:
        """True."""
        self._check_open()
        return True

    def tell(self) -> int:
        """The position of the next read or write."""
        self._check_open()
        if self._position is None:
            self._position = self.status().size
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to an offset from the start, the position (1) or the end (2)."""
        self._check_open()
        base = 0
        if whence == os.SEEK_CUR:
            base = self.tell()
        elif whence == os.SEEK_END:
            base = self.status().size
        if whence not in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END) or base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = base + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read into the buffer; 0 at the end."""
        self._check(self._can.read, "reading")
        view = memoryview(buffer).cast("B")
        position = self.tell()
        data = calls.drive(self._runner, calls.reading(self.descriptor, len(view), position))
        view[: len(data)] = data
        self._position = position + len(data)
        return len(data)

    def readall(self) -> bytes:
        """Read to the end."""
        self._check(self._can.read, "reading")
        position = self.tell()
        data = calls.drive(self._runner, calls.reading_all(self.descriptor, position))
        self._position = position + len(data)
        return data

    def write(self, data: ReadableBuffer, /) -> int:
        """Write; returns the count written, which is less only if the disk filled in the middle."""
        self._check(self._can.write, "writing")
        view = memoryview(data).cast("B")
        if not view:
            return 0
        position = 0 if self._can.append else self.tell()
        count = calls.drive(self._runner, calls.writing(self.descriptor, view, position))
        self._position = None if self._can.append else position + count
        return count

    def truncate(self, size: int | None = None, /) -> int:
        """Set the file's size, by default to the position; the position stays."""
        self._check(self._can.write, "writing")
        position = self.tell()  # known before the end moves
        size = position if size is None else size
        if size < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._runner.run(calls.truncate_file(self.descriptor, size))
        return size

    def status(self) -> calls.FileStatus:
        """Size and times now."""
        self._check_open()
        return self._runner.run(calls.descriptor_status(self.descriptor))

    def sync(self) -> None:
        """On return what was written is on the disk of its node. Flush a buffer above it first."""
        self._check_open()
        self._runner.run(calls.sync_file(self.descriptor))

    def close(self) -> None:
        """Close; raises what the node says, and the file is closed all the same."""
        if not self.closed:
            try:
                super().close()
            finally:
                self._runner.run(calls.close_file(self.descriptor))

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file.")

    def _check(self, may: bool, what: str) -> None:
        self._check_open()
        if not may:
            raise io.UnsupportedOperation(f"{self.name!r} is not open for {what}")


def open_stream(
    runner: Runner,
    path: AnyPath,
    mode: str = "r",
    *,
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
) -> IO[Any]:
    """A file object as Python's `open` returns it. See `FilesClient.open`."""
    can = parse_mode(mode)
    binary = "b" in mode
    if binary and (encoding, errors, newline) != (None, None, None):
        raise ValueError("binary mode takes no encoding, errors or newline")
    if buffering == 0 and not binary:
        raise ValueError("text cannot be unbuffered; use binary mode or buffering=1")
    if buffering == 1 and binary:
        warnings.warn("line buffering means nothing in binary mode", RuntimeWarning, stacklevel=3)
    raw = RemoteFile(runner, runner.run(calls.open_file(path, mode)), name=calls.plain(path), mode=can)
    try:
        if buffering == 0:
            return raw  # type: ignore[return-value]
        size = buffering if buffering > 1 else FILE_BUFFER_BYTES
        buffer: Any
        if can.read and can.write:
            buffer = io.BufferedRandom(raw, size)
        elif can.write:
            buffer = io.BufferedWriter(raw, size)
        else:
            buffer = io.BufferedReader(raw, size)
        if binary:
            return buffer  # type: ignore[no-any-return]
        text = io.TextIOWrapper(buffer, encoding or "utf-8", errors, newline, line_buffering=buffering == 1)
        text.mode = mode  # type: ignore[misc]
        return text
    except BaseException:
        raw.close()
        raise


def _raw_mode(mode: Mode) -> str:
    if mode.exclusive:
        kind = "xb"
    elif mode.append:
        kind = "ab"
    elif mode.read:
        return "rb+" if mode.write else "rb"
    else:
        kind = "wb"
    return kind + "+" if mode.read else kind
