"""The second heart: it beats while the event loop is busy, and only then."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from engine.engines import connected, wait_for
from virgo.engine.nats import NatsEngine, connect
from virgo.engine.server import EmbeddedServer
from virgo.limits import MEMBER_BEAT_S, MEMBER_LEASE_S
from virgo.node.heart import Heart

SUBJECT = "test/beat"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A running engine."""
    server = EmbeddedServer(tmp_path / "engine")
    asyncio.run(server.start())
    yield server
    asyncio.run(server.stop())


class Observer:
    """Hears beats in a thread of its own, as another node would."""

    def __init__(self, server: EmbeddedServer) -> None:
        self.heard: list[tuple[float, bytes]] = []
        self._server = server
        self._ready, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._listen()))

    def __enter__(self) -> Observer:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()

    async def _listen(self) -> None:
        async with connected(self._server) as engine:
            await engine.signals.subscribe(SUBJECT, lambda beat: self.heard.append((time.monotonic(), beat)))
            self._ready.set()
            while not self._stop.is_set():
                await asyncio.sleep(0.05)


def connecting(server: EmbeddedServer) -> Callable[[], Awaitable[NatsEngine]]:
    """What a heart calls for its connection."""
    return lambda: connect(server.url, user=server.user, password=server.password, monitor=server.monitor)


def test_a_busy_event_loop_is_beaten_for(server: EmbeddedServer) -> None:
    """While the event loop does not turn for longer than a lease, beats go on without a gap of a lease."""

    async def main(observer: Observer) -> None:
        heart = Heart(connecting(server), SUBJECT)
        heart.turned(b"alive")
        heart.start()
        await wait_for(lambda: heart.beats > 0)  # it is connected
        heart.turned(b"alive")
        began = time.monotonic()
        time.sleep(MEMBER_LEASE_S + 1.5)
        ended = time.monotonic()
        await heart.stop()
        times = [began, *(at for at, _ in observer.heard if began < at < ended), ended]
        assert max(later - at for at, later in itertools.pairwise(times)) < MEMBER_LEASE_S
        assert {beat for _, beat in observer.heard} == {b"alive"}

    with Observer(server) as observer:
        asyncio.run(main(observer))


def test_a_hung_event_loop_is_not_beaten_for(server: EmbeddedServer) -> None:
    """When the event loop has not turned for `busy_s_max` the second heart falls silent too."""

    async def main(observer: Observer) -> None:
        heart = Heart(connecting(server), SUBJECT, busy_s_max=MEMBER_BEAT_S + 1.5)
        heart.turned(b"hung")
        heart.start()
        await asyncio.sleep(MEMBER_BEAT_S + 1.5)
        beats = heart.beats
        await asyncio.sleep(2)
        assert heart.beats == beats
        heart.turned(b"back")
        await wait_for(lambda: any(beat == b"back" for _, beat in observer.heard))
        await heart.stop()

    with Observer(server) as observer:
        asyncio.run(main(observer))


def test_a_turning_event_loop_needs_no_second_heart(server: EmbeddedServer) -> None:
    """As long as the event loop beats in time nothing is sent twice; after `stop` nothing at all."""

    async def main(observer: Observer) -> None:
        heart = Heart(connecting(server), SUBJECT)
        heart.start()
        for _ in range(12):
            heart.turned(b"own")
            await asyncio.sleep(MEMBER_BEAT_S / 4)
        assert heart.beats == 0
        await heart.stop()
        await asyncio.sleep(2 * MEMBER_BEAT_S + 0.5)
        assert heart.beats == 0
        assert not observer.heard

    with Observer(server) as observer:
        asyncio.run(main(observer))
