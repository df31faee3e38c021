"""Durable logs: one stream a log, entries packed into frames, appends of many callers in one sync.

An append that does not say `after` what joins those of other callers that wait for the same log, and one
message carries them all; each caller still has all or none. One that says so is sent alone, guarded by the
log's last sequence. Entries that do not fit into one message go as an atomic batch.

An append whose answer is lost is sent again under the same id or guard, which the server uses to refuse
the second copy; so its outcome is found out unless the engine stays away until the deadline.

Entries are never changed, so a read is right wherever it is served; how far the log goes is asked of the
stream's leader.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Final

from virgo.engine import frames, naming
from virgo.engine.appends import Appender
from virgo.engine.base import Entry
from virgo.engine.jetstream import EXPECT_LAST, JetStream, Message, Refused
from virgo.engine.link import Unanswered, expired
from virgo.engine.reader import Lost, Reader
from virgo.errors import BadArgument, Conflict, EngineUnavailable, UnsafeEngine
from virgo.limits import ENGINE_REQUEST_S, LOG_BATCH_BYTES_MAX

WRITE: Final = "Virgo-Write"
_RETRY_S: Final = 0.1
# Below so many messages single reads cost less than a consumer.
_SINGLE_READS_MAX: Final = 3
# Logs whose end is remembered, to spare a read before a guarded append.
_ENDS_MAX: Final = 1_000


class NatsLogs:
    """Logs in JetStream."""

    def __init__(self, jetstream: JetStream) -> None:
        self._jetstream = jetstream
        self._appenders: dict[str, Appender] = {}
        self._ends: OrderedDict[str, int] = OrderedDict()

    def __repr__(self) -> str:
        return f"<NatsLogs {self._jetstream!r}>"

    async def append(self, log: str, entries: Sequence[bytes], *, after: int | None = None) -> int:
        """Append all or none in one sync; returns the last entry's sequence.

        With `after`, only if the log's last sequence is that (0: empty).

        Raises:
            Conflict: the log's last sequence is another; nothing was appended.
            TooLarge: see LOG_ENTRY_BYTES_MAX, LOG_BATCH_ENTRIES_MAX, LOG_BATCH_BYTES_MAX.
            EngineUnavailable: the outcome is unknown.
        """
        size = frames.check(entries)
        deadline = time.monotonic() + ENGINE_REQUEST_S
        await self._ensure(log, deadline)
        if after is None:
            appender = self._appenders.get(log)
            if appender is None:
                appender = self._appenders[log] = Appender(self._jetstream, log)
            return await appender.append(entries, size, deadline)
        last = await self._append_after(log, entries, after, deadline)
        self._remember(log, last)
        return last

    async def read(self, log: str, *, start: int = 1, limit: int = 1000) -> list[Entry]:
        """Entries from sequence `start` on, at most `limit`; an empty list at the end.

        Fewer than `limit` come also when they exceed LOG_BATCH_BYTES_MAX together.
        """
        if start < 0 or limit < 0:
            raise BadArgument(f"read log {log!r}: start {start}, limit {limit}", hint="Neither is negative.")
        deadline = time.monotonic() + ENGINE_REQUEST_S
        stream = naming.log_stream(log)
        end = await self._jetstream.last_sequence(stream, deadline=deadline) or 0
        first = max(1, frames.split(start)[0])
        found: list[Entry] = []
        size = 0
        if first > end or not limit:
            return found
        async for sequence, frame in self._messages(stream, first, end, deadline):
            for entry in frames.unpack(sequence, frame):
                if entry.sequence >= start:
                    found.append(entry)
                    size += len(entry.data)
                    if len(found) == limit or size > LOG_BATCH_BYTES_MAX:
                        return found
        return found

    async def follow(self, log: str, *, start: int = 1) -> AsyncIterator[Entry]:
        """Entries from `start` on, without end, across reconnects and without gap or duplicate.

        A log that is not there yet is created. While the engine is away it waits; it raises UnsafeEngine
        when the log was there and is gone.
        """
        stream = naming.log_stream(log)
        position = max(1, frames.split(start)[0])
        gone_since = 0.0
        while True:
            reader = Reader(self._jetstream, stream, start=position)
            try:
                deadline = time.monotonic() + ENGINE_REQUEST_S
                await self._ensure(log, deadline)
                await reader.open(deadline)
                while True:
                    for message in await reader.fetch(deadline=time.monotonic() + ENGINE_REQUEST_S):
                        for entry in frames.unpack(message.sequence, message.data):
                            if entry.sequence >= start:
                                yield entry
                        position = message.sequence + 1
                    gone_since = 0.0
            except (Lost, EngineUnavailable):
                await asyncio.sleep(_RETRY_S)
            except Refused as refusal:
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > ENGINE_REQUEST_S:
                    raise UnsafeEngine(f"log {log!r} is gone from the engine: {refusal}") from refusal
                await asyncio.sleep(_RETRY_S)
            finally:
                await reader.close()

    async def close(self) -> None:
        """End the appenders; what waits in them fails."""
        for appender in self._appenders.values():
            await appender.close()

    # --- how --------------------------------------------------------------------------------

    async def _ensure(self, log: str, deadline: float) -> None:
        await self._jetstream.ensure(
            naming.log_stream(log), (naming.log_subject(log),), deadline=deadline, note=f"log {log}"
        )

    async def _append_after(self, log: str, entries: Sequence[bytes], after: int, deadline: float) -> int:
        """See `append`. The id of the write is on its first message, right behind `after`."""
        stream = naming.log_stream(log)
        what = f"append to log {log!r}"
        expected = await self._guard(log, stream, after, deadline)
        write = secrets.token_hex(12)
        packed = frames.pack(entries)
        first = {EXPECT_LAST: str(expected), WRITE: write}
        subject = naming.log_subject(log)
        messages = [Message(subject, frame, {} if index else first) for index, frame in enumerate(packed)]
        last_index = frames.count(packed[-1]) - 1
        uncertain = False
        while True:
            try:
                stored = await self._jetstream.store(messages, deadline=deadline, what=what)
                return frames.compose(stored, last_index)
            except Unanswered:
                if expired(deadline):
                    raise
                uncertain = True
            except Refused as refusal:
                found = (
                    await self._jetstream.at(stream, expected + 1, deadline=deadline) if uncertain else None
                )
                if found is not None and found.headers.get(WRITE) == write:
                    return frames.compose(expected + len(messages), last_index)
                if found is not None or not uncertain:
                    raise Conflict(
                        f"{what}: its last sequence is no longer {after}",
                        hint="Read what was appended meanwhile and decide again.",
                    ) from refusal
                if expired(deadline):
                    raise EngineUnavailable(f"{what}: {refusal}") from refusal
                await asyncio.sleep(_RETRY_S)  # in a cluster the earlier copy may be on its way still

    async def _guard(self, log: str, stream: str, after: int, deadline: float) -> int:
        """The stream sequence of which `after` is the last entry. Raises Conflict if it is not."""
        sequence, index = frames.split(after)
        if after == 0 or self._ends.get(log) == after:
            return sequence
        found = await self._jetstream.at(stream, sequence, deadline=deadline) if sequence > 0 else None
        if found is None or frames.count(found.data) - 1 != index:
            raise Conflict(
                f"append to log {log!r}: {after} is not its last sequence",
                hint="Give the sequence of the last entry, as `append` and `read` return it.",
            )
        return sequence

    def _remember(self, log: str, last: int) -> None:
        self._ends[log] = last
        self._ends.move_to_end(log)
        while len(self._ends) > _ENDS_MAX:
            self._ends.popitem(last=False)

    async def _messages(
        self, stream: str, first: int, end: int, deadline: float
    ) -> AsyncIterator[tuple[int, bytes]]:
        """Messages of a stream from `first` to `end`, in order."""
        if end - first < _SINGLE_READS_MAX:
            for sequence in range(first, end + 1):
                found = await self._jetstream.at(stream, sequence, deadline=deadline)
                if found is not None:
                    yield sequence, found.data
            return
        while first <= end:
            reader = Reader(self._jetstream, stream, start=first, pull_messages=end - first + 1)
            try:
                await reader.open(deadline)
                while first <= end:
                    messages = await reader.fetch(deadline=deadline)
                    if not messages:
                        raise EngineUnavailable(f"read {stream}: it took too long")
                    for message in messages:
                        first = message.sequence + 1
                        yield message.sequence, message.data
            except Lost as lost:
                if expired(deadline):
                    raise EngineUnavailable(f"read {stream}: {lost}") from lost
                await asyncio.sleep(_RETRY_S)
            except Refused as refusal:
                raise EngineUnavailable(f"read {stream}: {refusal}") from refusal
            finally:
                await reader.close()
