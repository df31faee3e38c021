"""Text files for asyncio: `AsyncTextFile` over an `AsyncBinaryFile`, as `io.TextIOWrapper` is over a buffer.

Encoding, error handling and line ends mean what they mean for Python's `open`; the codecs are Python's. As
there, the number that `tell` gives means nothing but to `seek`, and text that is written after a read without
`seek` lies behind the piece that was decoded ahead. Unlike there, `tell` also works within an iteration.
"""

from __future__ import annotations

import bisect
import codecs
import io
import os
import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from virgo.files.astream import AsyncBinaryFile, AsyncFile
from virgo.files.calls import FileStatus

_ANY_END = re.compile(r"\r\n|\r|\n")

# A place in a text: the byte at which a decoder begins, how many characters it then skips, and its state.
_FIELD_BITS = 64
_FIELD = (1 << _FIELD_BITS) - 1


@dataclass(frozen=True, slots=True)
class TextFormat:
    """How characters become bytes; see `text_format`."""

    encoding: str
    errors: str
    newline: str | None

    def encoder(self) -> codecs.IncrementalEncoder:
        """A fresh encoder."""
        return codecs.getincrementalencoder(self.encoding)(self.errors)

    def decoder(self) -> Any:
        """A fresh decoder; it joins the halves of a line end, and translates it if `newline` says so."""
        decoder = codecs.getincrementaldecoder(self.encoding)(self.errors)
        if self.newline:
            return decoder
        return io.IncrementalNewlineDecoder(decoder, translate=self.newline is None)


