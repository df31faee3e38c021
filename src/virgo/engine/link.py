"""The connection to NATS: requests with a deadline, messages, subscriptions that outlive a reconnect.

One task owns the connection and makes it anew, with a new client, whenever it ends. The client library's
own reconnection is not used: it sends what was half sent to the server before, it ends for good on some
server errors, and it leaves requests that were under way to their timeouts. Here they fail at once, with
`Unanswered`, and whoever sent them decides what to do about the unknown outcome.

Errors of the library become VirgoErrors here and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from virgo.errors import EngineUnavailable, TooLarge
from virgo.limits import CONNECT_S, ENGINE_PENDING_BYTES_MAX, ENGINE_REQUEST_S

log = logging.getLogger("virgo.engine")
OnMessage = Callable[[Msg], Awaitable[None]]

RECONNECT_WAIT_S: Final = 0.2
# A server that vanished without a word (power, cable) is given up after three of these.
_PING_INTERVAL_S: Final = 1
_PINGS_OUTSTANDING_MAX: Final = 2
# How often a connection is looked at, and how many looks in a row must find it closed.
_LOOK_S: Final = 1.0
_LOOKS_ENDED: Final = 2


class Unanswered(EngineUnavailable):
    """The request was sent and no answer came: the outcome is unknown."""


class NobodyThere(EngineUnavailable):
    """The server answered that nobody serves the subject: the request had no effect."""


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """How to connect. At most one of `token`, `user` with `password`, and `credentials` is used."""

    urls: tuple[str, ...]
    name: str = "virgo"
    token: str = field(default="", repr=False)
    user: str = ""
    password: str = field(default="", repr=False)
    credentials: str = ""
    tls: ssl.SSLContext | None = None
    tls_hostname: str = ""

    def arguments(self, url: str) -> dict[str, Any]:
        """Arguments of the library's `connect`."""
        return {
            "servers": [url],
            "name": self.name,
            "token": self.token or None,
            "user": self.user or None,
            "password": self.password or None,
            "user_credentials": self.credentials or None,
            "tls": self.tls,
            "tls_hostname": self.tls_hostname or None,
            "allow_reconnect": False,
            "max_reconnect_attempts": 1,
            "reconnect_time_wait": 0,
            "connect_timeout": CONNECT_S,
            "ping_interval": _PING_INTERVAL_S,
            "max_outstanding_pings": _PINGS_OUTSTANDING_MAX,
            "flush_timeout": CONNECT_S,
        }


class Listener:
    """One subscription, made again on every new connection."""

    def __init__(self, link: Link, subject: str, queue: str, on_message: OnMessage) -> None:
        self._link = link
        self.subject = subject
        self.queue = queue
        self.on_message = on_message
        self._subscription: Subscription | None = None

    def __repr__(self) -> str:
        return f"<Listener {self.subject}{f' queue {self.queue}' if self.queue else ''}>"

    async def attach(self, client: Client) -> None:
        """Subscribe on a new connection."""
        self._subscription = await client.subscribe(
            self.subject,
            queue=self.queue,
            cb=self.on_message,
            pending_bytes_limit=ENGINE_PENDING_BYTES_MAX,
        )

    async def close(self) -> None:
        """End it, here and on the server, at once."""
        self._link.forget(self)
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with contextlib.suppress(nats.errors.Error, OSError):  # a lost connection has ended it already
                await subscription.unsubscribe()

    async def drain(self) -> None:
        """End it: on return the server sends nothing more, and what it had sent was handled."""
        self._link.forget(self)
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
                async with asyncio.timeout(ENGINE_REQUEST_S):
                    await subscription.drain()  # type: ignore[no-untyped-call]


