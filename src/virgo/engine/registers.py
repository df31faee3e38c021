"""Compare-and-set registers: one subject each in one stream that keeps the last message of a subject.

A register's version is the stream sequence of its last message. A write carries the version that it
expects, and the server checks it; a deletion writes a tombstone, so that a register's versions rise for
ever and a late writer of an earlier life is refused.

Reads are answered by the stream's leader. With one server that is exact. In a cluster a leader that was
deposed without noticing (paused, cut off) could answer with an old value for some seconds, so `get`
confirms what it read by a guarded empty write, which only the true leader can commit; `fresh=False` skips
that for readers who can live with an old value. `names` is not confirmed.

A write whose answer is lost is resolved: each write carries an id of its own, is sent again under the same
guard, and is found again by reading. Only if that stays open (the register was overwritten meanwhile, or
the deadline passed) is the outcome unknown, and the error says so.
"""

from __future__ import annotations

import secrets
import time
from typing import Final

from virgo.engine import naming
from virgo.engine.base import Register
from virgo.engine.jetstream import (
    EXPECT_SUBJECT,
    EXPECT_SUBJECT_LAST,
    WRONG_SEQUENCE,
    JetStream,
    Message,
    Refused,
    Stored,
)
from virgo.engine.link import Unanswered, expired
from virgo.engine.reader import read_all
from virgo.errors import BadArgument, Conflict, EngineUnavailable, TooLarge
from virgo.limits import ENGINE_REQUEST_S, REGISTER_BYTES_MAX

_WRITE: Final = "Virgo-Write"
_DELETED: Final = "Virgo-Deleted"


class NatsRegisters:
    """Registers in JetStream."""

    def __init__(self, jetstream: JetStream) -> None:
        self._jetstream = jetstream

    def __repr__(self) -> str:
        return f"<NatsRegisters {self._jetstream!r}>"

    async def get(self, name: str, *, fresh: bool = True) -> Register | None:
        """The register as last acknowledged, or None. See the module for `fresh`."""
        subject = naming.REGISTER_PREFIX + naming.encode(name)
        deadline = time.monotonic() + ENGINE_REQUEST_S
        while True:
            found = await self._jetstream.last(naming.REGISTERS_STREAM, subject, deadline=deadline)
            if not fresh or self._jetstream.replicas == 1 or await self._confirm(subject, found, deadline):
                return None if _absent(found) else _register(name, found)

    async def compare_and_set(self, name: str, value: bytes, *, version: int) -> int:
        """Set if the version is still that (0: absent); returns the new version.

        Raises:
            Conflict: it is not; nothing was changed.
            TooLarge: the value exceeds REGISTER_BYTES_MAX.
            EngineUnavailable: the outcome is unknown.
        """
        if len(value) > REGISTER_BYTES_MAX:
            raise TooLarge(
                f"register {name!r}: {len(value)} bytes, at most {REGISTER_BYTES_MAX}",
                hint="Bulk data belongs in the memory pool or a file; keep a reference here.",
            )
        return await self._write(name, value, version, {})

    async def delete(self, name: str, *, version: int) -> None:
        """Delete if the version is still that. Raises Conflict, EngineUnavailable."""
        if version == 0:
            raise Conflict(f"register {name!r} cannot be deleted at version 0: that means absent")
        await self._write(name, b"", version, {_DELETED: "1"})

    async def names(self, prefix: str = "") -> list[str]:
        """Names of the present registers that begin so, sorted."""
        deadline = time.monotonic() + ENGINE_REQUEST_S
        messages = await read_all(self._jetstream, naming.REGISTERS_STREAM, deadline=deadline)
        present = (
            naming.decode(message.subject.removeprefix(naming.REGISTER_PREFIX))
            for message in messages
            if message.subject.startswith(naming.REGISTER_PREFIX) and _DELETED not in message.headers
        )
        return sorted(name for name in present if name.startswith(prefix))

    # --- how --------------------------------------------------------------------------------

    async def _ensure(self, deadline: float) -> None:
        await self._jetstream.ensure(
            naming.REGISTERS_STREAM,
            (naming.REGISTER_PREFIX + ">", naming.READ_GUARD),
            deadline=deadline,
            max_msgs_per_subject=1,
        )

    async def _write(self, name: str, value: bytes, version: int, headers: dict[str, str]) -> int:
        if version < 0:
            raise BadArgument(f"register {name!r}: version {version}", hint="Versions begin at 1; 0: absent.")
        subject = naming.REGISTER_PREFIX + naming.encode(name)
        deadline = time.monotonic() + ENGINE_REQUEST_S
        await self._ensure(deadline)
        write = secrets.token_hex(12)
        expected = version
        uncertain = False  # whether an earlier sending may yet take effect
        while True:
            guarded = {**headers, _WRITE: write, EXPECT_SUBJECT_LAST: str(expected)}
            try:
                return await self._jetstream.store(
                    [Message(subject, value, guarded)], deadline=deadline, what=f"set register {name!r}"
                )
            except Unanswered:
                uncertain = True
                if expired(deadline):
                    raise
            except Refused as refusal:
                assert refusal.code == WRONG_SEQUENCE, refusal  # no batch, no message id
            found = await self._jetstream.last(naming.REGISTERS_STREAM, subject, deadline=deadline)
            if found is not None and found.headers.get(_WRITE) == write:
                return found.sequence
            if version == 0 and _absent(found):
                expected = found.sequence if found is not None else 0
            elif found is None or found.sequence != version:
                self._lost(name, version, found, uncertain=uncertain)

    def _lost(self, name: str, version: int, found: Stored | None, *, uncertain: bool) -> None:
        if uncertain:
            raise EngineUnavailable(
                f"set register {name!r}: the answer was lost and the register was written again meanwhile, "
                "so whether the write took effect is unknown",
                hint="Read the register and decide again.",
            )
        now = "absent" if _absent(found) or found is None else f"at version {found.sequence}"
        raise Conflict(
            f"register {name!r} is {now}, not {f'at version {version}' if version else 'absent'}",
            hint="Read it again and decide anew.",
        )

    async def _confirm(self, subject: str, found: Stored | None, deadline: float) -> bool:
        """Whether the register still is as read, by the word of a majority."""
        await self._ensure(deadline)
        guard = {EXPECT_SUBJECT_LAST: str(found.sequence if found else 0), EXPECT_SUBJECT: subject}
        try:
            await self._jetstream.store(
                [Message(naming.READ_GUARD, b"", guard)], deadline=deadline, what="confirm a read"
            )
        except Refused:
            return False
        except Unanswered:
            if expired(deadline):
                raise
            return False
        return True


def _absent(found: Stored | None) -> bool:
    return found is None or _DELETED in found.headers


def _register(name: str, found: Stored | None) -> Register:
    assert found is not None
    return Register(name, found.data, found.sequence)
