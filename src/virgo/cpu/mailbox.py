"""Calls handed in many at once, their outcomes collected as they come.

Answers on one connection keep the order of the requests, so a slow call would hold up those behind it.
Therefore a client hands calls in (`...SUBMIT`, answered at once) and collects outcomes (`CPU.COLLECT`) in
the order in which they come. The calls of a mailbox live as long as somebody collects: if the connection
that does so closes, or all by which it was used, or nobody collects for COLLECT_GRACE_S, the client is gone
and its calls are cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from virgo.errors import Busy, Cancelled, Denied, InternalFault, VirgoError
from virgo.limits import (
    CALLS_WAITING_MAX,
    COLLECT_BYTES_MAX,
    COLLECT_CALLS_MAX,
    COLLECT_GONE_S,
    COLLECT_GRACE_S,
    COLLECT_WAIT_S,
)
from virgo.wire.session import Session

log = logging.getLogger("virgo.cpu")


class Mailbox:
    """The calls and uncollected outcomes of one client."""

    def __init__(self, owner: str, closed: Callable[[], None]) -> None:
        self.owner = owner
        self._closed = closed
        self._tasks: dict[bytes, asyncio.Task[bytes]] = {}
        self._outcomes: deque[tuple[bytes, bytes, bytes]] = deque()
        self._news = asyncio.Event()
        self._collecting = 0
        self._grace: asyncio.TimerHandle | None = None
        self._sessions: set[Session] = set()
        self._wait(COLLECT_GRACE_S)

    def __repr__(self) -> str:
        return f"<Mailbox of {self.owner}: {len(self._tasks)} calls, {len(self._outcomes)} outcomes>"

    def submit(self, key: bytes, work: Coroutine[Any, Any, bytes]) -> None:
        """Run a call in the current context. Raises Busy."""
        if len(self._tasks) + len(self._outcomes) >= CALLS_WAITING_MAX:
            work.close()
            raise Busy(f"{CALLS_WAITING_MAX} calls of this client are outstanding already")
        task = self._tasks[key] = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(lambda done: self._ended(key, done))

    async def collect(self) -> list[bytes]:
        """Outcomes that are there, waiting a while for the first: key, error line, outcome, key, ..."""
        self._collecting += 1
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        try:
            if not self._outcomes:
                self._news.clear()
                async with asyncio.timeout(COLLECT_WAIT_S):
                    await self._news.wait()
        except TimeoutError:
            return []
        except asyncio.CancelledError:  # the connection was closed
            self.close()
            raise
        finally:
            self._collecting -= 1
            if not self._collecting:
                self._wait(COLLECT_GRACE_S)
        found: list[bytes] = []
        size = 0
        while self._outcomes and len(found) < 3 * COLLECT_CALLS_MAX and size < COLLECT_BYTES_MAX:
            found += self._outcomes.popleft()
            size += len(found[-1])
        return found

    def close(self) -> None:
        """Cancel what runs, forget what is there."""
        for task in self._tasks.values():
            task.cancel()
        self._outcomes.clear()
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        self._closed()

    def _ended(self, key: bytes, task: asyncio.Task[bytes]) -> None:
        self._tasks.pop(key, None)
        error, outcome = b"", b""
        failure = Cancelled("the call was cancelled") if task.cancelled() else task.exception()
        if failure is None:
            outcome = task.result()
        elif isinstance(failure, VirgoError):
            error = failure.to_line().encode("utf-8", "replace")
        else:
            log.error("a submitted call failed", exc_info=failure)
            defect = InternalFault(f"{type(failure).__name__}: {failure}")
            error = defect.to_line().encode("utf-8", "replace")
        self._outcomes.append((key, error, outcome))
        self._news.set()

    def used_by(self, session: Session) -> None:
        """A connection of the client's uses it."""
        if session not in self._sessions:
            self._sessions.add(session)
            session.at_end.append(lambda: self._left_by(session))

    def _left_by(self, session: Session) -> None:
        self._sessions.discard(session)
        if not self._sessions and self._grace is not None:  # he may be about to come by another one
            self._grace.cancel()
            self._wait(COLLECT_GONE_S)

    def _wait(self, limit_s: float) -> None:
        self._grace = asyncio.get_running_loop().call_later(limit_s, self.close)


class Mailboxes:
    """The mailboxes of a node, by the name that the client chose."""

    def __init__(self) -> None:
        self._open: dict[bytes, Mailbox] = {}

    def __repr__(self) -> str:
        return f"<Mailboxes {len(self._open)}>"

    def __len__(self) -> int:
        return len(self._open)

    def of(self, name: bytes, owner: str, session: Session) -> Mailbox:
        """The client's mailbox, made on first use. Raises Denied if it is somebody else's."""
        mailbox = self._open.get(name)
        if mailbox is None:
            mailbox = self._open[name] = Mailbox(owner, lambda: self._forget(name))
        if mailbox.owner != owner:
            raise Denied("this mailbox belongs to another identity")
        mailbox.used_by(session)
        return mailbox

    def find(self, name: bytes, owner: str, session: Session) -> Mailbox:
        """The client's mailbox. Raises Cancelled if it is closed, Denied if it is somebody else's."""
        if name not in self._open:
            raise Cancelled(
                f"nobody collected outcomes for {COLLECT_GRACE_S:g} s, so the calls were cancelled"
            )
        return self.of(name, owner, session)

    def close(self) -> None:
        """Close all."""
        for mailbox in list(self._open.values()):
            mailbox.close()

    def _forget(self, name: bytes) -> None:
        self._open.pop(name, None)
