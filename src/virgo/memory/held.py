"""A value where it lies in a mapped store, without a copy, for the time of a block."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any


class Held:
    """A value where it lies in the map, for the time of a `with` block; see `KeyMapping.view`.

    Its pages are kept as they are by a transaction that reads, and the map is not closed meanwhile: from the
    beginning until `end`, or until it is forgotten, it is among `held`.
    """

    __slots__ = ("__weakref__", "_held", "memory", "txn")

    def __init__(self, held: dict[int, weakref.ref[Held]]) -> None:
        self.memory = memoryview(b"")
        self.txn: Any = None
        self._held = held
        held[id(self)] = weakref.ref(self)

    def __repr__(self) -> str:
        return f"<Held {self.memory!r}>"

    @property
    def number(self) -> int:
        """Of the change after which this was the value."""
        return int(self.txn.id())

    def __enter__(self) -> memoryview:
        return self.memory

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Hold it no longer."""
        try:
            self.memory.release()  # from now on using it is an error
        finally:
            try:
                if self.txn is not None:
                    self.txn.abort()
            finally:
                self._held.pop(id(self), None)


def any_held(held: dict[int, weakref.ref[Held]]) -> bool:
    """Whether there are any, or none but forgotten ones."""
    return any(one() is not None for one in list(held.values()))
