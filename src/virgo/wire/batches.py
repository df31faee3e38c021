"""The batches of one chunk: made when a command first asks for one, closed before the chunk is answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from virgo.errors import VirgoError
from virgo.wire import resp
from virgo.wire.hooks import Batch
from virgo.wire.refusals import defect

B = TypeVar("B", bound=Batch)


class Batches:
    """Those of one connection, by the keys of their makers. `error` gives the bytes of an error."""

    __slots__ = ("_error", "_open")

    def __init__(self, error: Callable[[VirgoError], bytes] = resp.error) -> None:
        self._error = error
        self._open: dict[bytes, Batch] = {}

    def __repr__(self) -> str:
        return f"<Batches {len(self._open)} open>"

    def __bool__(self) -> bool:
        return bool(self._open)

    def get(self, key: bytes, factory: Callable[[], B]) -> B:
        """The batch of that key, made by `factory` on first use."""
        found = self._open.get(key)
        if found is None:
            found = self._open[key] = factory()
        return found  # type: ignore[return-value]

    def close(self, out: list[bytes], writes: list[int]) -> Awaitable[None] | None:
        """Make all final; answers at `writes` become errors if that fails. Returns what they wait for."""
        pending: Awaitable[None] | None = None
        batches, self._open = self._open, {}
        for batch in batches.values():
            try:
                pending = batch.close() or pending
            except Exception as error:  # noqa: BLE001 - a defect must not take the connection down
                failure = error if isinstance(error, VirgoError) else defect([b"batch"], error)
                fail(out, writes, self._error(failure))
        return pending


def fail(out: list[bytes], writes: list[int], error: bytes) -> None:
    """Let the error be the answer to all that wrote, but for those that want none."""
    for position in writes:
        if out[position] is not resp.SILENT:
            out[position] = error
