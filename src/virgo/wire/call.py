"""A request together with the meaning of its answer: written once, run by both clients.

A module's `client.py` has functions that return a `Call`; its blocking and its asyncio class run them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, SupportsFloat, SupportsIndex, TypeVar

from virgo.errors import WrongType

T = TypeVar("T")
Argument = bytes | str | int | float


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """What to send, how to read the answer, and how long to wait.

    Attributes:
        request: the command and its arguments.
        decode: turns the reply (bytes, int, None, list, ...) into the result.
        timeout_s: None for the client's default, math.inf for work that may take any time.
    """

    request: tuple[Argument, ...]
    decode: Callable[[Any], T]
    timeout_s: float | None = None


class Runner(Protocol):
    """The blocking client, as the modules' clients see it."""

    def run(self, call: Call[T]) -> T:
        """Send, wait, decode. Raises what the node answered, NotRunning, NodeLost or DeadlineExceeded."""

    def run_many(self, calls: list[Call[T]]) -> list[T | Exception]:
        """Send all on one connection at once; failures take their place in the list."""


class AsyncRunner(Protocol):
    """The asyncio client, as the modules' clients see it."""

    async def run(self, call: Call[T]) -> T:
        """Send, wait, decode; cancelling it closes the connection and so cancels the work."""

    async def run_many(self, calls: list[Call[T]]) -> list[T | Exception]:
        """Send all on one connection at once; failures take their place in the list."""


def whole(value: object, name: str) -> int:
    """An argument that must be a whole number; True and 1.0 are none. Raises WrongType."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise WrongType(
            f"{name} must be a whole number, not {value!r:.40} ({type(value).__name__})",
            hint="int(...) makes one of it, if that is what you mean.",
        )
    return operator.index(value)


def seconds(value: object, name: str = "timeout_s") -> float:
    """An argument that must be a number of seconds. Raises WrongType."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat) or value != value:  # noqa: PLR0124
        raise WrongType(f"{name} must be a number, not {value!r:.40}", hint="It is in seconds.")
    return float(value)


def as_text(reply: Any) -> str:
    """Decode a bulk or simple string."""
    return reply.decode("utf-8", "surrogateescape") if isinstance(reply, bytes) else str(reply)


def as_nothing(_reply: Any) -> None:
    """Decode an OK."""