def text_format(encoding: str | None, errors: str | None, newline: str | None) -> TextFormat:
    """What the arguments of an open mean; the encoding is UTF-8 unless it is given.

    Raises:
        LookupError: no such encoding, or none of text. ValueError: `newline` is no line end.
    """
    with io.TextIOWrapper(io.BytesIO(), encoding or "utf-8", errors, newline) as probe:  # Python's own checks
        return TextFormat(probe.encoding, probe.errors or "strict", newline)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some bytes, the state of the decoder before them, and how many characters came of them."""

    state: tuple[bytes, int]
    data: bytes
    characters: int


class AsyncTextFile(AsyncFile[str]):
    """An open file as text.

    Attributes:
        buffer: the file as bytes.
        line_buffering: whether it is flushed after each line end.
    """

    def __init__(
        self, buffer: AsyncBinaryFile, layout: TextFormat, *, mode: str, line_buffering: bool
    ) -> None:
        super().__init__(name=buffer.name, mode=mode)
        self.buffer = buffer
        self.line_buffering = line_buffering
        self._format = layout
        self._encoder = layout.encoder()
        self._decoder = layout.decoder()
        self._state_at_start: int = self._decoder.getstate()[1]
        self._text, self._used = "", 0  # decoded, and how much of it was handed out
        self._pieces: deque[_Piece] = deque()  # what _text came of

    @property
    def encoding(self) -> str:
        """Name of the encoding."""
        return self._format.encoding

    @property
    def errors(self) -> str:
        """What happens to characters that cannot be coded."""
        return self._format.errors

    @property
    def newlines(self) -> Any:
        """The line ends met so far: None, one, or a tuple."""
        return getattr(self._decoder, "newlines", None)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self.buffer.closed

    def readable(self) -> bool:
        """Whether it was opened for reading."""
        return self.buffer.readable()

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self.buffer.writable()

    async def write(self, text: str, /) -> int:
        """Write it all, sooner or later; returns the count of characters. See `flush`, `sync`."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        async with self._turn:
            self._check(self.writable(), "writing")
            end = self._format.newline or "\n"
            data = self._encoder.encode(text if end == "\n" else text.replace("\n", end))
            self._forget()
            await self.buffer.write(data)
            if self.line_buffering and ("\n" in text or "\r" in text):
                await self.buffer.flush()
            return len(text)

    async def tell(self) -> int:
        """A number for `seek`: where the next character begins."""
        async with self._turn:
            position = await self.buffer.tell()
            self._drop_used()
            position -= sum(len(piece.data) for piece in self._pieces)
            kept, flags = self._pieces[0].state if self._pieces else self._decoder.getstate()
            position -= len(kept)
            done = skipped = 0
            if self._used:
                done, flags, skipped = self._find(kept + self._pieces[0].data, flags)
            flags ^= self._state_at_start
            return position + done | skipped << _FIELD_BITS | flags << 2 * _FIELD_BITS

    def _find(self, data: bytes, flags: int) -> tuple[int, int, int]:
        """Where in a piece the next character is: bytes before it, decoder's state, characters to skip."""
        decoder, state = self._decoder, self._decoder.getstate()

        def characters(count: int) -> int:
            decoder.setstate((b"", flags))
            return len(decoder.decode(data[:count]))

        try:
            count = bisect.bisect_right(range(len(data) + 1), self._used, key=characters) - 1
            while True:  # back to where the decoder holds no part of a character
                found = characters(count)
                kept, there = decoder.getstate()
                if not kept:
                    return count, there, self._used - found
                count -= 1
        finally:
            decoder.setstate(state)

    async def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to what `tell` gave, to the start, or with offset 0 to the position (1) or the end (2)."""
        if whence not in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END):
            raise ValueError(f"invalid whence ({whence}, should be 0, 1 or 2)")
        if whence != os.SEEK_SET and offset:
            raise io.UnsupportedOperation("text moves from the position and the end only by 0")
        if offset < 0:
            raise ValueError(f"negative seek position {offset}")
        if whence == os.SEEK_CUR:
            offset = await self.tell()
        async with self._turn:
            if whence == os.SEEK_END:
                offset = await self.buffer.seek(0, os.SEEK_END)
            else:
                await self.buffer.seek(offset & _FIELD)
            self._forget()
            self._decoder.setstate((b"", offset >> 2 * _FIELD_BITS ^ self._state_at_start))
            skipped = offset >> _FIELD_BITS & _FIELD
            while self._unread() < skipped:
                if not await self._more(skipped):
                    break
            if self._unread() < skipped:
                raise OSError(f"{self.name!r} is not what it was when tell() gave {offset}")
            self._used += skipped
            if offset:
                self._encoder.setstate(0)
            else:
                self._encoder.reset()
            return offset

    async def truncate(self, size: int | None = None, /) -> int:
        """Set the file's size in bytes, by default to the position of `buffer`; the position stays."""
        return await self.buffer.truncate(size)

    async def flush(self) -> None:
        """Send what was gathered to the node."""
        await self.buffer.flush()

    async def sync(self) -> None:
        """Flush, and wait until it is on the disk of its node."""
        await self.buffer.sync()

    async def status(self) -> FileStatus:
        """Size and times now; what is gathered is not yet in them."""
        return await self.buffer.status()

    async def close(self) -> None:
        """Flush and close; raises what the node says, and the file is closed all the same."""
        async with self._turn:
            await self.buffer.close()

    def _check(self, may: bool, what: str) -> None:
        if not may:
            raise io.UnsupportedOperation(f"{self.name!r} is not open for {what}")

    async def _begin_reading(self) -> None:
        self._check(self.readable(), "reading")

    async def _read_all(self) -> str:
        rest = await self.buffer.read()
        text: str = self._text[self._used :] + self._decoder.decode(rest, final=True)
        self._text, self._used = "", 0
        self._pieces.clear()
        return text

    def _unread(self) -> int:
        return len(self._text) - self._used

    def _line(self, searched: int) -> int:
        start = self._used + max(0, searched - 1)  # the last one may be the first half of a line end
        if self._format.newline == "":
            match = _ANY_END.search(self._text, start)
            return match.end() - self._used if match else 0
        end = self._format.newline or "\n"
        found = self._text.find(end, start)
        return 0 if found < 0 else found + len(end) - self._used

    async def _more(self, wanted: int) -> bool:
        data = await self.buffer.read1(max(wanted, io.DEFAULT_BUFFER_SIZE))
        self._drop_used()
        state = self._decoder.getstate()
        text = self._decoder.decode(data, final=not data)
        self._pieces.append(_Piece(state, data, len(text)))
        self._text += text
        return bool(data)

    def _take(self, count: int) -> str:
        text = self._text[self._used : self._used + count]
        self._used += count
        return text

    def _drop_used(self) -> None:
        """Forget the pieces of which every character was handed out."""
        gone = 0
        while self._pieces and self._used - gone >= self._pieces[0].characters:
            gone += self._pieces.popleft().characters
        self._text, self._used = self._text[gone:], self._used - gone

    def _forget(self) -> None:
        """Forget what was decoded ahead."""
        self._text, self._used = "", 0
        self._pieces.clear()
        self._decoder.reset()


async def open_text(
    buffer: AsyncBinaryFile, layout: TextFormat, *, mode: str, line_buffering: bool
) -> AsyncTextFile:
    """Text over a file just opened; if that has content, no byte order mark comes to stand in its middle."""
    file = AsyncTextFile(buffer, layout, mode=mode, line_buffering=line_buffering)
    if file.writable() and file._encoder.getstate() and await buffer.tell():
        file._encoder.setstate(0)
    return file
