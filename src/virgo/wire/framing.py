"""Bytes to requests: RESP arrays of bulk strings, inline commands and the reference's text form.

`RequestReader.read(chunk)` returns the requests that the chunk completes, each a list of bytes with the
command first. RESP is decoded by hiredis; a line that does not begin with '*' is an inline command as
in Redis, or, if it has the shape `name(arg,arg)`, a call in the reference's text form. Both kinds may
be mixed on one connection, and what is read does not depend on how the bytes were cut into chunks.

hiredis trusts headers: `*1000000000` makes it reserve room for that many elements at once. So chunks are
searched, in C, for what could be such a header, and only when something is found are tokens walked one
by one to see whether it is one or merely the content of a value. For this the reader always knows where
in the stream of tokens a chunk begins: at a token, within a header (`_tail`), or so many bytes before
the end of a value (`_skip`). It holds no bytes but a header's, and never looks at the inside of a value
that is larger than a chunk.

It does not check that a value is followed by a line end; neither does Redis. It may take for a request
what no client sends: simple strings for bulk strings, a set for an array.
"""

from __future__ import annotations

import contextlib
import re
from typing import Final, NamedTuple

import hiredis

from virgo.errors import BadRequest, TooLarge, VirgoError
from virgo.limits import INLINE_BYTES_MAX, REQUEST_ARGUMENTS_MAX
from virgo.wire.commands import MISREAD
from virgo.wire.text import split_line

Request = list[bytes]

_STAR: Final = ord("*")
_PUSH: Final = ord(">")
_SET: Final = ord("~")
_ATTRIBUTE: Final = ord("|")
_HEADER: Final = re.compile(rb"[*$](0|[1-9][0-9]{0,18})\r\n")
_PARTIAL_HEADER: Final = re.compile(rb"[*$](0|[1-9][0-9]{0,18})?\r?")
# First bytes of what a server says and a client does not; hiredis would read them all.
_REPLY_TYPES: Final = b"$+-:_,#(=!%~>|"
# Headers for which hiredis reserves more than they are long by far: arrays, RESP3's aggregates. Shorter
# ones cannot do harm within one chunk. Patterns that begin with a literal are searched several times
# faster than sets and alternatives.
_MANY: Final = re.compile(rb"\*[1-9][0-9]{2,6}")
_MANY_BYTES: Final = len(b"*1000000")
_PUSH_MANY: Final = re.compile(rb">[0-9]{3}")
_SET_MANY: Final = re.compile(rb"~[0-9]{3}")
_ATTRIBUTE_MANY: Final = re.compile(rb"\|[0-9]{3}")
_AGGREGATE: Final = re.compile(rb"[*>~|%][0-9]")
# From here on it pays to look for the start of the last token instead of walking to it.
_LONG_CHUNK_BYTES: Final = 4096
# With so few in it all are walked to: then nobody needs to look into their values.
_FEW_TOKENS: Final = 16
# What hiredis raises; the latter when it makes Python values of RESP3's maps and numbers.
_UNREADABLE: Final = (hiredis.HiredisError, TypeError, ValueError, OverflowError)
_MORE: Final = object()  # hiredis has no whole message


