"""Where asyncio waits for what a crew's thread brings: outcomes come to the loop many at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from virgo.cpu.backends.base import Backend
from virgo.cpu.calls import Item
from virgo.cpu.crew import Crew
from virgo.cpu.messages import Outcome
from virgo.errors import Cancelled, VirgoError


class Desk:
    """Takes things to an event loop, from any thread.

    Args:
        loop: that one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._things: deque[Callable[[], None]] = deque()
        self._called = False

    def __repr__(self) -> str:
        return f"<Desk {len(self._things)} things>"

    def put(self, thing: Callable[[], None]) -> None:
        """Have it called in the loop."""
        self._things.append(thing)
        if not self._called:
            self._called = True
            try:
                self.loop.call_soon_threadsafe(self._take)
            except RuntimeError:  # the loop is closed, so nobody waits
                self._things.clear()

    async def ended(self, crew: Crew | Backend, item: Item) -> None:
        """End a call, and return when it has ended, however often that is cancelled."""
        over: asyncio.Future[None] = self.loop.create_future()
        crew.end([item], running=True, ended=lambda: self.put(lambda: over.set_result(None)))
        while not over.done():
            try:
                await asyncio.shield(over)
            except asyncio.CancelledError:  # the caller raises it anyway
                continue

    def _take(self) -> None:
        self._called = False
        while self._things:
            self._things.popleft()()


class Ticket:
    """A sink for a coroutine that waits for one call.

    Attributes:
        outcome: a future of it; None if the call has to go another way.
    """

    __slots__ = ("_desk", "outcome")

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.outcome: asyncio.Future[Outcome | None] = desk.loop.create_future()

    def settle(self, _index: int, outcome: Outcome) -> None:
        """See Sink."""
        self._desk.put(lambda: None if self.outcome.done() else self.outcome.set_result(outcome))

    def fail(self, _index: int, error: VirgoError) -> None:
        """See Sink."""
        if isinstance(error, Cancelled):  # by ourselves, who are told when it is over
            return
        self._desk.put(lambda: None if self.outcome.done() else self.outcome.set_exception(error))

    def send_back(self) -> None:
        """It has to go another way."""
        self._desk.put(lambda: None if self.outcome.done() else self.outcome.set_result(None))
