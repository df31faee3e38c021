"""Functions published to the whole cloud: kept in the engine's registers, looked up by name on demand.

Publishing again takes effect at once on the node that was asked, and on the others as soon as its signal
reaches them, within EXPORT_FRESH_S even if that is lost. The node never unpickles what is published.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from virgo.engine.base import Engine
from virgo.errors import Conflict, EngineUnavailable, NotExported, TooLarge
from virgo.limits import EXPORT_FRESH_S, REGISTER_BYTES_MAX

log = logging.getLogger("virgo.cpu")

_PREFIX: Final = "cpu/exports/"
_SUBJECT: Final = "cpu/exports"


class PublishedFunction(msgspec.Struct, frozen=True, array_like=True):
    """A function as it is kept: cloudpickled, with the line that describes it and who published it."""

    function: bytes
    summary: str = ""
    publisher: str = ""


_decode = msgspec.msgpack.Decoder(PublishedFunction).decode


class Published:
    """The published functions, as one node sees them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[str, tuple[float, PublishedFunction | None]] = {}
        self._unsubscribe: Callable[[], Awaitable[None]] | None = None

    def __repr__(self) -> str:
        return f"<Published {len(self._known)} known>"

    async def start(self) -> None:
        """Listen for what other nodes publish."""
        self._unsubscribe = await self._engine.signals.subscribe(_SUBJECT, self._changed)

    async def stop(self) -> None:
        """Listen no more."""
        if self._unsubscribe is not None:
            await self._unsubscribe()
            self._unsubscribe = None

    async def find(self, name: str) -> PublishedFunction | None:
        """The function of that name, or None. Raises EngineUnavailable."""
        known = self._known.get(name)
        if known is not None and time.monotonic() - known[0] < EXPORT_FRESH_S:
            return known[1]
        register = await self._engine.registers.get(_PREFIX + name)
        found = _decode(register.value) if register is not None else None
        self._known[name] = (time.monotonic(), found)
        if len(self._known) > 10_000:  # names that do not exist are remembered too
            self._known.clear()
        return found

    async def publish(self, name: str, function: PublishedFunction) -> int:
        """Make a function callable on every node; returns its version. Raises TooLarge, EngineUnavailable."""
        value = msgspec.msgpack.encode(function)
        if len(value) > REGISTER_BYTES_MAX:
            raise TooLarge(
                f"the function {name} has {len(value)} bytes, and {REGISTER_BYTES_MAX} fit",
                hint="Keep large data out of its closure: put them into the memory pool and send the key.",
            )
        while True:
            present = await self._engine.registers.get(_PREFIX + name)
            try:
                version = await self._engine.registers.compare_and_set(
                    _PREFIX + name, value, version=present.version if present else 0
                )
            except Conflict:  # another publisher was faster; the last one counts
                continue
            await self._tell(name)
            return version

    async def withdraw(self, name: str) -> None:
        """Take a published function back. Raises NotExported, EngineUnavailable."""
        while True:
            present = await self._engine.registers.get(_PREFIX + name)
            if present is None:
                raise NotExported(f"no function {name} is published")
            try:
                await self._engine.registers.delete(_PREFIX + name, version=present.version)
            except Conflict:
                continue
            await self._tell(name)
            return

    async def listing(self) -> dict[str, PublishedFunction]:
        """All published functions by name. Raises EngineUnavailable."""
        found = {}
        for register in await self._engine.registers.names(_PREFIX):
            name = register.removeprefix(_PREFIX)
            function = await self.find(name)
            if function is not None:
                found[name] = function
        return found

    async def _tell(self, name: str) -> None:
        self._known.pop(name, None)
        try:
            await self._engine.signals.publish(_SUBJECT, name.encode())
        except EngineUnavailable as error:  # the others look it up again soon
            log.warning("the other nodes learn of %s only in %g s: %s", name, EXPORT_FRESH_S, error)

    def _changed(self, data: bytes) -> None:
        self._known.pop(data.decode("utf-8", "replace"), None)
