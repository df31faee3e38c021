"""Errors, as memcached's protocol says them: one line that begins with whose fault it is.

What memcached has words for is said in its words, so that clients know it; the rest by VIRGO's code,
message and hint.
"""

from __future__ import annotations

from virgo.errors import (
    BadArgument,
    BadRequest,
    Denied,
    DiskFull,
    NotAuthenticated,
    PoolFull,
    TooLarge,
    UnknownCommand,
    VirgoError,
    WrongToken,
)
from virgo.memory.memcached.orders import ERROR

_CALLERS = (BadArgument, BadRequest, Denied, TooLarge)


def error_line(failure: VirgoError) -> bytes:
    """The line for an error."""
    if isinstance(failure, UnknownCommand):
        return ERROR
    if isinstance(failure, NotAuthenticated):
        return b"CLIENT_ERROR unauthenticated\r\n"
    if isinstance(failure, WrongToken):
        return b"CLIENT_ERROR authentication failure\r\n"
    if isinstance(failure, PoolFull | DiskFull):
        return b"SERVER_ERROR out of memory storing object\r\n"
    whose = b"CLIENT_ERROR" if isinstance(failure, _CALLERS) else b"SERVER_ERROR"
    return b"%b %b\r\n" % (whose, failure.to_line().encode("utf-8", "replace"))