class Link:
    """One connection to the engine, kept up until `close`."""

    def __init__(self, options: LinkOptions) -> None:
        self.options = options
        self.url = options.urls[0]
        self.version = self.server_id = ""
        self.servers: tuple[str, ...] = options.urls
        self.reconnects = 0
        self.generation = 0  # rises with every new connection
        self.last_error = ""
        self._failed_at: dict[str, float] = {}  # by URL, in monotonic time
        self._client: Client | None = None
        self._up = asyncio.Event()
        self._ended = asyncio.Event()
        self._listeners: set[Listener] = set()
        self._waiting: dict[str, asyncio.Future[Msg]] = {}
        self._inbox = f"_INBOX.{secrets.token_hex(12)}"
        self._serial = 0
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False
        self.on_lost: set[Callable[[], None]] = set()  # called when a connection has ended

    def __repr__(self) -> str:
        return f"<Link {self.url} {'up' if self.connected else 'down'}, {self.reconnects} reconnects>"

    @property
    def connected(self) -> bool:
        """Whether a connection stands now."""
        return self._client is not None and self._client.is_connected

    async def open(self, timeout_s: float = ENGINE_REQUEST_S) -> None:
        """Connect for the first time. Raises EngineUnavailable."""
        await self._listen(Listener(self, f"{self._inbox}.*", "", self._on_reply))
        self._keeper = asyncio.create_task(self._keep(), name="engine link")
        try:
            await self.wait_up(time.monotonic() + timeout_s, "connect")
        except EngineUnavailable:
            await self.close()
            raise

    async def close(self) -> None:
        """Disconnect; requests under way fail."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        self._lose("the connection was closed")
        await self._drop()

    async def wait_up(self, deadline: float, what: str) -> Client:
        """The connected client, waited for until `deadline`. Raises EngineUnavailable."""
        while not self.connected:
            if self._closed:
                raise EngineUnavailable(f"{what}: the connection to the engine is closed")
            try:
                async with until(deadline):
                    await self._up.wait()
                    if not self.connected:
                        await asyncio.sleep(0.01)  # the connection is ending; its owner sees it soon
            except TimeoutError:
                why = f" ({self.last_error})" if self.last_error else ""
                raise EngineUnavailable(f"{what}: no connection to the engine at {self.url}{why}") from None
        assert self._client is not None
        return self._client

    # --- messages ---------------------------------------------------------------------------

    async def publish(
        self,
        subject: str,
        data: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
        deadline: float,
        what: str,
    ) -> None:
        """Send a message. Raises EngineUnavailable when not connected."""
        client = await self.wait_up(deadline, what)
        await self._send(client, subject, data, reply, headers, what)

    async def request(
        self,
        subject: str,
        data: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        deadline: float,
        what: str,
    ) -> Msg:
        """Send a message and wait for its answer.

        Raises:
            NobodyThere: nobody serves the subject; nothing was done.
            Unanswered: the deadline passed or the connection broke after sending.
            EngineUnavailable: there was no connection to send on.
        """
        client = await self.wait_up(deadline, what)
        self._serial += 1
        token = f"{self._serial:x}"
        future: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._waiting[token] = future
        try:
            async with until(deadline):
                await self._send(client, subject, data, f"{self._inbox}.{token}", headers, what)
                answer = await future
        except TimeoutError:
            raise Unanswered(f"{what}: the engine did not answer in time") from None
        finally:
            self._waiting.pop(token, None)
        if not answer.data and answer.headers and answer.headers.get("Status") == "503":
            raise NobodyThere(f"{what}: nobody serves {subject} at the moment")
        return answer

    async def listen(
        self, subject: str, on_message: OnMessage, *, queue: str = "", confirmed: bool = False
    ) -> Listener:
        """Call `on_message` for every message on a subject, on this and later connections.

        With `confirmed` the server knows of it on return, so that nothing published then is missed.
        """
        listener = await self._listen(Listener(self, subject, queue, on_message))
        if confirmed and self._client is not None and self.connected:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._client.flush(int(CONNECT_S))
        return listener

    def forget(self, listener: Listener) -> None:
        """Do not make this subscription again."""
        self._listeners.discard(listener)

    def new_inbox(self) -> str:
        """A subject that nobody else uses."""
        return f"_INBOX.{secrets.token_hex(12)}"

    async def _listen(self, listener: Listener) -> Listener:
        self._listeners.add(listener)
        if self._client is not None and self.connected:
            # A connection that ends just now is no fault: the next one attaches all listeners.
            with contextlib.suppress(nats.errors.Error, OSError):
                await listener.attach(self._client)
        return listener

    async def _send(
        self,
        client: Client,
        subject: str,
        data: bytes,
        reply: str,
        headers: Mapping[str, str] | None,
        what: str,
    ) -> None:
        try:
            await client.publish(subject, data, reply, dict(headers) if headers else None)
        except nats.errors.MaxPayloadError:
            raise TooLarge(
                f"{what}: {len(data)} bytes exceed the engine's message size",
                hint="Send a reference instead.",
            ) from None
        except (nats.errors.Error, OSError) as error:
            raise EngineUnavailable(f"{what}: {_text(error)}") from error

    async def _on_reply(self, message: Msg) -> None:
        future = self._waiting.pop(message.subject.rpartition(".")[2], None)
        if future is not None and not future.done():
            future.set_result(message)

    # --- keeping the connection -------------------------------------------------------------

    async def _keep(self) -> None:
        """Connect, wait for the end of the connection, and again; runs until cancelled."""
        while True:
            client = await self._connect_any()
            if client is None:
                await asyncio.sleep(RECONNECT_WAIT_S)
                continue
            await self._until_ended(client)
            self._failed_at[self.url] = time.monotonic()
            self._up.clear()
            self._lose("the connection to the engine was lost")
            log.warning("connection to the engine at %s lost: %s", self.url, self.last_error or "closed")
            await self._drop()

    async def _until_ended(self, client: Client) -> None:
        """Wait for the end of a connection.

        The library does not always say so: after a long stop it fails while it closes, and calls nobody.
        """
        looks = 0
        while looks < _LOOKS_ENDED:
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._ended.wait()
                return
            except TimeoutError:
                looks = 0 if client.is_connected else looks + 1

    async def _connect_any(self) -> Client | None:
        """A connection to any of the servers, with all listeners attached; None if none takes one."""
        known = [url for url in self.servers if url not in self.options.urls]
        urls = [*self.options.urls, *random.sample(known, len(known))]
        # One that has just failed comes last: it may hang, and others serve.
        for url in sorted(urls, key=lambda url: self._failed_at.get(url, 0.0)):
            self._failed_at[url] = time.monotonic()
            client = Client()
            try:
                await self._connect(client, url)
            except (nats.errors.Error, OSError, TimeoutError, EngineUnavailable) as error:
                self._note(error)
                await _close(client)
            except asyncio.CancelledError:
                await _close(client)
                raise
            else:
                self._failed_at.pop(url, None)
                return client
        return None

    async def _connect(self, client: Client, url: str) -> None:
        ended = asyncio.Event()

        async def on_closed() -> None:
            ended.set()

        async def on_error(error: Exception) -> None:
            self._note(error)
            if self.generation and client is self._client:
                log.warning("engine connection: %s", self.last_error)

        async with asyncio.timeout(3 * CONNECT_S):
            await client.connect(**self.options.arguments(url), error_cb=on_error, closed_cb=on_closed)
            attached = set(self._listeners)
            for listener in attached:
                await listener.attach(client)
            await client.flush()
        self.last_error = ""
        self.reconnects += self.generation > 0
        self.generation += 1
        self._client, self._ended, self.url = client, ended, url
        self.version = str(client._server_info.get("version", ""))
        self.server_id = str(client._server_info.get("server_id", ""))
        self.servers = tuple(server.geturl() for server in client.servers) or self.servers
        late = self._listeners - attached  # made while we were connecting
        self._up.set()
        with contextlib.suppress(nats.errors.Error, OSError):  # it broke: the next one attaches all
            for listener in late:
                await listener.attach(client)
        log.info("connected to the engine at %s", without_password(url))

    def _note(self, error: BaseException) -> None:
        """Remember why there is no connection; that a login was refused explains the breaks around it."""
        if "Authorization" not in self.last_error or self.connected:
            self.last_error = _text(error)

    def _lose(self, why: str) -> None:
        """Fail all requests under way."""
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(Unanswered(f"{why} before the answer came"))
        for call in tuple(self.on_lost):
            call()

    async def _drop(self) -> None:
        client, self._client = self._client, None
        self._up.clear()
        if client is not None:
            await _close(client)


@asynccontextmanager
async def until(deadline: float) -> AsyncIterator[None]:
    """A timeout at a time of the monotonic clock; raises TimeoutError."""
    async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
        yield


async def _close(client: Client) -> None:
    try:
        async with asyncio.timeout(CONNECT_S):
            await client.close()
    except (nats.errors.Error, OSError, TimeoutError, RuntimeError) as error:  # RuntimeError: by uvloop
        log.debug("closing an engine connection: %s", error)


def _text(error: BaseException) -> str:
    return str(error).removeprefix("nats: ") or type(error).__name__


def without_password(url: str) -> str:
    """The URL without user and password."""
    scheme, at, host = url.rpartition("@")
    return f"{scheme.partition('://')[0]}://{host}" if at else url


def expired(deadline: float) -> bool:
    """Whether no time is left."""
    return time.monotonic() >= deadline
