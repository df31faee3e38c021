"""What the blocking and the asyncio client share: requests on the wire, deadlines, results, and the pool.

Nothing here waits; `client` and `aclient` add the connections.
"""

from __future__ import annotations

import errno
import math
import ssl
import time
from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

import hiredis

from virgo import context as contexts
from virgo.errors import Busy, NotRunning, VirgoError, WrongType, from_line
from virgo.limits import REQUEST_DEADLINE_S
from virgo.wire.address import Address
from virgo.wire.call import Argument, Call
from virgo.wire.life import Pulse

T = TypeVar("T")
C = TypeVar("C")
# A connection was not made because this process or machine has no room for it; says nothing of the node.
_OWN_FAULTS: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


def failure(reply: object) -> VirgoError | None:
    """The error that a decoded reply stands for, or None."""
    return from_line(str(reply)) if isinstance(reply, hiredis.ReplyError) else None


def pack_plain(request: Sequence[Argument]) -> bytes:
    """A request on the wire, without context; text may hold surrogates for bytes that are not UTF-8.

    Raises:
        WrongType: an argument is none of bytes, text, number.
    """
    # Numbers are made text here: hiredis 3.5 does not survive a signal handler that raises while it does so.
    parts = tuple([repr(part) if type(part) in (int, float) else part for part in request])
    try:
        packed: bytes = hiredis.pack_command(parts)  # type: ignore[arg-type]
    except UnicodeEncodeError:
        encoded = [
            part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part for part in request
        ]
        return pack_plain(encoded)
    except TypeError:
        for part in request:
            if isinstance(part, bool) or not isinstance(part, (bytes, str, int, float)):
                raise WrongType(
                    f"an argument of {request[0]!r:.40} is {part!r:.40} ({type(part).__name__})",
                    hint="Arguments are bytes, text or numbers; make it one of these.",
                ) from None
        raise
    return packed


def pack(request: Sequence[Argument], timeout_s: float | None = None) -> bytes:
    """A request on the wire: inside the current context if there is one or a deadline is given."""
    if contexts.current() is not None:
        limit = None if timeout_s is None or math.isinf(timeout_s) else timeout_s
        context = contexts.encode(contexts.derive(timeout_s=limit))
        request = ("WITH", context, *request)
    return pack_plain(request)


PING: Final = pack_plain(("PING",))


def not_connected(address: Address, error: OSError) -> VirgoError:
    """What to raise, from `error`, when no connection could be made."""
    reason = error.strerror or str(error) or "timed out"
    if error.errno == errno.EAGAIN and address.path:
        return Busy(
            f"{address} has no room for another connection",
            hint="Its process may be stopped, or very busy, and others wait already; try again.",
        )
    if error.errno in _OWN_FAULTS and not isinstance(error, ssl.SSLError):
        return Busy(
            f"no connection to {address} could be made: {reason}",
            hint="This process has too much open; `ulimit -n` shows how many files and sockets it may have.",
        )
    return NotRunning(f"nothing answers at {address}: {reason}")


class Pool(Generic[C]):
    """Connections to one node: where it is, how to log in, which connections wait to be used.

    Args:
        address: where the node listens.
        token: for TCP without a client certificate.
        tls: context for a `tls:` address.
        timeout_s: deadline of calls that name none.
    """

    def __init__(
        self,
        address: Address,
        *,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        timeout_s: float = REQUEST_DEADLINE_S,
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._token = token
        self._tls = tls
        self._idle: list[C] = []
        self._closed = False
        self._pulse = Pulse()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._idle)} idle"
        return f"<{type(self).__name__} {self.address} {state}>"

    def stats(self) -> dict[str, Any]:
        """Where it leads and how many connections wait."""
        return {"address": str(self.address), "idle": len(self._idle), "closed": self._closed}

    def _check_open(self) -> None:
        if self._closed:
            raise NotRunning("this client is closed", hint="Call virgo.connect() again.")

    def _limit(self, calls: Sequence[Call[Any]]) -> float | None:
        """Seconds that these calls may take, within what the context has left; None for any time."""
        if len(calls) == 1:
            timeout_s = self.timeout_s if calls[0].timeout_s is None else calls[0].timeout_s
        else:
            timeout_s = max(self.timeout_s if call.timeout_s is None else call.timeout_s for call in calls)
        context = contexts.current()
        if context is not None and context.deadline is not None:
            context.check(str(calls[0].request[0]))
            timeout_s = min(timeout_s, context.deadline - time.monotonic())
        return None if math.isinf(timeout_s) else timeout_s


def result(call: Call[T], reply: Any) -> T:
    """What the reply means. Raises the error that it stands for."""
    error = failure(reply)
    if error is not None:
        raise error
    return call.decode(reply)


def results(calls: Sequence[Call[T]], replies: Sequence[Any]) -> list[T | Exception]:
    """What each reply means; failures take their place in the list."""
    return [failure(reply) or call.decode(reply) for call, reply in zip(calls, replies, strict=True)]


def as_is(reply: Any) -> Any:
    """Decode nothing."""
    return reply
