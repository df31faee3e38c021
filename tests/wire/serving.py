"""A real listener in a thread, with a few commands that show how sessions behave."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

from virgo.context import NOBODY, Identity, current
from virgo.errors import BadArgument, WrongToken
from virgo.wire import common
from virgo.wire.address import Address
from virgo.wire.commands import Command, CommandTable
from virgo.wire.resp import OK
from virgo.wire.server import Listener, Service

TOKEN = "open sesame"


class Gate:
    """Admits one token; every local process is `who`."""

    def __init__(self, who: Identity) -> None:
        self.who = who

    def unix(self, uid: int, gid: int, pid: int) -> Identity:
        return self.who

    def token(self, user: str, token: str) -> Identity:
        if token != TOKEN:
            raise WrongToken("no such token")
        return Identity("token:main", frozenset({"admin"}))

    def certificate(self, common_name: str, organizational_units: list[str]) -> Identity:
        return NOBODY


class Batch:
    """Counts its closes; fails when told to."""

    def __init__(self, served: Served) -> None:
        self.served = served

    def close(self) -> None:
        self.served.batches += 1
        if self.served.fail_batches:
            raise BadArgument("the batch failed")


class Served:
    """The running listener and what its commands have done."""

    def __init__(self, address: Address, who: Identity) -> None:
        self.address = address
        self.who = who
        self.batches = 0
        self.fail_batches = False
        self.cancelled = threading.Event()
        self.started = threading.Event()
        self.service: Service
        self.loop: asyncio.AbstractEventLoop

    def commands(self) -> list[Command]:
        async def slow(_session: Any, request: list[bytes]) -> bytes:
            self.started.set()
            try:
                await asyncio.sleep(float(request[1]))
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            return request[1]

        def sometimes(_session: Any, request: list[bytes]) -> Any:
            return slow(_session, request) if float(request[1]) else b"at once"

        def write(session: Any, request: list[bytes]) -> Any:
            session.batch(b"w", lambda: Batch(self))
            return OK

        def fail(_session: Any, _request: list[bytes]) -> None:
            raise ZeroDivisionError("a defect")

        async def context(_session: Any, _request: list[bytes]) -> list[Any]:
            here = current()
            assert here is not None
            return [here.id, here.cause, here.identity.name]

        def big(_session: Any, request: list[bytes]) -> bytes:
            return b"x" * int(request[1])

        return [
            Command("SLOW", slow, "read", 1, 1),
            Command("CALL", slow, "read", 1, 1, concurrent=True),
            Command("SOMETIMES", sometimes, "read", 1, 1),
            Command("WRITE", write, "write", 0, 0, writes=True),
            Command("FAIL", fail, "read"),
            Command("CONTEXT", context, "read"),
            Command("BIG", big, "read", 1, 1),
            Command("VIRGO_TEST", lambda _s, r: r[1:], "read", 0, None),
        ]

    async def serve(self, ready: threading.Event) -> None:
        self.loop = asyncio.get_running_loop()
        self.over = asyncio.Event()
        table = CommandTable([*common.commands(lambda: {"Server": {"a": 1}}), *self.commands()])
        self.service = Service(table, Gate(self.who))
        async with Listener(self.service, self.address) as listener:
            if not self.address.path:
                assert listener._server is not None
                port = listener._server.sockets[0].getsockname()[1]
                self.address = Address(host=self.address.host, port=port)
            ready.set()
            await self.over.wait()


@contextlib.contextmanager
def serving(where: Path | None, who: Identity = NOBODY) -> Iterator[Served]:
    """Serve on a Unix socket below `where`, or on a free loopback port."""
    address = Address(path=str(where / "s.sock")) if where else Address(host="127.0.0.1", port=0)
    served = Served(address, who)
    ready = threading.Event()
    thread = threading.Thread(target=lambda: uvloop.run(served.serve(ready)))
    thread.start()
    assert ready.wait(10)
    try:
        yield served
    finally:
        served.loop.call_soon_threadsafe(served.over.set)
        thread.join(10)
        assert not thread.is_alive()
