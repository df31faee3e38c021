"""The asyncio client: the same surface as `wire.client`, for one event loop.

A call has its connection alone, so cancelling it closes the connection, and the node cancels what it had
started. Connections are pooled; a request is never sent twice. While the node is silent it is asked whether
it lives (see `life`): one question for all calls that wait.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from typing import Any, TypeVar, cast

import hiredis

from virgo.errors import DeadlineExceeded, NodeLost, NotRunning, VirgoError
from virgo.limits import CONNECT_S, LIFE_ANSWER_S, LIFE_LOOK_S, NODE_LOST_S, POOL_IDLE_MAX, REQUEST_DEADLINE_S
from virgo.wire.address import Address
from virgo.wire.call import Argument, Call
from virgo.wire.life import Answer, Witness, answer_of
from virgo.wire.peer import credentials
from virgo.wire.pool import PING, Pool, as_is, failure, not_connected, pack, pack_plain, result, results

T = TypeVar("T")


class AsyncConnection(asyncio.Protocol):
    """One connection: each `request` gives a future of its reply, in order.

    Attributes:
        used: when it was last given back, in monotonic time.
        peer_pid: the process at the other end of a Unix socket, 0 if it is not known.
        place: the numeric address at the other end, of TCP.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.used = 0.0
        self.peer_pid = 0
        self.place: tuple[Any, ...] = ()
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._transport: asyncio.Transport | None = None
        self._heard = time.monotonic()
        self._unsent = 0

    def __repr__(self) -> str:
        return f"<AsyncConnection {self.address} {'open' if self.open else 'closed'}>"

    @property
    def open(self) -> bool:
        """Whether requests can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport is there."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class has its surface
        if self.address.path:
            self.peer_pid = credentials(transport.get_extra_info("socket").fileno())[0]
        else:
            self.place = tuple(transport.get_extra_info("peername") or ())

    def data_received(self, data: bytes) -> None:
        """Hand replies to those who wait, in order."""
        self._heard = time.monotonic()
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(reply)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell those who wait."""
        self._transport = None
        self._refuse(NodeLost(f"{self.address} closed the connection before it answered"))

    def request(self, packed: bytes) -> asyncio.Future[Any]:
        """Send one packed request; the future gives its decoded reply."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._transport is None or self._transport.is_closing():
            future.set_exception(NodeLost(f"the connection to {self.address} is closed"))
            return future
        if not self._waiting:
            self._heard = time.monotonic()
        self._waiting.append(future)
        self._transport.write(packed)
        return future

    def quiet_since(self) -> float:
        """Since when the node has neither sent nor taken a byte, in monotonic time, as far as was looked."""
        unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
        if unsent != self._unsent:
            self._unsent, self._heard = unsent, time.monotonic()
        return self._heard

    def lose(self, loss: NodeLost) -> None:
        """The node is lost: tell those who wait, and close."""
        self._refuse(loss)
        self.close()

    def close(self) -> None:
        """Close at once; what the node was still doing for this connection is cancelled there."""
        if self._transport is not None:
            self._transport.abort()

    def _refuse(self, loss: NodeLost) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(loss)


async def open_connection(
    address: Address,
    *,
    tls: ssl.SSLContext | None = None,
    token: str = "",
    place: tuple[Any, ...] = (),
) -> AsyncConnection:
    """Connect, to the numeric address `place` if it is known, and log in. Raises NotRunning, WrongToken."""
    loop = asyncio.get_running_loop()
    connection = AsyncConnection(address)
    host, port = place[:2] if place else (address.host, address.port)
    try:
        async with asyncio.timeout(CONNECT_S):
            if address.path:
                await loop.create_unix_connection(lambda: connection, address.path)
            elif address.tls:
                await loop.create_connection(
                    lambda: connection, host, port, ssl=tls, server_hostname=address.host
                )
            else:
                await loop.create_connection(lambda: connection, host, port)
    except OSError as error:
        connection.close()
        raise not_connected(address, error) from error
    if token:
        await _log_in(connection, token)
    return connection


async def _log_in(connection: AsyncConnection, token: str) -> None:
    try:
        async with asyncio.timeout(LIFE_ANSWER_S):
            error = failure(await connection.request(pack_plain(("AUTH", token))))
        if error is not None:
            raise error
    except TimeoutError as late:
        connection.close()
        raise NotRunning(
            f"{connection.address} does not answer the login within {LIFE_ANSWER_S:g} s"
        ) from late
    except BaseException:
        connection.close()
        raise


class AsyncClient(Pool[AsyncConnection]):
    """A pool of connections to one node, running `Call`s (an `AsyncRunner`). Arguments as `Pool`."""

    def __init__(
        self,
        address: Address,
        *,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        timeout_s: float = REQUEST_DEADLINE_S,
    ) -> None:
        super().__init__(address, token=token, tls=tls, timeout_s=timeout_s)
        self._flying: set[AsyncConnection] = set()
        self._ticker: asyncio.TimerHandle | None = None
        self._asking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def take(self) -> AsyncConnection:
        """A connection for the caller alone; give it back with `give`, or close it."""
        self._check_open()
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        return await open_connection(self.address, tls=self._tls, token=self._token)

    def give(self, connection: AsyncConnection) -> None:
        """Give a connection back that has no reply outstanding."""
        if connection.open and len(self._idle) < POOL_IDLE_MAX and not self._closed:
            connection.used = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()

    async def run(self, call: Call[T]) -> T:
        """Send, wait, decode. Raises what the node answered, NotRunning, NodeLost, DeadlineExceeded."""
        return result(call, (await self._exchange([call]))[0])

    async def run_many(self, calls: list[Call[T]]) -> list[T | Exception]:
        """Send all on one connection at once; failures take their place in the list."""
        return results(calls, await self._exchange(calls)) if calls else []

    async def execute(self, *request: Argument, timeout_s: float | None = None) -> Any:
        """Run a command and return its reply as it is (bytes, int, list, None)."""
        return await self.run(Call(request, as_is, timeout_s))

    async def close(self) -> None:
        """Close all idle connections; later calls raise NotRunning."""
        self._closed = True
        self._drop()
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})

    def _drop(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _exchange(self, calls: list[Call[T]]) -> list[Any]:
        timeout_s = self._limit(calls)
        connection = await self.take()
        self._flying.add(connection)
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().call_later(LIFE_LOOK_S, self._look)
        futures: list[asyncio.Future[Any]] = []
        try:
            async with asyncio.timeout(timeout_s):
                futures += [connection.request(pack(call.request, timeout_s)) for call in calls]
                replies = [await future for future in futures]
        except TimeoutError as error:
            connection.close()
            raise DeadlineExceeded(f"{self.address} did not answer within {timeout_s:g} s") from error
        except BaseException:
            connection.close()
            raise
        finally:
            self._flying.discard(connection)
            for future in futures:  # one failure is raised; those of the others are not to be complained of
                if not future.cancel() and not future.cancelled():
                    future.exception()
        self.give(connection)
        return replies

    # --- silence ------------------------------------------------------------------------------

    def _look(self) -> None:
        """While calls are under way: ask the node whether it lives, if any of them is long unheard of."""
        self._ticker = None
        if not self._flying:
            return
        loop = asyncio.get_running_loop()
        self._ticker = loop.call_later(LIFE_LOOK_S, self._look)
        quiet = {connection: connection.quiet_since() for connection in self._flying}
        longest = min(quiet, key=quiet.__getitem__)
        asking = self._asking is not None and not self._asking.done()
        if not asking and self._pulse.due_s(quiet[longest], time.monotonic()) <= 0:
            self._asking = loop.create_task(self._find_out(longest), name=f"ask {self.address}")

    async def _find_out(self, waiting: AsyncConnection) -> None:
        """Ask the node; if it is lost, tell all who have heard nothing since."""
        asked = time.monotonic()
        witness = Witness(self.address, waiting.peer_pid)
        loss = witness.verdict(await self._ask(waiting))
        if loss is None:
            self._pulse.beat(time.monotonic())
            return
        self._pulse.lose(asked, loss)
        for connection in list(self._flying):
            if connection.quiet_since() <= asked:
                connection.lose(self._pulse.loss())
        self._drop()

    async def _ask(self, waiting: AsyncConnection) -> Answer:
        """PING on a second connection. Time counts only while our own event loop turns.

        Were it held up, the answer might lie there unread when the time is over.
        """
        missed = [Answer.NONE]
        ping = asyncio.create_task(self._ping(waiting.place, missed), name=f"ping {self.address}")
        left_s = LIFE_ANSWER_S
        try:
            while left_s > 0 and not ping.done():
                before = time.monotonic()
                await asyncio.wait({ping}, timeout=LIFE_LOOK_S)
                left_s -= min(time.monotonic() - before, 2 * LIFE_LOOK_S)
            if not ping.done():
                return missed[-1]
            ping.result()
            return Answer.GIVEN
        finally:
            ping.cancel()
            await asyncio.wait({ping})

    async def _ping(self, place: tuple[Any, ...], missed: list[Answer]) -> None:
        """Return when the node has answered; what failed meanwhile is noted in `missed`."""
        while True:
            try:
                probe = self._recent() or await open_connection(
                    self.address, tls=self._tls, token=self._token, place=place
                )
                missed.append(Answer.NONE)
                try:
                    await probe.request(PING)
                except BaseException:
                    probe.close()
                    raise
            except VirgoError as error:
                missed.append(answer_of(error))
                if missed[-1] is Answer.GIVEN:
                    return
                await asyncio.sleep(LIFE_LOOK_S)
            else:
                self.give(probe)
                return

    def _recent(self) -> AsyncConnection | None:
        """An idle connection that surely leads to the node: one idle for long may be blocked on the way."""
        if not self._idle or time.monotonic() - self._idle[-1].used > NODE_LOST_S:
            return None
        probe = self._idle.pop()
        return probe if probe.open else None
