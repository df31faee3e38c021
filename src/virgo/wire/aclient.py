"""The asyncio client: the same surface as `wire.client`, for one event loop.

A call has its connection alone, so cancelling it closes the connection, and the node cancels what it had
started. Connections are pooled; a request is never sent twice.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections import deque
from typing import Any, TypeVar, cast

import hiredis

from virgo import context as contexts
from virgo.errors import DeadlineExceeded, NodeLost, NotRunning
from virgo.limits import CONNECT_S, POOL_IDLE_MAX, REQUEST_DEADLINE_S
from virgo.wire.address import Address
from virgo.wire.call import Argument, Call
from virgo.wire.client import failure, pack, pack_plain

T = TypeVar("T")


class AsyncConnection(asyncio.Protocol):
    """One connection: each `request` gives a future of its reply, in order."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._transport: asyncio.Transport | None = None

    def __repr__(self) -> str:
        return f"<AsyncConnection {self.address} {'open' if self.open else 'closed'}>"

    @property
    def open(self) -> bool:
        """Whether requests can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport is there."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class has its surface

    def data_received(self, data: bytes) -> None:
        """Hand replies to those who wait, in order."""
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(reply)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell those who wait."""
        self._transport = None
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(NodeLost(f"{self.address} closed the connection before it answered"))

    def request(self, packed: bytes) -> asyncio.Future[Any]:
        """Send one packed request; the future gives its decoded reply."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._transport is None or self._transport.is_closing():
            future.set_exception(NodeLost(f"the connection to {self.address} is closed"))
            return future
        self._waiting.append(future)
        self._transport.write(packed)
        return future

    def close(self) -> None:
        """Close at once; what the node was still doing for this connection is cancelled there."""
        if self._transport is not None:
            self._transport.abort()


async def open_connection(
    address: Address, *, tls: ssl.SSLContext | None = None, token: str = ""
) -> AsyncConnection:
    """Connect and log in. Raises NotRunning, WrongToken."""
    loop = asyncio.get_running_loop()
    connection = AsyncConnection(address)
    try:
        async with asyncio.timeout(CONNECT_S):
            if address.path:
                await loop.create_unix_connection(lambda: connection, address.path)
            else:
                await loop.create_connection(
                    lambda: connection, address.host, address.port, ssl=tls if address.tls else None
                )
            if token:
                reply = await connection.request(pack_plain(("AUTH", token)))
                error = failure(reply)
                if error is not None:
                    connection.close()
                    raise error
    except (OSError, TimeoutError) as error:
        connection.close()
        reason = getattr(error, "strerror", None) or str(error) or "timed out"
        raise NotRunning(f"nothing answers at {address}: {reason}") from error
    return connection


class AsyncClient:
    """A pool of connections to one node, running `Call`s (an `AsyncRunner`)."""

    def __init__(
        self,
        address: Address,
        *,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        timeout_s: float = REQUEST_DEADLINE_S,
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._token = token
        self._tls = tls
        self._idle: list[AsyncConnection] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"<AsyncClient {self.address} {'closed' if self._closed else f'{len(self._idle)} idle'}>"

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    def stats(self) -> dict[str, Any]:
        """Where it leads and how many connections wait."""
        return {"address": str(self.address), "idle": len(self._idle), "closed": self._closed}

    async def take(self) -> AsyncConnection:
        """A connection for the caller alone; give it back with `give`, or close it."""
        if self._closed:
            raise NotRunning("this client is closed", hint="Call virgo.connect() again.")
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        return await open_connection(self.address, tls=self._tls, token=self._token)

    def give(self, connection: AsyncConnection) -> None:
        """Give a connection back that has no reply outstanding."""
        if connection.open and len(self._idle) < POOL_IDLE_MAX and not self._closed:
            self._idle.append(connection)
        else:
            connection.close()

    async def run(self, call: Call[T]) -> T:
        """Send, wait, decode. Raises what the node answered, NotRunning, NodeLost, DeadlineExceeded."""
        reply = (await self._exchange([call]))[0]
        error = failure(reply)
        if error is not None:
            raise error
        return call.decode(reply)

    async def run_many(self, calls: list[Call[T]]) -> list[T | Exception]:
        """Send all on one connection at once; failures take their place in the list."""
        replies = await self._exchange(calls) if calls else []
        return [failure(reply) or call.decode(reply) for call, reply in zip(calls, replies, strict=True)]

    async def execute(self, *request: Argument, timeout_s: float | None = None) -> Any:
        """Run a command and return its reply as it is (bytes, int, list, None)."""
        return await self.run(Call(request, lambda reply: reply, timeout_s))

    async def close(self) -> None:
        """Close all idle connections; later calls raise NotRunning."""
        self._closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _exchange(self, calls: list[Call[T]]) -> list[Any]:
        timeout_s = self._time(calls)
        connection = await self.take()
        try:
            async with asyncio.timeout(timeout_s):
                futures = [connection.request(pack(call.request, timeout_s)) for call in calls]
                replies = [await future for future in futures]
        except TimeoutError as error:
            connection.close()
            raise DeadlineExceeded(f"{self.address} did not answer within {timeout_s:g} s") from error
        except BaseException:
            connection.close()
            raise
        self.give(connection)
        return replies

    def _time(self, calls: list[Call[T]]) -> float | None:
        timeout_s = max(self.timeout_s if call.timeout_s is None else call.timeout_s for call in calls)
        context = contexts.current()
        if context is not None and context.deadline is not None:
            context.check(str(calls[0].request[0]))
            timeout_s = min(timeout_s, context.deadline - time.monotonic())
        return None if math.isinf(timeout_s) else timeout_s
