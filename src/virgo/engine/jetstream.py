"""JetStream as this package uses it: streams, guarded writes, reads by the leader.

Every call is bounded by a deadline of the monotonic clock. A refusal that is known to have had no effect
and to pass by itself (an election, a write in flight on the same subject) is tried again until then; an
outcome that is unknown is `Unanswered`, and the caller, who knows how to find out, decides.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from virgo.engine.audit import stream_findings
from virgo.engine.link import Link, NobodyThere, Unanswered, expired
from virgo.errors import DiskFull, EngineUnavailable, UnsafeEngine
from virgo.limits import MiB

# Codes of the server (its errors.json); the comment is what they mean to us.
WRONG_SEQUENCE: Final = 10071  # the guard of a write did not hold
NO_MESSAGE: Final = 10037
NO_STREAM: Final = 10059
NAME_IN_USE: Final = 10058  # the stream exists with another configuration
DUPLICATE_IN_BATCH: Final = 10201  # a message of the batch is stored already
_PASSING: Final = frozenset(
    {
        10005,  # no suitable peers yet
        10008,  # system temporarily unavailable
        10009,  # not the leader (any more)
        10158,  # an earlier copy of this write is in flight
        10163,  # the last sequence of a subject is not known yet
        10164,  # another guarded write of the subject is in flight: not lost, only early
        10176,  # a batch was cut by a lost connection, nothing of it is stored
        10210,  # too many batches in flight
    }
)
_STORAGE: Final = frozenset({10002, 10023, 10028, 10047, 10077})
# A request to a stream without a leader is answered by nobody; so each is asked again after this time,
# and later the more there is to store.
_ATTEMPT_S: Final = 1.0
_STORE_BYTES_PER_S: Final = 8 * MiB
_PAUSE_S: Final = 0.005
_PAUSE_S_MAX: Final = 0.25

EXPECT_LAST: Final = "Nats-Expected-Last-Sequence"
EXPECT_SUBJECT_LAST: Final = "Nats-Expected-Last-Subject-Sequence"
EXPECT_SUBJECT: Final = "Nats-Expected-Last-Subject-Sequence-Subject"
MESSAGE_ID: Final = "Nats-Msg-Id"
BATCH_ID: Final = "Nats-Batch-Id"
TTL: Final = "Nats-TTL"
MARKER: Final = "Nats-Marker-Reason"

_SECOND_NS: Final = 1_000_000_000
DUPLICATE_WINDOW_S: Final = 120


class Refused(Exception):
    """The server refused a request; internal to this package.

    Attributes:
        code: the server's error code.
    """

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"{description} ({code})")
        self.code = code


@dataclass(frozen=True, slots=True)
class Stored:
    """A message in a stream."""

    sequence: int
    subject: str
    data: bytes
    headers: Mapping[str, str]

    @property
    def marker(self) -> bool:
        """Whether the server put it in the place of a message whose time ran out."""
        return MARKER in self.headers


@dataclass(frozen=True, slots=True)
class Message:
    """A message to be stored."""

    subject: str
    data: bytes
    headers: Mapping[str, str]


class _Error(msgspec.Struct):
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct):
    seq: int = 0
    error: _Error | None = None


class _RawMessage(msgspec.Struct):
    seq: int
    subject: str
    hdrs: bytes = b""
    data: bytes = b""


class _GetReply(msgspec.Struct):
    message: _RawMessage | None = None
    error: _Error | None = None


_decode_ack = msgspec.json.Decoder(_Ack).decode
_decode_get = msgspec.json.Decoder(_GetReply).decode


class JetStream:
    """JetStream over one link.

    Args:
        replicas: copies of each stream, 1 or as many as the cluster has servers.
        unsafe: use streams whose settings can lose acknowledged data, and keep them in `findings`.
    """

    def __init__(self, link: Link, *, replicas: int = 1, unsafe: bool = False) -> None:
        self.link = link
        self.replicas = replicas
        self.unsafe = unsafe
        self.findings: dict[str, str] = {}
        self._ready: set[str] = set()
        self._ensuring = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<JetStream over {self.link!r}, {self.replicas} replicas>"

    # --- streams ----------------------------------------------------------------------------

    async def ensure(
        self, name: str, subjects: Sequence[str], *, deadline: float, note: str = "", **settings: Any
    ) -> None:
        """Create the stream if it is not there, and refuse one whose settings are unsafe.

        Args:
            note: what the stream holds, kept in its metadata for people.
            settings: what its use relies on, beyond what all streams have.

        Raises:
            UnsafeEngine: it exists with settings that can lose acknowledged data.
        """
        if name in self._ready:
            return
        async with self._ensuring:
            if name in self._ready:
                return
            wanted = _configuration(name, subjects, self.replicas, settings)
            found = await self._create({**wanted, "metadata": {"virgo": note}}, deadline)
            findings = stream_findings(found, replicas=self.replicas, settings=settings)
            if findings and not self.unsafe:
                raise UnsafeEngine(f"stream {name}: {'; '.join(findings)}")
            self.findings.update({f"{name}: {finding}": name for finding in findings})
            self._ready.add(name)

    async def _create(self, configuration: dict[str, Any], deadline: float) -> dict[str, Any]:
        name = configuration["name"]
        try:
            reply = await self.api(f"STREAM.CREATE.{name}", configuration, deadline=deadline)
        except Refused as refusal:
            if refusal.code != NAME_IN_USE:
                raise EngineUnavailable(f"create stream {name}: {refusal}") from refusal
            reply = await self.api(f"STREAM.INFO.{name}", deadline=deadline)
        found: dict[str, Any] = reply["config"]
        return found

    async def last_sequence(self, stream: str, *, deadline: float) -> int | None:
        """The last sequence of a stream by its leader; None if there is no such stream."""
        try:
            info = await self.api(f"STREAM.INFO.{stream}", deadline=deadline)
        except Refused as refusal:
            if refusal.code == NO_STREAM:
                return None
            raise EngineUnavailable(f"ask for stream {stream}: {refusal}") from refusal
        return int(info["state"]["last_seq"])

    async def api(self, subject: str, body: object = None, *, deadline: float) -> dict[str, Any]:
        """A call of the JetStream API that may be repeated. Raises Refused, EngineUnavailable."""
        data = b"" if body is None else msgspec.json.encode(body)
        pause_s = _PAUSE_S
        while True:
            try:
                answer = await self.link.request(
                    f"$JS.API.{subject}", data, deadline=_attempt(deadline), what=subject
                )
                reply: dict[str, Any] = msgspec.json.decode(answer.data)
                if "error" not in reply:
                    return reply
                refusal = Refused(reply["error"].get("err_code", 0), reply["error"].get("description", ""))
                if refusal.code not in _PASSING or expired(deadline):
                    raise refusal
            except (NobodyThere, Unanswered):  # every call of the API here may be repeated
                if expired(deadline):
                    raise
            pause_s = await _pause(pause_s)

    # --- reading ----------------------------------------------------------------------------

    async def last(self, stream: str, subject: str, *, deadline: float) -> Stored | None:
        """The last message of a subject, from the stream's leader."""
        return await self._get(stream, {"last_by_subj": subject}, deadline)

    async def at(self, stream: str, sequence: int, *, deadline: float) -> Stored | None:
        """The message with that sequence, from the stream's leader."""
        return await self._get(stream, {"seq": sequence}, deadline)

    async def _get(self, stream: str, what: dict[str, Any], deadline: float) -> Stored | None:
        subject = f"$JS.API.STREAM.MSG.GET.{stream}"
        data = msgspec.json.encode(what)
        pause_s = _PAUSE_S
        while True:
            try:
                answer = await self.link.request(
                    subject, data, deadline=_attempt(deadline), what=f"read {stream}"
                )
                reply = _decode_get(answer.data)
                if reply.message is not None:
                    found = reply.message
                    return Stored(found.seq, found.subject, found.data, parse_headers(found.hdrs))
                error = reply.error or _Error(description="an empty answer")
                if error.err_code in (NO_MESSAGE, NO_STREAM):
                    return None
                if error.err_code not in _PASSING or expired(deadline):
                    raise EngineUnavailable(f"read {stream}: {error.description} ({error.err_code})")
            except (NobodyThere, Unanswered):
                if expired(deadline):
                    raise
            pause_s = await _pause(pause_s)

    # --- writing ----------------------------------------------------------------------------

    async def store(self, messages: Sequence[Message], *, deadline: float, what: str) -> int:
        """Store all of the messages or none, in one sync; returns the sequence of the last.

        Raises:
            Refused: a guard did not hold (WRONG_SEQUENCE), or DUPLICATE_IN_BATCH; nothing was stored.
            DiskFull: the engine has no room; nothing was stored.
            Unanswered: it may be stored, now or later; raised before `deadline` too, for the caller to
                find out and try again.
            EngineUnavailable: it was not sent.
        """
        pause_s = _PAUSE_S
        size = sum(len(message.data) for message in messages)
        while True:
            attempt = _attempt(deadline, size)
            try:
                if len(messages) == 1:
                    only = messages[0]
                    answer = await self.link.request(
                        only.subject, only.data, headers=only.headers, deadline=attempt, what=what
                    )
                else:
                    answer = await self._send_batch(messages, attempt, what)
                ack = _decode_ack(answer.data)
                if ack.error is None:
                    return ack.seq
                _refuse(ack.error, what, passing=not expired(deadline))
            except NobodyThere:
                if expired(deadline):
                    raise
            pause_s = await _pause(pause_s)

    async def _send_batch(self, messages: Sequence[Message], deadline: float, what: str) -> Any:
        # A batch that was sent once is not sent again under its id: the server may still wait for its rest.
        batch = f"{random.getrandbits(128):032x}"
        for number, message in enumerate(messages[:-1], 1):
            await self.link.publish(
                message.subject,
                message.data,
                headers={**message.headers, BATCH_ID: batch, "Nats-Batch-Sequence": str(number)},
                deadline=deadline,
                what=what,
            )
        final = {BATCH_ID: batch, "Nats-Batch-Sequence": str(len(messages)), "Nats-Batch-Commit": "1"}
        return await self.link.request(
            messages[-1].subject,
            messages[-1].data,
            headers={**messages[-1].headers, **final},
            deadline=deadline,
            what=what,
        )


