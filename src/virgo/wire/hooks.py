"""What commands may hang into a session: work that is made final with a chunk, an interceptor of requests."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from virgo.wire.commands import Command
    from virgo.wire.session import Session


class Batch(Protocol):
    """Work of one chunk that is made final together."""

    def close(self) -> Awaitable[None] | None:
        """Make it final. Raises VirgoError if that failed: then none of it took place.

        Returns:
            What the answers have to wait for, for it is kept elsewhere too; if that fails they are errors.
        """


class Interceptor(Protocol):
    """Gets each request instead of its command's handler, until it is taken away again."""

    def __call__(self, session: Session, command: Command, request: list[bytes]) -> Any:
        """The answer, as a handler's. Whether it is allowed has not been checked: see `Session.check`."""

    def refused(self) -> None:
        """A request was answered with an error."""
