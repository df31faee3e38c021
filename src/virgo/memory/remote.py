"""Values of other nodes that are read often, kept here to be sent only once.

A kept value is never shown unasked: its node is asked each time whether it is of that version, and sends it
only if it is not. So what is read is as fresh as without it, and only the bytes are spared; small values are
not worth it. What was used longest ago goes when room is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from virgo.limits import (
    MEMORY_REMOTE_BYTES_MAX,
    MEMORY_REMOTE_SHARE,
    MEMORY_REMOTE_SIGHTED_MAX,
    MEMORY_REMOTE_VALUE_BYTES_MIN,
)


class Known(NamedTuple):
    """A value of another node.

    Attributes:
        number: of the node.
        version: of the key there.
        value: its bytes.
    """

    number: int
    version: int
    value: bytes


class RemoteValues:
    """The kept values, by key.

    Args:
        capacity_bytes: of the node's pool.

    Attributes:
        hits: how often a value was spared.
        held_bytes: of the kept values.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._bytes_max = min(MEMORY_REMOTE_BYTES_MAX, int(capacity_bytes * MEMORY_REMOTE_SHARE))
        self._known: OrderedDict[bytes, Known] = OrderedDict()
        self._sighted: OrderedDict[bytes, None] = OrderedDict()  # read once
        self.hits = 0
        self.held_bytes = 0

    def __repr__(self) -> str:
        return f"<RemoteValues {len(self._known)} of {self.held_bytes} bytes, {self.hits} hits>"

    def sight(self, key: bytes, value: bytes | None) -> None:
        """It was read; if that happens again it is kept."""
        if value is not None and MEMORY_REMOTE_VALUE_BYTES_MIN <= len(value) <= self._bytes_max:
            self._sighted[key] = None
            if len(self._sighted) > MEMORY_REMOTE_SIGHTED_MAX:
                self._sighted.popitem(last=False)

    def wanted(self, key: bytes) -> bool:
        """Whether its version is to be asked for."""
        return key in self._known or key in self._sighted

    def get(self, key: bytes, number: int) -> Known | None:
        """What is kept of a key of that node."""
        known = self._known.get(key)
        return known if known is not None and known.number == number else None

    def hit(self, key: bytes) -> None:
        """It is still of its version."""
        self.hits += 1
        self._known.move_to_end(key)

    def keep(self, key: bytes, known: Known) -> None:
        """Keep another value."""
        self.forget(key)
        if MEMORY_REMOTE_VALUE_BYTES_MIN <= len(known.value) <= self._bytes_max:
            self._known[key] = known
            self.held_bytes += len(known.value)
            while self.held_bytes > self._bytes_max:
                self.forget(next(iter(self._known)))

    def forget(self, key: bytes) -> None:
        """Keep it no longer."""
        self._sighted.pop(key, None)
        known = self._known.pop(key, None)
        if known is not None:
            self.held_bytes -= len(known.value)
