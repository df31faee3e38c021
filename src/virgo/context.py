"""What travels with a request: its id, deadline, hybrid time, cause and identity.

A context enters with a request (`WITH <context> COMMAND ...` on the wire), is current while the request
is handled, and is attached to whatever the handling starts: calls to other nodes, clones, messages. So
the event log can draw who caused what, and a deadline reaches everything it bounds. A deadline travels
as the time that is left, since clocks of machines differ.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import msgspec

from virgo.clock import Clock
from virgo.errors import BadRequest, DeadlineExceeded

ROLES = frozenset({"read", "write", "exec", "admin"})

clock = Clock()
_prefix = os.urandom(6).hex()
_serial = itertools.count(1)


class Identity(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who asks, and what they may do. `node` marks a member of the cloud, which may speak for others."""

    name: str = ""
    roles: frozenset[str] = frozenset()
    node: bool = False

    def may(self, role: str) -> bool:
        """Whether the identity has the role; `admin` has every role."""
        return role in self.roles or "admin" in self.roles


NOBODY = Identity()
NODE = Identity(name="node", node=True)  # who speaks when a node hands a worker of its own a context


class Context(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request's context.

    Attributes:
        id: unique id of the request.
        cause: id of the request on whose behalf this one was made, "" for a first cause.
        deadline: the local monotonic time by which it must be done, None for no deadline.
        time: hybrid logical time of the sending.
        identity: who asked first; believed only when a member of the cloud says so.
    """

    id: str = ""
    cause: str = ""
    deadline: float | None = None
    time: int = 0
    identity: Identity = NOBODY

    def remaining_s(self) -> float | None:
        """Seconds left, never negative; None without a deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def check(self, what: str) -> None:
        """Raise DeadlineExceeded if no time is left."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineExceeded(f"{what}: the deadline of request {self.id or '?'} has passed")


class _Wire(msgspec.Struct, frozen=True, omit_defaults=True):
    """The form on the wire: the deadline as milliseconds left."""

    id: str = ""
    cause: str = ""
    left_ms: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)] | None = None
    time: int = 0
    identity: Identity = NOBODY


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Wire)
_current: contextvars.ContextVar[Context | None] = contextvars.ContextVar("virgo", default=None)
_everywhere: Context | Callable[[], Context] | None = None


def new_id() -> str:
    """A request id that no other process gives."""
    return f"{_prefix}-{os.getpid():x}-{next(_serial):x}"


def current() -> Context | None:
    """The context of the request being handled here, if any."""
    context = _current.get() or _everywhere
    return context() if callable(context) else context


def adopt(context: Context | Callable[[], Context] | None) -> None:
    """Make `context` current in every thread that has no other, in a process that runs one call at a time.

    Instead of a context it may be what gives the one of the moment.
    """
    global _everywhere  # noqa: PLW0603 - it is a property of the process
    _everywhere = context


@contextlib.contextmanager
def using(context: Context | None) -> Iterator[None]:
    """Make `context` current within the block."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def derive(*, timeout_s: float | None = None, identity: Identity | None = None) -> Context:
    """A context for a request made now: caused by the current one, never outliving it."""
    parent = current()
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    if parent is not None and parent.deadline is not None:
        deadline = parent.deadline if deadline is None else min(deadline, parent.deadline)
    return Context(
        id=new_id(),
        cause=parent.id if parent is not None else "",
        deadline=deadline,
        time=clock.now(),
        identity=identity or (parent.identity if parent is not None else NOBODY),
    )


def encode(context: Context) -> bytes:
    """The context as bytes for the wire."""
    left = context.remaining_s()
    return _encoder.encode(
        _Wire(
            id=context.id,
            cause=context.cause,
            left_ms=None if left is None else int(left * 1000),
            time=context.time,
            identity=context.identity,
        )
    )


def decode(data: bytes, *, speaker: Identity) -> Context:
    """The context that came over the wire from `speaker`.

    Only a member of the cloud may name an identity other than its own.

    Raises:
        BadRequest: the bytes are not a context.
    """
    try:
        wire = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the context is malformed: {error}") from error
    if wire.time:
        clock.observe(wire.time)
    trusted = speaker.node and wire.identity != NOBODY
    return Context(
        id=wire.id[:80] or new_id(),
        cause=wire.cause[:80],
        deadline=None if wire.left_ms is None else time.monotonic() + wire.left_ms / 1000,
        time=wire.time,
        identity=wire.identity if trusted else speaker,
    )
