"""An engine that can lose what it acknowledged is refused."""

from __future__ import annotations

import asyncio
import time

import pytest

from engine.engines import connected
from virgo.engine.audit import server_findings, stream_findings, version_findings
from virgo.engine.naming import log_stream, log_subject
from virgo.engine.nats import connect
from virgo.engine.server import EmbeddedServer
from virgo.errors import UnsafeEngine

SAFE = {
    "storage": "file",
    "num_replicas": 3,
    "discard": "new",
    "allow_atomic": True,
    "max_msgs": -1,
    "max_age": 0,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"storage": "memory"}, "memory"),
        ({"num_replicas": 1}, "replicas"),
        ({"allow_direct": True}, "allow_direct"),
        ({"persist_mode": "async"}, "persist_mode"),
        ({"discard": "old"}, "discard"),
        ({"allow_atomic": False}, "allow_atomic"),
        ({"no_ack": True}, "no_ack"),
        ({"max_age": 5}, "max_age"),
        ({"max_msgs": 5}, "max_msgs"),
    ],
)
def test_each_unsafe_stream_setting_is_found(change: dict[str, object], words: str) -> None:
    """A safe configuration has no findings; each unsafe setting alone is one that names it."""
    assert stream_findings(SAFE, replicas=3, settings={}) == []
    findings = stream_findings(SAFE | change, replicas=3, settings={})
    assert len(findings) == 1
    assert words in findings[0]


def test_old_versions_and_lazy_syncs_are_found() -> None:
    """Versions before 2.15.1, a sync interval and a missing JetStream are findings."""
    good = {"version": "2.15.1", "jetstream": {"config": {"sync_always": True}}}
    assert server_findings(good) == []
    assert server_findings({**good, "version": "2.16.0"}) == []
    assert "2.15.0" in server_findings({**good, "version": "2.15.0"})[0]
    lazy = {"config": {"sync_interval": 120_000_000_000}}
    assert "120 s" in server_findings({**good, "jetstream": lazy})[0]
    assert "not enabled" in server_findings({"version": "2.15.1"})[0]
    assert version_findings("") and version_findings("unknown")


def test_stream_in_memory_is_refused(server: EmbeddedServer) -> None:
    """A log whose stream somebody made in memory is refused at first use, or used and shown if asked for."""

    async def main() -> None:
        async with connected(server) as engine:
            body = {
                "name": log_stream("volatile"),
                "subjects": [log_subject("volatile")],
                "storage": "memory",
                "discard": "new",
                "allow_atomic": True,
                "deny_delete": True,
            }
            await engine._jetstream.api(f"STREAM.CREATE.{body['name']}", body, deadline=time.monotonic() + 5)
            with pytest.raises(UnsafeEngine, match="memory"):
                await engine.logs.append("volatile", [b"x"])
        unsafe = await connect(server.url, user=server.user, password=server.password, unsafe=True)
        await unsafe.logs.append("volatile", [b"x"])
        assert any("memory" in finding for finding in unsafe.status().unsafe)
        await unsafe.close()

    asyncio.run(main())


def test_server_with_the_default_sync_interval_is_refused(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that acknowledges before it syncs is refused by its monitoring port, unless unsafe."""
    render = EmbeddedServer._render
    monkeypatch.setattr(
        EmbeddedServer, "_render", lambda self: render(self).replace("sync_interval: always", "")
    )

    async def main() -> None:
        await own_server.start()
        login = {"user": own_server.user, "password": own_server.password, "monitor": own_server.monitor}
        with pytest.raises(UnsafeEngine, match="sync_interval is 120 s"):
            await connect(own_server.url, **login)
        engine = await connect(own_server.url, **login, unsafe=True)
        assert "sync_interval" in engine.status().unsafe[0]
        await engine.close()

    asyncio.run(main())


def test_what_cannot_be_seen_is_said(server: EmbeddedServer) -> None:
    """Of a server known by its URL alone the sync interval cannot be seen: a note, and no refusal."""

    async def main() -> None:
        engine = await connect(server.url, user=server.user, password=server.password)
        assert engine.status().unsafe == ()
        assert "cannot be seen" in engine.status().notes[0]
        await engine.close()
        async with connected(server) as seen:
            assert seen.status().notes == ()

    asyncio.run(main())


def test_a_monitor_that_is_not_the_servers_is_refused(
    server: EmbeddedServer, own_server: EmbeddedServer
) -> None:
    """A configured monitoring port has to show the very server that answers, not another one, nor none."""

    async def main() -> None:
        await own_server.start()
        login = {"user": server.user, "password": server.password, "trusted": False}
        for monitor, words in (
            (own_server.monitor, "another one"),
            ("http://127.0.0.1:9", "monitoring port"),
        ):
            with pytest.raises(UnsafeEngine, match=words):
                await connect(server.url, monitor=monitor, **login)
            accepted = await connect(server.url, monitor=monitor, unsafe=True, **login)
            assert "engine.monitor" in accepted.status().unsafe[0]
            await accepted.close()
        several = f"http://127.0.0.1:9,{own_server.monitor},{server.monitor}"
        seen = await connect(server.url, monitor=several, **login)
        assert seen.status().unsafe == ()
        await seen.close()

    asyncio.run(main())
