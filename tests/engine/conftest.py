"""One embedded server for most engine tests, and clusters of a test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from engine.engines import connected
from virgo.engine.nats import NatsEngine
from virgo.engine.server import EmbeddedServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A running embedded server that all tests share."""
    shared = EmbeddedServer(tmp_path_factory.mktemp("engine"))
    asyncio.run(shared.start())
    yield shared
    asyncio.run(shared.stop())


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server that the test may kill; not started yet."""
    own = EmbeddedServer(tmp_path / "engine")
    yield own
    asyncio.run(own.stop())


@pytest.fixture
def with_engines(server: EmbeddedServer) -> Callable[[Callable[..., Awaitable[None]]], None]:
    """Run a coroutine function with two connections to the shared server."""

    def run(work: Callable[[NatsEngine, NatsEngine], Awaitable[None]]) -> None:
        async def main() -> None:
            async with connected(server) as one, connected(server) as two:
                await work(one, two)

        asyncio.run(main())

    return run
