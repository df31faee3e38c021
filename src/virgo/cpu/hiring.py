"""A lease as its node sees it: wanted by a client, then held, and how long its worker has done nothing."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from virgo.cpu import slate
from virgo.cpu.core import Crew
from virgo.cpu.slate import RESTING, SINCE_NS, WANTED, Slate


class Hiring:
    """A lease that is wanted, or held.

    Args:
        crew: the client's.
        duplicate: gives a descriptor of the connection to it, for the worker.

    Attributes:
        slate: see there; None until a worker has it.
        since: when that was, in monotonic time.
        handed: done when a worker has it.
        recalled: since when it is wanted back, 0.0 if it is not.
        elsewhere: the node that has one instead, for the client.
    """

    __slots__ = ("crew", "duplicate", "elsewhere", "handed", "recalled", "since", "slate")

    def __init__(self, crew: Crew, duplicate: Callable[[], int]) -> None:
        self.crew = crew
        self.duplicate = duplicate
        self.slate: Slate | None = None
        self.since = self.recalled = 0.0
        self.elsewhere: list[str | int] = []
        self.handed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return f"<Hiring by {self.crew[:8].decode()} {self.slate!r}>"

    def idle_s(self, now: float) -> float:
        """For how long its worker has done nothing; 0.0 while it works."""
        if self.slate is None or not self.resting:
            return 0.0
        return now - self.doing_since

    @property
    def resting(self) -> bool:
        """Whether its worker has nothing to do."""
        return self.slate is None or bool(self.slate.words[RESTING])

    @property
    def doing_since(self) -> float:
        """Since when its worker has been at the calls that it was sent, or at rest, in monotonic time."""
        return self.since if self.slate is None else max(self.since, self.slate.words[SINCE_NS] / 1e9)

    def start(self) -> list[int]:
        """What the worker gets, to be closed by who asked: descriptors of connection and slate."""
        connection = self.duplicate()
        try:
            page = slate.create()
        except OSError:
            os.close(connection)
            raise
        self.slate, self.since = Slate(page), time.monotonic()
        return [connection, page]

    def recall(self) -> None:
        """Ask for it back, on the slate."""
        self.recalled = self.recalled or time.monotonic()
        if self.slate is not None:
            self.slate.words[WANTED] = 1
