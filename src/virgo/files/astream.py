"""File objects for asyncio: what `AsyncFilesClient.open` returns. The methods are Python's own, with `await`.

    async with await cloud.files.open("/n2/table.csv") as file:
        async for line in file:
            ...

`AsyncBinaryFile` reads ahead and gathers what is written, as Python's buffers do; `virgo.files.atext` puts
text on it. Several tasks may use one object: each operation has its turn. A cancelled read takes nothing;
what a cancelled or failed flush did not get through stays to be flushed again (in a file opened for appending
the last piece may then be there twice).

Not promised: `fileno()`, and closing by itself: an object that is dropped while open loses what it had
gathered, and leaves a ResourceWarning and its descriptor behind.
"""

from __future__ import annotations

import asyncio
import io
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any, AnyStr, Generic, TypeVar

from virgo.errors import DiskFull
from virgo.files.calls import FileStatus, Plan, drive_async
from virgo.files.cursor import Cursor
from virgo.wire.call import AsyncRunner

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

T = TypeVar("T")
F = TypeVar("F", bound="AsyncFile[Any]")


class AsyncFile(ABC, Generic[AnyStr]):
    """An open file somewhere in the cloud: of bytes or of text, which differ in what a piece and a line are.

    Attributes:
        name: its path.
        mode: as Python's file objects show it.
    """

    def __init__(self, *, name: str, mode: str) -> None:
        self.name = name
        self.mode = mode
        self._turn = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} mode={self.mode!r}{' closed' if self.closed else ''}>"

    async def __aenter__(self: F) -> F:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[AnyStr]:
        return self

    async def __anext__(self) -> AnyStr:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether it was closed."""

    @abstractmethod
    def readable(self) -> bool:
        """Whether it was opened for reading."""

    @abstractmethod
    def writable(self) -> bool:
        """Whether it was opened for writing."""

    def seekable(self) -> bool:
        """True."""
        return self.readable() or self.writable()

    def isatty(self) -> bool:
        """False."""
        return not self.seekable()

    async def read(self, size: int | None = -1, /) -> AnyStr:
        """At most `size` bytes or characters, by default all to the end; fewer only at the end."""
        async with self._turn:
            await self._begin_reading()
            if size is None or size < 0:
                return await self._read_all()
            ended = False
            while self._unread() < size and not ended:
                ended = not await self._more(size - self._unread())
            return self._take(min(size, self._unread()))

    async def readline(self, size: int | None = -1, /) -> AnyStr:
        """The next line with its end, or at most `size` of it; empty at the end of the file."""
        limit = -1 if size is None else size
        async with self._turn:
            await self._begin_reading()
            searched, ended = 0, False
            while True:
                length = self._line(searched)
                searched = self._unread()
                if length or ended or 0 <= limit <= searched:
                    length = length or searched
                    return self._take(length if limit < 0 else min(length, limit))
                ended = not await self._more(max(searched, io.DEFAULT_BUFFER_SIZE))

    async def readlines(self, hint: int | None = -1, /) -> list[AnyStr]:
        """The lines to the end, or as many as have `hint` bytes or characters together."""
        lines: list[AnyStr] = []
        size = 0
        while line := await self.readline():
            lines.append(line)
            size += len(line)
            if hint is not None and 0 < hint <= size:
                break
        return lines

    async def writelines(self, lines: Iterable[AnyStr], /) -> None:
        """Write each of them; they bring their own line ends."""
        for line in lines:
            await self.write(line)

    @abstractmethod
    async def write(self, data: AnyStr, /) -> int:
        """Write it all; returns its length."""

    @abstractmethod
    async def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move; returns the new position."""

    @abstractmethod
    async def tell(self) -> int:
        """The position of the next read or write."""

    @abstractmethod
    async def truncate(self, size: int | None = None, /) -> int:
        """Set the file's size in bytes, by default to the position; the position stays."""

    @abstractmethod
    async def flush(self) -> None:
        """Send what was gathered to the node."""

    @abstractmethod
    async def sync(self) -> None:
        """Flush, and wait until it is on the disk of its node."""

    @abstractmethod
    async def status(self) -> FileStatus:
        """Size and times now."""

    @abstractmethod
    async def close(self) -> None:
        """Flush and close; raises what the node says, and the file is closed all the same."""

    # --- what reading is made of; the turn is held --------------------------------------------

    @abstractmethod
    async def _begin_reading(self) -> None:
        """Check that it may be read, and flush."""

    @abstractmethod
    async def _read_all(self) -> AnyStr:
        """Take everything to the end."""

    @abstractmethod
    def _unread(self) -> int:
        """How much was read ahead."""

    @abstractmethod
    def _line(self, searched: int) -> int:
        """Length of the first line of what was read ahead; 0 if it has no end. Some was searched before."""

    @abstractmethod
    async def _more(self, wanted: int) -> bool:
        """Read ahead by that much or more; False if the end of the file was met."""

    @abstractmethod
    def _take(self, count: int) -> AnyStr:
        """Hand out from what was read ahead."""


