"""Connections to engine servers, and waiting for what must come about."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from virgo.engine.nats import NatsEngine, connect
from virgo.engine.server import EmbeddedServer


@asynccontextmanager
async def connected(*servers: EmbeddedServer, replicas: int = 1) -> AsyncIterator[NatsEngine]:
    """A connection to servers."""
    engine = await connect(
        ",".join(server.url for server in servers),
        user=servers[0].user,
        password=servers[0].password,
        replicas=replicas,
        monitor=",".join(server.monitor for server in servers),
    )
    try:
        yield engine
    finally:
        await engine.close()


async def wait_for(condition: Callable[[], bool], timeout_s: float = 15) -> None:
    """Wait until the condition holds; fail if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what was awaited did not come about"
        await asyncio.sleep(0.01)


class CuttingProxy:
    """Stands between client and server; when armed it loses the next acknowledgement and cuts the line.

    The write behind a lost acknowledgement has taken place, which the client cannot know.
    """

    def __init__(self, server: EmbeddedServer) -> None:
        self.server = server
        self.armed = False
        self.cuts = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[NatsEngine]:
        """A connection through the proxy."""
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        engine = await connect(
            f"nats://127.0.0.1:{port}", user=self.server.user, password=self.server.password
        )
        try:
            yield engine
        finally:
            await engine.close()
            listener.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        pumps = [
            asyncio.create_task(self._pump(reader, up_writer)),
            asyncio.create_task(self._pump(up_reader, writer, cutting=True)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            writer.close()
            up_writer.close()

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, cutting: bool = False
    ) -> None:
        while chunk := await source.read(65536):
            # An acknowledgement looks like {"stream":"VIRGO_REGISTERS", "seq":7}.
            if cutting and self.armed and b'"stream":"VIRGO_' in chunk and b'"seq":' in chunk:
                self.armed = False
                self.cuts += 1
                return
            target.write(chunk)
            await target.drain()
