"""Sends changed keys to where they are kept as well, and says when they are there.

What is sent is not the change but the record as it is when it is sent, or that there is none. So it does not
matter how changes follow each other, and those that come while others are under way are sent together: one
fsync, one message.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from typing import Any, Final

from virgo.errors import Conflict, VirgoError
from virgo.memory.keeping import keep_of

log = logging.getLogger("virgo.memory")
_AGAIN_S: Final = 0.2  # after a failure


class Sink(ABC):
    """A place where keys are kept as well; `run` does the work.

    Attributes:
        dirty: stored keys that are to be sent.
        sent: how many were.
    """

    def __init__(self) -> None:
        self.dirty: set[bytes] = set()
        self.sent = 0
        self._emptied = False
        self._waiters: list[asyncio.Future[None]] = []
        self._flying: list[asyncio.Future[None]] = []  # those who wait for what is being sent
        self._given_up = False  # since that was begun
        self._busy = False
        self._wake = asyncio.Event()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self.dirty)} to send, {self.sent} sent>"

    @abstractmethod
    async def send(self, some: list[bytes], *, emptied: bool) -> None:
        """Have these keys there as they are here, after forgetting all others if `emptied`."""

    @abstractmethod
    def forgives(self, error: VirgoError) -> bool:
        """Whether those who wait go on waiting after this failure; else it is raised to them.

        After a Conflict nothing of it is sent again: it is another's business now.
        """

    def add(self, some: Iterable[bytes], *, emptied: bool = False) -> None:
        """Send these keys; first forget all that are there if `emptied`."""
        if emptied:
            self.dirty.clear()
            self._emptied = True
        self.dirty.update(some)
        self._wake.set()

    @property
    def idle(self) -> bool:
        """Whether all that was added is there."""
        return not (self.dirty or self._busy or self._emptied)

    async def settled(self) -> None:
        """Wait until all that was added before is there. Raises what kept it from being."""
        if not self.idle:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    async def run(self) -> None:
        """Send what is added, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self.dirty or self._emptied:
                await self._round()

    async def _round(self) -> None:
        some, self.dirty = self.dirty, set()
        emptied, self._emptied = self._emptied, False
        self._flying, self._waiters = self._waiters, []
        self._busy, self._given_up = True, False
        error: VirgoError | None = None
        try:
            await self.send(sorted(some), emptied=emptied)
            self.sent += len(some)
        except VirgoError as failure:
            error = failure
        finally:
            self._busy = False
        flying, self._flying = self._flying, []
        if error is None:
            _end(flying, None)
            if not (self.dirty or self._emptied):  # then those who came meanwhile wait for nothing
                waiters, self._waiters = self._waiters, []
                _end(waiters, None)
            return
        if not (self._given_up or isinstance(error, Conflict)):
            self.dirty |= some
            self._emptied = self._emptied or emptied
        if self.forgives(error):
            self._waiters = flying + self._waiters
        else:
            log.warning("%r: %s", self, error)
            _end(flying, error)
        await asyncio.sleep(_AGAIN_S)

    def give_up(self) -> None:
        """Send nothing more of what was added; those who wait need not."""
        self.dirty.clear()
        self._emptied, self._given_up = False, True
        waiters, self._waiters, self._flying = self._flying + self._waiters, [], []
        _end(waiters, None)


def _end(waiters: list[asyncio.Future[None]], error: VirgoError | None) -> None:
    for waiter in waiters:
        if not waiter.done():
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)


class Keeper:
    """What a store tells of its changes. A new one knows no place to keep them.

    Attributes:
        disk: where durable keys go; made by the function on first use.
        mirrors: the places of second copies of a stored key, by its slot.
    """

    def __init__(
        self,
        disk: Callable[[], Sink] | None = None,
        mirrors: Callable[[int], Iterable[Sink]] = lambda _slot: (),
    ) -> None:
        self._make_disk = disk
        self.disk: Sink | None = None
        self._mirrors = mirrors

    def __repr__(self) -> str:
        return f"<Keeper {self.disk!r}>"

    def note(self, touched: set[bytes], *, emptied: bool = False) -> Settling | None:
        """Keep these keys elsewhere; returns what to await before the change is acknowledged."""
        sinks: dict[Sink, set[bytes]] = {}
        if emptied and self.disk is not None:
            sinks[self.disk] = set()
        for stored in touched:
            if keep_of(stored[2:]).durable and self._make_disk is not None:
                self.disk = self.disk or self._make_disk()
                sinks.setdefault(self.disk, set()).add(stored)
            for sink in self._mirrors(stored[0] << 8 | stored[1]):
                sinks.setdefault(sink, set()).add(stored)
        for sink, some in sinks.items():
            sink.add(some, emptied=emptied and sink is self.disk)
        return Settling(sinks) if sinks else None

    async def settled(self, slots: Iterable[int] = ()) -> None:
        """Wait until all changes are kept: durable ones on disk, those of these slots by their mirrors."""
        sinks = {sink for slot in slots for sink in self._mirrors(slot)}
        await Settling([*sinks, *((self.disk,) if self.disk else ())])


class Settling:
    """Ends when these sinks have all that was added to them so far; raises what kept one from it."""

    __slots__ = ("_sinks",)

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = list(sinks)

    def __repr__(self) -> str:
        return f"<Settling {self._sinks}>"

    def __await__(self) -> Generator[Any, None, None]:
        for sink in self._sinks:
            yield from sink.settled().__await__()