class AsyncBinaryFile(AsyncFile[bytes]):
    """An open file as bytes.

    Args:
        runner: connections to a node.
        cursor: the open file.
        buffer_bytes: how much is read ahead, and how much gathered; 0 for a raw file, whose `write` may write
            less than it was given if the disk fills.
    """

    def __init__(self, runner: AsyncRunner, cursor: Cursor, buffer_bytes: int) -> None:
        super().__init__(name=cursor.name, mode=cursor.mode)
        self._runner = runner
        self._cursor = cursor
        self._buffer_bytes = buffer_bytes
        self._ahead, self._used = b"", 0  # read ahead, and how much of it was handed out
        self._behind = bytearray()  # gathered; never while something is read ahead
        self._closed = False

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def descriptor(self) -> int:
        """The cloud's number of the file."""
        return self._cursor.descriptor

    def readable(self) -> bool:
        """Whether it was opened for reading."""
        return self._open.can.read

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._open.can.write

    async def read1(self, size: int = -1, /) -> bytes:
        """At least one byte, if there is one, and at most `size`, with one request or none."""
        async with self._turn:
            await self._begin_reading()
            size = size if size >= 0 else self._buffer_bytes or io.DEFAULT_BUFFER_SIZE
            if size and not self._unread():
                await self._more(size)
            return self._take(min(size, self._unread()))

    async def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read into the buffer; the count, which is less than its size only at the end."""
        view = memoryview(buffer).cast("B")
        data = await self.read(len(view))
        view[: len(data)] = data
        return len(data)

    async def write(self, data: ReadableBuffer, /) -> int:
        """Write it all, sooner or later; returns its length. See `flush`, `sync`."""
        async with self._turn:
            self._open.check(self._cursor.can.write, "writing")
            view = memoryview(data).cast("B")
            self._rewind()
            if not self._buffer_bytes:
                return await self._drive(self._cursor.write(view))
            if len(self._behind) + len(view) > self._buffer_bytes:
                await self._flush()
            if len(view) <= self._buffer_bytes:
                self._behind += view
            else:
                await self._send(view)
            return len(view)

    async def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to an offset from the start, the position (1) or the end (2)."""
        async with self._turn:
            cursor = self._open
            if self._buffer_bytes and whence not in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END):
                raise ValueError(f"whence value {whence} unsupported")
            await self._flush()
            position = await self._drive(
                cursor.seek(offset - self._unread() if whence == os.SEEK_CUR else offset, whence)
            )
            self._ahead, self._used = b"", 0
            return position

    async def tell(self) -> int:
        """The position of the next read or write."""
        async with self._turn:
            return await self._drive(self._open.tell()) - self._unread() + len(self._behind)

    async def truncate(self, size: int | None = None, /) -> int:
        """Set the file's size in bytes, by default to the position; the position stays."""
        async with self._turn:
            self._open.check(self._cursor.can.write, "writing")
            await self._flush()
            self._rewind()
            return await self._drive(self._cursor.truncate(size))

    async def flush(self) -> None:
        """Send what was gathered to the node."""
        async with self._turn:
            if self._open.can.write:
                await self._flush()

    async def sync(self) -> None:
        """Flush, and wait until it is on the disk of its node."""
        async with self._turn:
            cursor = self._open
            await self._flush()
            await self._drive(cursor.sync())

    async def status(self) -> FileStatus:
        """Size and times now; what is gathered is not yet in them."""
        return await self._drive(self._open.status())

    async def close(self) -> None:
        """Flush and close; raises what the node says, and the file is closed all the same."""
        async with self._turn:
            if self._closed:
                return
            try:
                await self._flush()
            finally:
                self._closed = True
                await self._drive(self._cursor.close())

    @property
    def _open(self) -> Cursor:
        if self._closed:
            raise ValueError("I/O operation on closed file.")
        return self._cursor

    async def _drive(self, plan: Plan[T]) -> T:
        return await drive_async(self._runner, plan)

    async def _flush(self) -> None:
        while self._behind:
            count = await self._drive(self._cursor.write(bytes(self._behind)))
            self._check_moved(count)
            del self._behind[:count]

    async def _send(self, view: memoryview) -> None:
        while view:
            count = await self._drive(self._cursor.write(view))
            self._check_moved(count)
            view = view[count:]

    def _check_moved(self, count: int) -> None:
        if not count:
            raise DiskFull(f"write {self.name!r}: the node took no more")

    def _rewind(self) -> None:
        """Forget what was read ahead: the next read or write is where the user thinks it is."""
        self._cursor.back(self._unread())
        self._ahead, self._used = b"", 0

    async def _begin_reading(self) -> None:
        self._open.check(self._cursor.can.read, "reading")
        await self._flush()

    async def _read_all(self) -> bytes:
        rest = await self._drive(self._cursor.read_all())
        data = self._ahead[self._used :] + rest
        self._ahead, self._used = b"", 0
        return data

    def _unread(self) -> int:
        return len(self._ahead) - self._used

    def _line(self, searched: int) -> int:
        end = self._ahead.find(b"\n", self._used + searched) + 1
        return end - self._used if end else 0

    async def _more(self, wanted: int) -> bool:
        wanted = max(wanted, self._buffer_bytes)
        data = await self._drive(self._cursor.read(wanted))
        self._ahead, self._used = self._ahead[self._used :] + data, 0
        return len(data) == wanted

    def _take(self, count: int) -> bytes:
        data = self._ahead[self._used : self._used + count]
        self._used += count
        if not self._buffer_bytes:
            self._rewind()
        return data