class RequestReader:
    """Decodes one connection's bytes. After `fault` is set the connection must be closed.

    Attributes:
        request_bytes_max: bound on one request; raised when the connection authenticates.
        fault: the error that ended decoding, or None.
    """

    __slots__ = ("_inside", "_line", "_reader", "_skip", "_tail", "fault", "open_bytes", "request_bytes_max")

    def __init__(self, request_bytes_max: int) -> None:
        self.request_bytes_max = request_bytes_max
        self.fault: VirgoError | None = None
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._inside = False  # between the elements of a request
        self._tail = b""  # the header that the last chunk cut, without its end
        self._skip = 0  # bytes until the end of the value that the last chunk cut
        self.open_bytes = 0  # bytes of the request that is not complete yet, or somewhat more
        self._line = b""  # an inline command without its end

    def __repr__(self) -> str:
        return f"<RequestReader open_bytes={self.open_bytes} fault={self.fault}>"

    def read(self, chunk: bytes) -> list[Request]:
        """The requests that `chunk` completes; sets `fault` on what is no request."""
        requests: list[Request] = []
        if self.fault is not None:
            return requests
        try:
            while chunk:
                if self._inside or self._tail or (chunk[0] == _STAR and not self._line):
                    chunk = self._read_resp(chunk, requests)
                else:
                    chunk = self._read_lines(chunk, requests)
        except VirgoError as error:
            self.fault = error
        except MemoryError:
            self.fault = TooLarge("there is no memory for a request of this size")
        return requests

    # --- lines --------------------------------------------------------------------------------

    def _read_lines(self, chunk: bytes, requests: list[Request]) -> bytes:
        """Take whole lines off the chunk; returns what begins with '*', or nothing."""
        chunk = self._line + chunk
        self._line = b""
        start = 0
        while start < len(chunk) and chunk[start] != _STAR:
            if chunk[start] in _REPLY_TYPES:
                raise _not_request()
            end = chunk.find(b"\n", start)
            length = (len(chunk) if end < 0 else end) - start
            if length > min(INLINE_BYTES_MAX, self.request_bytes_max):
                raise TooLarge(
                    f"an inline command may have {min(INLINE_BYTES_MAX, self.request_bytes_max)} bytes here",
                    hint="Send long values as RESP arrays, as every Redis client does.",
                )
            if end < 0:
                self._line = chunk[start:]
                return b""
            try:
                request = split_line(chunk[start:end].rstrip(b"\r"))
            except BadRequest as error:  # where the line ends is known, so the next one can be read
                request = [MISREAD, error.to_line().encode("utf-8", "replace")]
            if request:
                if request[0].lower() in (b"post", b"host:"):
                    # A web page that was led here must not get its body executed.
                    raise BadRequest("this port does not speak HTTP")
                requests.append(request)
            start = end + 1
        return chunk[start:]

    # --- RESP ---------------------------------------------------------------------------------

    def _read_resp(self, chunk: bytes, requests: list[Request]) -> bytes:
        """Feed hiredis; returns what follows the last RESP request if it is an inline command."""
        if self._skip > len(chunk):
            self._reader.feed(chunk)
            self._skip -= len(chunk)
            self.open_bytes += len(chunk)
            return self._check_size()
        inside, complete = self._inside, len(requests)
        known = len(self._tail)  # bytes of `data` that hiredis has already
        data = self._tail + chunk if known else chunk
        start, left = self._skip, None if inside else 0
        self._skip, self._tail = 0, b""
        end = self._foresee(data, start, left, chunk, requests)
        begin, since = start, complete  # a place where a token begins, and what was complete there
        try:
            cut = _last_token(chunk) if end is None and len(chunk) > _LONG_CHUNK_BYTES else 0
            if cut:
                self._reader.feed(chunk[:cut])
                self._collect(requests)
                if not self._reader.has_data():
                    begin, left, since = cut + known, None if self._inside else 0, len(requests)
            self._reader.feed(chunk[cut:] if cut else chunk)
            self._collect(requests)
        except VirgoError:  # some of which are ValueErrors
            raise
        except _UNREADABLE as error:
            return self._recover(error, data, _walked(data, begin, left, len(requests) > since))
        # hiredis takes a token's first byte at once, so after '$' alone it has no data left either.
        if self._reader.has_data() or (self._inside and data[-2:] != b"\r\n"):
            end = end or _walk(data, begin, left)
            self._settle(data, _known(end, left, len(requests) > since))
        if len(requests) > complete:
            self.open_bytes = len(data) if self._inside or self._tail else 0
            return b""
        if inside and _AGGREGATE.search(data, start) and _walk(data, start, None).left is not None:
            raise _nested()  # found only now that the request is known to have gone on all the time
        self.open_bytes += len(chunk)
        return self._check_size()

    def _foresee(
        self, data: bytes, start: int, left: int | None, chunk: bytes, requests: list[Request]
    ) -> _Stop | None:
        """Where the data ends, if all of its tokens were walked. Raises what is wrong with one.

        hiredis then has had what was before it.
        """
        stop = _walk(data, start, left, _FEW_TOKENS) if len(data) > _LONG_CHUNK_BYTES else None
        if stop is None or stop.early:
            if not _suspicious(data, start):
                return None
            stop = _walk(data, start, left)
        if stop.error is not None:
            self._reader.feed(chunk[: max(0, stop.position - (len(data) - len(chunk)))])
            with contextlib.suppress(*_UNREADABLE):
                self._collect(requests)
            raise stop.error
        return stop

    def _collect(self, requests: list[Request]) -> None:
        """Take from hiredis what is complete."""
        reader = self._reader
        gets, has_data, append = reader.gets, reader.has_data, requests.append
        while (message := gets()) is not _MORE:
            if type(message) is not list:
                raise _not_request()
            for item in message:
                if type(item) is not bytes:
                    raise _not_request()
            if message:
                append(message)
            if not has_data():
                self._inside = False
                return
        self._inside = True

    def _settle(self, data: bytes, stop: _Stop) -> None:
        """Remember within what the data ended."""
        self._inside = bool(stop.left)
        if stop.position == len(data):
            return
        if (data[stop.position] == _STAR) is self._inside:
            raise _nested() if self._inside else _not_request()
        if stop.lacks:
            self._skip = stop.lacks
        else:
            self._tail = data[stop.position :]

    def _recover(self, error: Exception, data: bytes, stop: _Stop) -> bytes:
        """After RESP came something else: an inline command goes on, the rest is a fault."""
        if stop.left or stop.position >= len(data) or data[stop.position] == _STAR:
            raise BadRequest(f"not RESP: {error}", hint="A request is an array of bulk strings.")
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._inside = False
        self.open_bytes = 0
        return data[stop.position :]

    def _check_size(self) -> bytes:
        if self.open_bytes + self._skip > self.request_bytes_max:
            raise TooLarge(f"a request may have {self.request_bytes_max} bytes here")
        return b""