def parse_headers(raw: bytes) -> dict[str, str]:
    """The headers of a stored message."""
    headers: dict[str, str] = {}
    for line in raw.split(b"\r\n")[1:]:
        key, colon, value = line.partition(b":")
        if colon:
            headers[key.decode("ascii", "replace").strip()] = value.decode("utf-8", "replace").strip()
    return headers


def _refuse(error: _Error, what: str, *, passing: bool) -> None:
    """Raise what a refused write means; return if it may be tried again."""
    refusal = Refused(error.err_code, error.description)
    if error.err_code in (WRONG_SEQUENCE, DUPLICATE_IN_BATCH):
        raise refusal
    if error.err_code in _PASSING:
        if passing:
            return
        raise EngineUnavailable(f"{what}: {refusal}") from refusal
    if error.err_code in _STORAGE:
        raise DiskFull(f"{what}: the engine cannot store it: {refusal}") from refusal
    raise EngineUnavailable(f"{what}: the engine refuses: {refusal}") from refusal


def _configuration(name: str, subjects: Sequence[str], replicas: int, settings: Mapping[str, Any]) -> Any:
    return {
        "name": name,
        "subjects": list(subjects),
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "num_replicas": replicas,
        "max_consumers": -1,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "max_msg_size": -1,
        "duplicate_window": DUPLICATE_WINDOW_S * _SECOND_NS,
        "allow_atomic": True,
        "allow_direct": False,
        "deny_delete": True,
        **settings,
    }


def _attempt(deadline: float, size: int = 0) -> float:
    """When to give up waiting for one answer."""
    return min(deadline, time.monotonic() + _ATTEMPT_S + size / _STORE_BYTES_PER_S)


async def _pause(pause_s: float) -> float:
    """Wait a little, and say how long to wait the next time."""
    await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311 - spreads contenders
    return min(2 * pause_s, _PAUSE_S_MAX)
