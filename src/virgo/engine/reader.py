"""Reading a stream in order and in bulk, by a pull consumer that lives as long as the reader.

The consumer is ephemeral and acknowledges nothing; the reader keeps its own place. A consumer that is
lost (its server restarted, the connection broke) is `Lost`, and a new reader begins where the old one
ended. Messages that come out of order or after a hole make it `Lost` as well, so that a hole is never
passed on because a message went astray on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from typing import Final

import msgspec
from nats.aio.msg import Msg

from virgo.engine.jetstream import NO_STREAM, JetStream, Refused, Stored
from virgo.engine.link import Listener, expired
from virgo.errors import EngineUnavailable

_SECOND_NS: Final = 1_000_000_000
# Messages and bytes asked for at once: enough to keep the server sending, little enough to hold.
_PULL_MESSAGES: Final = 1_000
_PULL_BYTES: Final = 8 * 1024 * 1024
# A pull without messages ends after this time, and is made again.
_PULL_S: Final = 5.0
# The server removes a consumer whose reader is gone.
_ABANDONED_S: Final = 60


class Lost(Exception):
    """The consumer is gone, or messages went astray; begin anew behind the last message read."""


class Reader:
    """Messages of one stream from a sequence on. Use as an async context manager.

    Args:
        start: sequence of the first message wanted.
        headers_only: leave the data away.
        pull_messages: how many to ask for at once.
    """

    def __init__(
        self,
        jetstream: JetStream,
        stream: str,
        *,
        start: int,
        headers_only: bool = False,
        pull_messages: int = _PULL_MESSAGES,
    ) -> None:
        self._jetstream = jetstream
        self._link = jetstream.link
        self._stream = stream
        self._start = start
        self._headers_only = headers_only
        self._pull_messages = min(pull_messages, _PULL_MESSAGES)
        self._consumer = f"virgo-{secrets.token_hex(8)}"
        self._inbox = self._link.new_inbox()
        self._generation = 0
        self._listener: Listener | None = None
        self._arrived: deque[Stored] = deque()
        self._event = asyncio.Event()
        self._pulling = 0  # messages still to come of the current pull
        self._delivered = 0  # consumer sequence of the last message
        self._trouble = ""
        self.pending = 0  # messages that the server has beyond those delivered

    def __repr__(self) -> str:
        return f"<Reader of {self._stream}, {self.pending} pending>"

    async def open(self, deadline: float) -> None:
        """Create the consumer. Raises Refused with NO_STREAM, Lost, EngineUnavailable."""
        self._listener = await self._link.listen(self._inbox, self._on_message)
        self._generation = self._link.generation
        self._link.on_lost.add(self._event.set)
        body = {
            "stream_name": self._stream,
            "config": {
                "name": self._consumer,
                "deliver_policy": "by_start_sequence",
                "opt_start_seq": max(1, self._start),
                "ack_policy": "none",
                "replay_policy": "instant",
                "inactive_threshold": _ABANDONED_S * _SECOND_NS,
                "mem_storage": True,
                "num_replicas": 1,
                "headers_only": self._headers_only,
            },
        }
        subject = f"CONSUMER.CREATE.{self._stream}.{self._consumer}"
        try:
            reply = await self._jetstream.api(subject, body, deadline=deadline)
        except Refused as refusal:
            if refusal.code == NO_STREAM:
                raise
            raise Lost(str(refusal)) from refusal
        self.pending = int(reply.get("num_pending", 0))

    async def close(self) -> None:
        """Remove the consumer; if the engine is away it removes it by itself later."""
        listener, self._listener = self._listener, None
        self._link.on_lost.discard(self._event.set)
        if listener is None:
            return
        await listener.close()
        if self._link.connected:
            with contextlib.suppress(EngineUnavailable):
                await self._link.publish(
                    f"$JS.API.CONSUMER.DELETE.{self._stream}.{self._consumer}",
                    b"",
                    reply=self._link.new_inbox(),  # without one the server does not even look
                    deadline=time.monotonic() + 1,
                    what="end a reader",
                )

    async def fetch(self, *, deadline: float) -> list[Stored]:
        """Messages that have come, at least one; an empty list when `deadline` passes without any.

        Raises:
            Lost: begin anew.
        """
        while not self._arrived:
            if self._trouble or self._generation != self._link.generation or not self._link.connected:
                raise Lost(self._trouble or "the connection was lost")
            if expired(deadline):
                return []
            if self._pulling <= 0:
                await self._pull()
            self._event.clear()
            try:
                # A pull that the server forgot is noticed by its silence.
                async with asyncio.timeout(min(deadline - time.monotonic(), _PULL_S + 2)):
                    await self._event.wait()
            except TimeoutError:
                if not expired(deadline):
                    raise Lost("the consumer is silent") from None
        found = list(self._arrived)
        self._arrived.clear()
        return found

    async def _pull(self) -> None:
        self._pulling = self._pull_messages
        await self._link.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}",
            msgspec.json.encode(
                {"batch": self._pull_messages, "max_bytes": _PULL_BYTES, "expires": int(_PULL_S * _SECOND_NS)}
            ),
            reply=self._inbox,
            deadline=time.monotonic() + 1,
            what="pull",
        )

    async def _on_message(self, message: Msg) -> None:
        self._event.set()
        headers = message.headers or {}
        if not message.reply.startswith("$JS.ACK."):
            status = headers.get("Status", "")
            if status in ("404", "408") or (status == "409" and "Exceeded" in headers.get("Description", "")):
                self._pulling = 0  # the pull ended in order
            elif status != "100":
                self._trouble = f"the server answered {status} {headers.get('Description', '')}"
            return
        sequence, delivered, self.pending = _positions(message.reply)
        self._pulling -= 1
        if delivered != self._delivered + 1:
            self._trouble = f"message {self._delivered + 1} of the consumer went astray"
        if not self._trouble:
            self._delivered = delivered
            self._arrived.append(Stored(sequence, message.subject, message.data, headers))


async def read_all(jetstream: JetStream, stream: str, *, deadline: float) -> list[Stored]:
    """All messages of a stream, without their data, as of the leader's last one; for small streams.

    Raises:
        EngineUnavailable: it was not possible before `deadline`.
    """
    while True:
        end = await jetstream.last_sequence(stream, deadline=deadline)
        if not end:
            return []
        reader = Reader(jetstream, stream, start=1, headers_only=True)
        found: list[Stored] = []
        try:
            await reader.open(deadline)
            while not found or found[-1].sequence < end:
                batch = await reader.fetch(deadline=deadline)
                if not batch:
                    raise EngineUnavailable(f"read {stream}: it took too long")
                found += batch
            return found
        except Lost as lost:
            if expired(deadline):
                raise EngineUnavailable(f"read {stream}: {lost}") from lost
            await asyncio.sleep(0.05)
        except Refused as refusal:
            raise EngineUnavailable(f"read {stream}: {refusal}") from refusal
        finally:
            await reader.close()


def _positions(reply: str) -> tuple[int, int, int]:
    """Stream sequence, consumer sequence and pending count in a message's reply subject.

    `$JS.ACK.STREAM.CONSUMER.TRIES.STREAMSEQ.CONSUMERSEQ.TIME.PENDING`, or with domain and account hash
    behind `ACK` and a random token at the end.
    """
    tokens = reply.split(".")
    first = 5 if len(tokens) == 9 else 7
    return int(tokens[first]), int(tokens[first + 1]), int(tokens[first + 3])
