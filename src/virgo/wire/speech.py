"""How a listener speaks: what makes requests of bytes, and bytes of errors.

Sessions, batches, identities and bounds are the same for every protocol. Whatever is not RESP has handlers
that answer with `resp.Encoded`, bytes that are an answer already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from virgo.errors import VirgoError
from virgo.wire import resp
from virgo.wire.framing import RequestReader


class Reader(Protocol):
    """Makes requests of one connection's bytes.

    Attributes:
        request_bytes_max: bound on one request; raised when the connection logs in.
        fault: the error that ended the reading, after which the connection is closed, or None.
        open_bytes: bytes of the request that is not complete yet, or somewhat more.
    """

    request_bytes_max: int
    fault: VirgoError | None
    open_bytes: int

    def read(self, chunk: bytes) -> list[list[bytes]]:
        """The requests that the chunk completes, each with the name of its command first."""


@dataclass(frozen=True, slots=True)
class Speech:
    """One protocol.

    Attributes:
        reader: a reader for a new connection, given the bound on one request.
        error: the bytes that say an error.
    """

    reader: Callable[[int], Reader]
    error: Callable[[VirgoError], bytes]


RESP: Final = Speech(RequestReader, resp.error)
