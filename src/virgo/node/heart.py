"""A second heart: beats from a thread of its own while the node's event loop is busy.

A value of a gigabyte can keep the event loop from turning for seconds. The node is alive then, and must
not be lost to the others: this thread sends the last beat on, over its own connection to the engine, for
as long as the event loop has turned within BUSY_S_MAX. A stopped process beats no more, and neither does
one whose event loop hangs for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable

from virgo.engine.base import Engine
from virgo.errors import EngineUnavailable, VirgoError
from virgo.limits import BUSY_S_MAX, MEMBER_BEAT_S, NODE_STOP_S

log = logging.getLogger("virgo.node")
_LOOK_S = MEMBER_BEAT_S / 2


class Heart:
    """Sends the last beat again when the event loop is late with the next one.

    Args:
        connect: gives a connection to the engine; called in the thread's own event loop.
        subject: the signal that a beat is.
        busy_s_max: an event loop that has not turned for so long counts as hung.
    """

    def __init__(
        self, connect: Callable[[], Awaitable[Engine]], subject: str, *, busy_s_max: float = BUSY_S_MAX
    ) -> None:
        self._connect = connect
        self._subject = subject
        self._busy_s_max = busy_s_max
        self._beat = b""
        self._turned = float("-inf")  # when the event loop last gave a beat
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
        self.beats = 0  # that the event loop was too busy to send

    def __repr__(self) -> str:
        return f"<Heart {self._subject!r}, {self.beats} beats sent>"

    def start(self) -> None:
        """Begin to watch over the event loop."""
        self._thread.start()

    def turned(self, beat: bytes) -> None:
        """The event loop turns, and has just sent this beat itself."""
        self._beat = beat
        self._turned = time.monotonic()

    async def stop(self) -> None:
        """No beat is sent any more when this returns: a farewell may follow."""
        self._stopping.set()
        await asyncio.to_thread(self._thread.join, NODE_STOP_S)

    def _run(self) -> None:
        asyncio.run(self._watch())

    async def _watch(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            engine = await self._engine()
            if engine is None:
                return
            stack.push_async_callback(engine.close)
            while not self._stopping.is_set():
                if MEMBER_BEAT_S + _LOOK_S < time.monotonic() - self._turned < self._busy_s_max:
                    await self._send(engine)
                await asyncio.sleep(_LOOK_S)

    async def _engine(self) -> Engine | None:
        """The connection, as soon as there is one; None if the node stops before."""
        while not self._stopping.is_set():
            try:
                return await self._connect()
            except VirgoError as error:
                log.warning("no second heart yet: %s", error)
                await asyncio.sleep(_LOOK_S)
        return None

    async def _send(self, engine: Engine) -> None:
        try:
            await engine.signals.publish(self._subject, self._beat)
        except EngineUnavailable as error:
            log.warning("no beat of the second heart: %s", error)
        else:
            self.beats += 1
