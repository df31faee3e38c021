"""The answers of one connection: they leave in the order of its requests, whichever is known first."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from virgo.errors import VirgoError
from virgo.wire import resp


class Slot:
    """The place of an answer in the order of answers; `parts` is None until it is there."""

    __slots__ = ("parts", "size")

    def __init__(self) -> None:
        self.parts: list[bytes] | None = None
        self.size = 0


class Answers:
    """Answers that wait behind one that is not known yet.

    Args:
        error: the bytes of an error.

    Attributes:
        waiting_bytes: how much they are.
    """

    def __init__(self, error: Callable[[VirgoError], bytes] = resp.error) -> None:
        self._error = error
        self._slots: deque[Slot] = deque()
        self.waiting_bytes = 0

    def __repr__(self) -> str:
        return f"<Answers {len(self._slots)} wait, {self.waiting_bytes} bytes>"

    def __bool__(self) -> bool:
        return bool(self._slots)

    def promise(self) -> Slot:
        """A place for an answer that is to come."""
        slot = Slot()
        self._slots.append(slot)
        return slot

    def fill(self, slot: Slot, parts: list[bytes]) -> None:
        """The answer is known."""
        slot.parts, slot.size = parts, sum(map(len, parts))
        self.waiting_bytes += slot.size

    def fail(self, slot: Slot, error: VirgoError) -> None:
        """The answer is an error."""
        self.fill(slot, [self._error(error)])

    def add(self, parts: list[bytes], transport: asyncio.WriteTransport | None) -> None:
        """Answers of requests behind all others: sent at once, or when those before them are."""
        if self._slots:
            self.fill(self.promise(), parts)
        elif transport is not None:
            resp.send(transport, parts)

    def flush(self, transport: asyncio.WriteTransport) -> None:
        """Send what is there, as far as the order allows, in one write."""
        ready: list[bytes] = []
        while self._slots and self._slots[0].parts is not None:
            slot = self._slots.popleft()
            self.waiting_bytes -= slot.size
            ready += slot.parts or ()
        if ready:
            resp.send(transport, ready)

    def clear(self) -> None:
        """Nobody will read them."""
        self._slots.clear()
        self.waiting_bytes = 0
