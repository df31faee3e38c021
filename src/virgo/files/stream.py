"""File objects: what `FilesClient.open` returns, built as Python's own `open` builds them.

`RemoteFile` is a raw file (`io.RawIOBase`) over one descriptor; `open_stream` puts the standard buffers and
text layers on it, so that everything that takes a file object takes these. Buffers are large, since a
read that leaves the process costs a round trip.

Not promised: `fileno()` (there is no descriptor of this process), and a position shared with other
holders of the same descriptor.
"""

from __future__ import annotations

import io
import os
import warnings
from typing import IO, TYPE_CHECKING, Any

from virgo.files import calls
from virgo.files.calls import AnyPath, FileStatus, drive
from virgo.files.core import Mode, parse_mode
from virgo.files.cursor import Cursor
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

    def __init__(self, runner: Runner, cursor: Cursor) -> None:
        super().__init__()
        self._runner = runner
        self._cursor = cursor
        self.descriptor = cursor.descriptor
        self.name = cursor.name
        self.mode = cursor.mode

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"descriptor={self.descriptor}"
        return f"<RemoteFile {self.name!r} mode={self.mode!r} {state}>"

    def readable(self) -> bool:
        """Whether it was opened for reading."""
        return self._open.can.read

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._open.can.write

    def seekable(self) -> bool:
        """True."""
        return bool(self._open)

    def tell(self) -> int:
        """The position of the next read or write."""
        return drive(self._runner, self._open.tell())

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to an offset from the start, the position (1) or the end (2)."""
        return drive(self._runner, self._open.seek(offset, whence))

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read into the buffer; 0 at the end."""
        view = memoryview(buffer).cast("B")
        data = drive(self._runner, self._open.read(len(view)))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """Read to the end."""
        return drive(self._runner, self._open.read_all())

    def write(self, data: ReadableBuffer, /) -> int:
        """Write; returns the count written, which is less only if the disk filled in the middle."""
        return drive(self._runner, self._open.write(data))

    def truncate(self, size: int | None = None, /) -> int:
        """Set the file's size, by default to the position; the position stays."""
        return drive(self._runner, self._open.truncate(size))

    def status(self) -> FileStatus:
        """Size and times now."""
        return drive(self._runner, self._open.status())

    def sync(self) -> None:
        """On return what was written is on the disk of its node. Flush a buffer above it first."""
        drive(self._runner, self._open.sync())

    def close(self) -> None:
        """Close; raises what the node says, and the file is closed all the same."""
        if not self.closed:
            try:
                super().close()
            finally:
                drive(self._runner, self._cursor.close())

    @property
    def _open(self) -> Cursor:
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        return self._cursor


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
    can = check_arguments(mode, buffering, encoding, errors, newline)
    binary = "b" in mode
    descriptor = runner.run(calls.open_file(path, mode))
    raw = RemoteFile(runner, Cursor(descriptor, name=calls.plain(path), mode=can))
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


def check_arguments(
    mode: str, buffering: int, encoding: str | None, errors: str | None, newline: str | None
) -> Mode:
    """The meaning of the mode, if the arguments of an open go together. Raises BadArgument, ValueError."""
    can = parse_mode(mode)
    binary = "b" in mode
    if binary and (encoding, errors, newline) != (None, None, None):
        raise ValueError("binary mode takes no encoding, errors or newline")
    if buffering == 0 and not binary:
        raise ValueError("text cannot be unbuffered; use binary mode or buffering=1")
    if buffering == 1 and binary:
        warnings.warn("line buffering means nothing in binary mode", RuntimeWarning, stacklevel=4)
    return can
