"""Group commit: appends that wait for the same log go out together, in one message if they fit.

While one write is on its way to the disk, further callers gather; the next write takes all of them. So the
log syncs as often as the disk can and no more often, and a caller that is alone does not wait for company.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from virgo.engine import frames, naming
from virgo.engine.jetstream import DUPLICATE_IN_BATCH, MESSAGE_ID, JetStream, Message, Refused
from virgo.engine.link import Unanswered, expired, until
from virgo.engine.reader import Lost, Reader
from virgo.errors import EngineUnavailable, VirgoError
from virgo.limits import LOG_BATCH_ENTRIES_MAX

_RETRY_S: Final = 0.05


@dataclass(slots=True)
class _Waiting:
    entries: Sequence[bytes]
    size: int
    deadline: float
    done: asyncio.Future[int]
    sent: bool = False


class Appender:
    """The unconditional appends of one engine to one log."""

    def __init__(self, jetstream: JetStream, log: str) -> None:
        self._jetstream = jetstream
        self._log = log
        self._stream = naming.log_stream(log)
        self._subject = naming.log_subject(log)
        self._what = f"append to log {log!r}"
        self._waiting: deque[_Waiting] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._known = 0  # a stream sequence at or before the log's end

    def __repr__(self) -> str:
        return f"<Appender to {self._log!r}, {len(self._waiting)} waiting>"

    async def append(self, entries: Sequence[bytes], size: int, deadline: float) -> int:
        """Append the entries, together with others' perhaps; returns the last one's sequence."""
        waiting = _Waiting(entries, size, deadline, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name=self._what)
        try:
            async with until(deadline):
                return await waiting.done
        except TimeoutError:
            outcome = "whether it was appended is unknown" if waiting.sent else "nothing was appended"
            raise EngineUnavailable(f"{self._what}: the engine did not answer in time; {outcome}") from None

    async def close(self) -> None:
        """Stop; appends that wait fail."""
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        _fail(self._waiting, EngineUnavailable(f"{self._what}: the engine was closed"))
        self._waiting.clear()

    async def _work(self) -> None:
        """Write until nobody waits."""
        while self._waiting:
            group = self._next_group()
            if not group:
                continue
            entries = [entry for waiting in group for entry in waiting.entries]
            try:
                ends = await self._write(entries, max(waiting.deadline for waiting in group))
            except VirgoError as error:
                _fail(group, error)
            except BaseException:
                _fail(group, Unanswered(f"{self._what}: the engine was closed"))
                raise
            else:
                count = 0
                for waiting in group:
                    count += len(waiting.entries)
                    if not waiting.done.done():
                        waiting.done.set_result(ends[count - 1])

    def _next_group(self) -> list[_Waiting]:
        """Those who go next: as many as fit into one message, or one who needs several."""
        group: list[_Waiting] = []
        count = size = 0
        while self._waiting:
            following = self._waiting[0]
            if following.done.done():  # its caller was cancelled or gave up
                self._waiting.popleft()
                continue
            count += len(following.entries)
            size += following.size + 4 * len(following.entries)
            if group and (count > LOG_BATCH_ENTRIES_MAX or size > frames.FRAME_BYTES_MAX // 2):
                break
            following.sent = True
            group.append(self._waiting.popleft())
        return group

    async def _write(self, entries: Sequence[bytes], deadline: float) -> list[int]:
        """Store the entries once; returns their sequences."""
        packed = frames.pack(entries)
        write = secrets.token_hex(12)
        messages = [Message(self._subject, frame, {}) for frame in packed[:-1]]
        messages.append(Message(self._subject, packed[-1], {MESSAGE_ID: write}))
        if not self._known:
            self._known = await self._jetstream.last_sequence(self._stream, deadline=deadline) or 0
        while True:
            try:
                # Sent again under the same id it is refused, or acknowledged as a duplicate, if it is stored.
                last = await self._jetstream.store(messages, deadline=deadline, what=self._what)
                break
            except Unanswered:
                if expired(deadline):
                    raise
            except Refused as refusal:
                if refusal.code != DUPLICATE_IN_BATCH:
                    raise EngineUnavailable(f"{self._what}: {refusal}") from refusal
                last = await self._find(write, deadline)
                break
        self._known = last
        first = last - len(packed) + 1
        return [
            frames.compose(first + number, index)
            for number, frame in enumerate(packed)
            for index in range(frames.count(frame))
        ]

    async def _find(self, write: str, deadline: float) -> int:
        """The stream sequence of the message with that id, which is stored behind what we know."""
        while True:
            reader = Reader(self._jetstream, self._stream, start=self._known + 1, headers_only=True)
            try:
                await reader.open(deadline)
                while messages := await reader.fetch(deadline=deadline):
                    for message in messages:
                        if message.headers.get(MESSAGE_ID) == write:
                            return message.sequence
                raise Unanswered(f"{self._what}: it was stored, but not found again in time")
            except Lost as lost:
                if expired(deadline):
                    raise Unanswered(f"{self._what}: {lost}") from lost
                await asyncio.sleep(_RETRY_S)
            finally:
                await reader.close()


def _fail(group: Iterable[_Waiting], error: VirgoError) -> None:
    for waiting in group:
        if not waiting.done.done():
            waiting.done.set_exception(error)
