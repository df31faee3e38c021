"""A value where it lies in a mapped store, without a copy, for the time of a block."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any


class Held:
    """A value where it lies in the map, for the time of a `with` block; see `KeyMapping.view`.

    Its pages are kept as they are by a transaction that reads, and the map is not closed meanwhile.
    """

    __slots__ = ("_leave", "_memory", "_txn")

    def __init__(self, memory: memoryview, txn: Any, leave: Callable[[], None]) -> None:
        self._memory = memory
        self._txn = txn
        self._leave = leave

    def __repr__(self) -> str:
        return f"<Held {self._memory!r}>"

    @property
    def number(self) -> int:
        """Of the change after which this was the value."""
        return int(self._txn.id())

    def __enter__(self) -> memoryview:
        return self._memory

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._memory.release()  # from now on using it is an error
        finally:
            self._txn.abort()
            self._leave()
