"""Bytes of a memcached connection, made requests.

What is read does not depend on how the bytes were cut into chunks, but for one thing: as in memcached a
line that does not end is given up early, unless it begins as a get of many keys does. A value is gathered
in pieces, so that a long one is copied once; one that is refused is skipped as it comes.
"""

from __future__ import annotations

from typing import Final

from virgo.errors import TooLarge, VirgoError
from virgo.limits import MEMCACHED_GET_BYTES_MAX, MEMCACHED_LINE_BYTES_MAX
from virgo.memory.memcached import classic
from virgo.memory.memcached.orders import BAD_CHUNK, QUIT, Order, say

_GETS: Final = (b"get ", b"gets ")
_END: Final = b"\r\n"
_ALL: Final = 1 << 62  # to be skipped, when nothing more is read from a connection


class MemcachedReader:
    """Reads one connection's bytes. After `fault` is set the connection must be closed.

    Args:
        request_bytes_max: bound on one request; raised when the connection logs in.
        item_bytes_max: the largest item that is taken.
    """

    __slots__ = (
        "_awaited",
        "_item_bytes_max",
        "_line",
        "_missing",
        "_pieces",
        "_searched",
        "_skip",
        "fault",
        "open_bytes",
        "request_bytes_max",
    )

    def __init__(self, request_bytes_max: int, item_bytes_max: int) -> None:
        self.request_bytes_max = request_bytes_max
        self.fault: VirgoError | None = None
        self.open_bytes = 0
        self._item_bytes_max = item_bytes_max
        self._line = bytearray()  # without its end yet
        self._searched = 0  # so much of it has no end, for sure
        self._awaited: Order | None = None  # a line whose value is to come
        self._pieces: list[bytes] = []
        self._missing = 0  # bytes of the value and its line end
        self._skip = 0  # bytes of a value that was refused

    def __repr__(self) -> str:
        return f"<MemcachedReader open_bytes={self.open_bytes} fault={self.fault}>"

    def read(self, chunk: bytes) -> list[list[bytes]]:
        """The requests that the chunk completes; sets `fault` on what is none."""
        requests: list[list[bytes]] = []
        if self.fault is not None:
            return requests
        if self._line:
            self._line += chunk
            chunk, self._line = bytes(self._line), bytearray()
        position = 0
        try:
            while position < len(chunk):
                if self._skip:
                    step = min(self._skip, len(chunk) - position)
                    self._skip -= step
                    position += step
                elif self._awaited is not None:
                    position = self._gather(chunk, position, requests)
                else:
                    position = self._read_line(chunk, position, requests)
        except VirgoError as error:
            self.fault = error
        self.open_bytes = len(self._line) + sum(map(len, self._pieces)) if self._awaited else len(self._line)
        return requests

    def _read_line(self, chunk: bytes, start: int, requests: list[list[bytes]]) -> int:
        end = chunk.find(b"\n", start + self._searched)
        self._searched = 0
        if end < 0:
            self._line += chunk[start:]
            self._searched = len(self._line)
            self._check_open_line()
            return len(chunk)
        line = chunk[start : end - 1 if end - start > 1 and chunk[end - 1] == 13 else end]
        if len(line) > min(self.request_bytes_max, MEMCACHED_GET_BYTES_MAX):
            raise _too_long()
        if classic.is_http(line):  # whoever sends this reads no answer of ours; memcached hangs up, too
            requests.append([QUIT])
            self._skip = _ALL
            return len(chunk)
        order = classic.order(line, self._item_bytes_max)
        if order.data_bytes < 0:
            requests.append(order.request)
        elif order.refused:
            requests.append(order.request)
            self._skip = order.data_bytes + 2
        else:
            if order.data_bytes > self.request_bytes_max:
                raise TooLarge(f"a value may have {self.request_bytes_max} bytes before the login")
            self._awaited, self._missing = order, order.data_bytes + 2
        return end + 1

    def _check_open_line(self) -> None:
        """Raise TooLarge for a line that goes on for too long."""
        if len(self._line) <= MEMCACHED_LINE_BYTES_MAX:
            return
        if not self._line[:200].lstrip(b" ").startswith(_GETS):
            raise _too_long()
        if len(self._line) > min(MEMCACHED_GET_BYTES_MAX, self.request_bytes_max):
            raise _too_long()

    def _gather(self, chunk: bytes, start: int, requests: list[list[bytes]]) -> int:
        """Take what the chunk has of the value."""
        order = self._awaited
        assert order is not None
        end = min(len(chunk), start + self._missing)
        self._missing -= end - start
        self._pieces.append(chunk[start:end])
        if not self._missing:
            data = b"".join(self._pieces) if len(self._pieces) > 1 else self._pieces[0]
            self._pieces.clear()
            self._awaited = None
            requests.append(_complete(order, data))
        return end


def _complete(order: Order, data: bytes) -> list[bytes]:
    """The request with its value."""
    if not data.endswith(_END):
        quiet = order.request[2] == b"1"
        return say(BAD_CHUNK, quiet=quiet).request
    order.request.insert(order.place, data[:-2])
    return order.request


def _too_long() -> TooLarge:
    return TooLarge("the line is too long", hint="A line has 2048 bytes at most, unless it gets many keys.")