def _not_request() -> BadRequest:
    return BadRequest("a request is an array of bulk strings", hint="Clients encode it so; see `COMMAND`.")


def _nested() -> BadRequest:
    return BadRequest("a request is an array of bulk strings, not of arrays")


# --- walking ----------------------------------------------------------------------------------


class _Stop(NamedTuple):
    """Where a walk over tokens ended.

    Attributes:
        position: the first token that is not whole, or is wrong; the end of the data if there is none.
        left: elements that the request there still needs; None if it began before the walk.
        lacks: bytes that the value there still needs.
        error: what is wrong there.
        early: whether it ended for the number of tokens.
    """

    position: int
    left: int | None
    lacks: int = 0
    error: VirgoError | None = None
    early: bool = False


def _walk(data: bytes, position: int, left: int | None, tokens: int = -1) -> _Stop:
    """Walk tokens from a place where one begins; `left` is 0 between requests, None inside of one."""
    while position < len(data):
        if not tokens:
            return _Stop(position, left, early=True)
        tokens -= 1
        header = _HEADER.match(data, position)
        if header is None:
            return _Stop(position, left, error=_header_error(data, position, left))
        number = int(header[1])
        if data[position] == _STAR:
            if left:
                return _Stop(position, left, error=_nested())
            if number > REQUEST_ARGUMENTS_MAX:
                error = TooLarge(f"a request may have {REQUEST_ARGUMENTS_MAX} arguments")
                return _Stop(position, left, error=error)
            left = number
            position = header.end()
        else:
            if left == 0:
                return _Stop(position, left, error=_not_request())
            end = header.end() + number + 2
            if end > len(data):
                return _Stop(position, left, lacks=end - len(data))
            left = None if left is None else left - 1
            position = end
    return _Stop(position, left)


def _walked(data: bytes, position: int, left: int | None, completed: bool) -> _Stop:
    """A walk over what hiredis has read too, and what is known of its end: see `_known`."""
    return _known(_walk(data, position, left), left, completed)


def _known(stop: _Stop, left: int | None, completed: bool) -> _Stop:
    """The end of a walk that began with `left`; `completed`: hiredis found a request to be complete in it.

    So it is known afterwards whether the walk ended inside a request. Raises what is wrong there.
    """
    if stop.error is not None:
        raise stop.error
    if left is None and not completed:
        if stop.left is not None:
            raise _nested()  # a header was seen, and the request around it is not complete
        return stop._replace(left=1)
    return stop._replace(left=stop.left or 0)


def _header_error(data: bytes, position: int, left: int | None) -> VirgoError | None:
    """What is wrong with what is no whole header; None if it is a part of one, or may be inline."""
    kind = data[position]
    if kind in b"*$":
        if _PARTIAL_HEADER.fullmatch(data, position) is None:
            return BadRequest("a length is a number of at most 19 digits")
        return _nested() if left and kind == _STAR else None
    return _not_request() if left or kind in _REPLY_TYPES else None


def _suspicious(data: bytes, start: int) -> bool:
    """Whether there may be headers for which hiredis would reserve much memory.

    One array of less than a million is nothing; a second one may be within it, and so on without end.
    """
    many = _MANY.search(data, start)
    return (
        (many is not None and (len(many[0]) == _MANY_BYTES or _MANY.search(data, many.end()) is not None))
        # To ask for one byte by its number is one memchr; by bytes it takes five times as long.
        or (_PUSH in data and _PUSH_MANY.search(data, start) is not None)
        or (_SET in data and _SET_MANY.search(data, start) is not None)
        or (_ATTRIBUTE in data and _ATTRIBUTE_MANY.search(data, start) is not None)
    )


def _last_token(chunk: bytes) -> int:
    """Where the last token seems to begin in a long chunk that ends within one; else 0.

    A guess: values may look like tokens. If it is right, there is no need to walk there from the start.
    """
    if chunk[-2:] == b"\r\n":
        return 0
    found = max(chunk.rfind(b"\r\n$"), chunk.rfind(b"\r\n*"))
    return 0 if found < 0 else found + 2
