"""Signals: core NATS messages. Fast, to whoever listens now, possibly lost; requests are answered once.

A subject is any name, taken as it is: there are no wildcards. An error of a handler that is a VirgoError
travels back to the requester as itself; any other is logged here and is an InternalFault there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from nats.aio.msg import Msg

from virgo.engine import naming
from virgo.engine.link import Link, NobodyThere, Unanswered, expired
from virgo.errors import DeadlineExceeded, EngineUnavailable, InternalFault, VirgoError, from_line
from virgo.limits import ENGINE_REQUEST_S, SIGNAL_REQUESTS_MAX

log = logging.getLogger("virgo.engine")
_ERROR: Final = "Virgo-Error"
_QUEUE: Final = "virgo"
# Nobody may serve a subject for a moment after a restart; a request waits that long for a server.
_NOBODY_PAUSE_S: Final = 0.05


class NatsSignals:
    """Signals over one link."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def __repr__(self) -> str:
        return f"<NatsSignals over {self._link!r}>"

    async def publish(self, subject: str, data: bytes) -> None:
        """Send to all current listeners. Raises EngineUnavailable when not connected."""
        token = naming.SIGNAL_PREFIX + naming.encode(subject)
        if not self._link.connected:
            raise EngineUnavailable(f"signal {subject!r}: not connected to the engine")
        await self._link.publish(
            token, data, deadline=time.monotonic() + ENGINE_REQUEST_S, what=f"signal {subject!r}"
        )

    async def subscribe(
        self, subject: str, handler: Callable[[bytes], None]
    ) -> Callable[[], Awaitable[None]]:
        """Call `handler` for each message, across reconnects; returns what ends it.

        On return all that is published from then on is heard.
        """

        async def on_message(message: Msg) -> None:
            try:
                handler(message.data)
            except Exception:
                log.exception("the handler of signal %r failed", subject)

        listener = await self._link.listen(
            naming.SIGNAL_PREFIX + naming.encode(subject), on_message, confirmed=True
        )
        return listener.drain

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        """Ask whoever serves the subject, and give its answer.

        Raises:
            EngineUnavailable: nobody serves it, or the engine is away.
            DeadlineExceeded: no answer within `timeout_s`; the request may have been served.
            VirgoError: what the server of the subject raised.
        """
        token = naming.SIGNAL_PREFIX + naming.encode(subject)
        deadline = time.monotonic() + timeout_s
        patience = time.monotonic() + min(timeout_s / 2, 1.0)
        what = f"request {subject!r}"
        while True:
            try:
                answer = await self._link.request(token, data, deadline=deadline, what=what)
            except NobodyThere:
                if expired(patience):
                    raise EngineUnavailable(
                        f"{what}: nobody serves it", hint="The module that serves it is not loaded anywhere."
                    ) from None
                await asyncio.sleep(_NOBODY_PAUSE_S)
                continue
            except Unanswered:
                if not expired(deadline):
                    raise
                raise DeadlineExceeded(f"{what}: no answer within {timeout_s:g} s") from None
            line = (answer.headers or {}).get(_ERROR)
            if line is not None:
                raise from_line(line)
            return answer.data

    async def serve(
        self, subject: str, handler: Callable[[bytes], Awaitable[bytes]]
    ) -> Callable[[], Awaitable[None]]:
        """Answer requests on the subject, up to SIGNAL_REQUESTS_MAX at once.

        Several servers share the work: each request reaches one. Returns what ends the serving; requests
        under way are finished.
        """
        server = _Server(self._link, subject, handler)
        listener = await self._link.listen(
            naming.SIGNAL_PREFIX + naming.encode(subject), server.on_message, queue=_QUEUE, confirmed=True
        )

        async def end() -> None:
            await listener.drain()
            await server.finish()

        return end


class _Server:
    """The requests under way of one `serve`."""

    def __init__(self, link: Link, subject: str, handler: Callable[[bytes], Awaitable[bytes]]) -> None:
        self._link = link
        self._subject = subject
        self._handler = handler
        self._room = asyncio.Semaphore(SIGNAL_REQUESTS_MAX)
        self._tasks: set[asyncio.Task[None]] = set()

    async def on_message(self, message: Msg) -> None:
        await self._room.acquire()
        task = asyncio.create_task(self._answer(message), name=f"serve {self._subject}")
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def finish(self) -> None:
        await asyncio.gather(*self._tasks)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()

    async def _answer(self, message: Msg) -> None:
        headers: dict[str, str] | None = None
        try:
            answer = await self._handler(message.data)
        except VirgoError as error:
            answer, headers = b"", {_ERROR: error.to_line()}
        except Exception:
            log.exception("serving %r failed", self._subject)
            fault = InternalFault(f"serving {self._subject!r} failed")
            answer, headers = b"", {_ERROR: fault.to_line()}
        if message.reply:
            try:
                await self._link.publish(
                    message.reply,
                    answer,
                    headers=headers,
                    deadline=time.monotonic() + ENGINE_REQUEST_S,
                    what=f"answer {self._subject!r}",
                )
            except VirgoError as error:
                log.warning("an answer was lost: %s", error)
