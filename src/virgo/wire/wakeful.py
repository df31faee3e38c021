"""Staying awake for what is about to come: to fall asleep and be woken takes longer than a small request.

Who waits for a byte sleeps, and the kernel wakes it, on a processor that has fallen asleep too. That takes 10
to 50 microseconds on each side, as long as a `get` takes altogether. So where the last byte came soon, both
sides look for the next one for a moment before they sleep (as `halt_poll_ns` of KVM does, which the bounds
follow). Where bytes are far between, and where there is one processor, nobody looks.
"""

from __future__ import annotations

import contextvars
import os
from time import monotonic
from typing import TYPE_CHECKING

from virgo.limits import AWAKE_S, SOON_S

if TYPE_CHECKING:
    import asyncio  # which blocking clients do without

ALONE = len(os.sched_getaffinity(0)) < 2  # then looking would keep the other side from answering


class Wakeful:
    """Keeps an event loop awake after work, while work comes soon after work; for a listener's sessions.

    Only while it is one session's: where several are at work the loop has enough to do, and does more at once
    if it does not look for each piece by itself.
    """

    __slots__ = ("_awake", "_context", "_ended", "_loop", "_soon", "_whose")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._context = contextvars.Context()
        self._ended = 0.0
        self._soon = self._awake = False
        self._whose: object = None

    def __repr__(self) -> str:
        return f"<Wakeful {'awake' if self._awake else 'asleep'}>"

    def begin(self, whose: object) -> None:
        """Work has come from that session."""
        self._soon = whose is self._whose and monotonic() - self._ended < SOON_S
        self._whose = whose

    def end(self) -> None:
        """It is done."""
        self._ended = monotonic()
        if self._soon and not self._awake and not ALONE:
            self._awake = True
            self._loop.call_soon(self._look, context=self._context)

    def _look(self) -> None:
        """As long as something is due at once, the loop looks for events without waiting for them."""
        if monotonic() < self._ended + AWAKE_S:
            self._loop.call_soon(self._look, context=self._context)
        else:
            self._awake = False
