"""The engine's servers are killed, paused and taken away; what was acknowledged stays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.engines import connected, wait_for
from virgo.engine.naming import log_stream
from virgo.engine.nats import NatsEngine
from virgo.engine.ports import choose_port
from virgo.engine.server import EmbeddedServer, ServerOptions
from virgo.engine.serverconf import Cluster, ServerTls
from virgo.errors import Conflict, EngineUnavailable
from virgo.limits import NODE_LOST_S
from virgo.wire.authority import create_authority, issue


async def kill_and_restart(server: EmbeddedServer) -> None:
    """kill -9, and the start that a supervisor would make."""
    os.kill(server.pid, signal.SIGKILL)
    await server.wait()
    assert server.pid == 0
    await server.start()


class Writer:
    """Appends small and large batches to a log, and remembers what was acknowledged."""

    def __init__(self, engine: NatsEngine, log: str, name: str, size: int) -> None:
        self.engine = engine
        self.log = log
        self.name = name
        self.size = size
        self.acknowledged: dict[int, bytes] = {}
        self.unknown: set[bytes] = set()
        self.stop = False

    async def run(self) -> None:
        number = 0
        while not self.stop:
            number += 1
            entries = [b"%s %d %d" % (self.name.encode(), number, part) for part in range(self.size)]
            try:
                self.acknowledged[await self.engine.logs.append(self.log, entries)] = entries[-1]
            except EngineUnavailable:
                self.unknown.add(entries[-1])


def test_kill_in_the_middle_of_appends_loses_nothing_acknowledged(own_server: EmbeddedServer) -> None:
    """After three kills every acknowledged append is there once and whole, at its sequence."""

    async def main() -> None:
        await own_server.start()
        async with connected(own_server) as engine, connected(own_server) as other:
            writers = [Writer((engine, other)[size % 2], "log", f"w{size}", size) for size in (1, 2, 7, 600)]
            tasks = [asyncio.create_task(writer.run()) for writer in writers]
            for _ in range(3):
                await progress(writers)
                await kill_and_restart(own_server)
            await progress(writers)
            for writer in writers:
                writer.stop = True
            await asyncio.gather(*tasks)
            entries = [entry async for entry in everything(engine, "log")]
            found = {entry.sequence: entry.data for entry in entries}
            assert len(set(found.values())) == len(entries), "nothing is there twice"
            sizes: dict[bytes, int] = {}
            for entry in entries:
                stem = entry.data.rpartition(b" ")[0]
                sizes[stem] = sizes.get(stem, 0) + 1
            for writer in writers:
                assert writer.acknowledged
                for sequence, data in writer.acknowledged.items():
                    assert found.get(sequence) == data
                mine = {stem: size for stem, size in sizes.items() if stem.startswith(writer.name.encode())}
                assert set(mine.values()) == {writer.size}, "each append is whole"
                assert len(mine) <= len(writer.acknowledged) + len(writer.unknown)

    asyncio.run(main())


def test_chain_of_guarded_appends_survives_kills(own_server: EmbeddedServer) -> None:
    """A single writer that appends `after` its last entry never meets a Conflict with itself."""

    async def main() -> None:
        await own_server.start()
        async with connected(own_server) as engine:
            last, written, kills = 0, 0, 0
            killer: asyncio.Task[None] | None = None
            while written < 400:
                if written >= 100 * (kills + 1):
                    if killer is not None:
                        await killer
                    killer = asyncio.create_task(kill_and_restart(own_server))
                    kills += 1
                last = await engine.logs.append("chain", [b"%d" % written, b"+"], after=last)
                written += 1
            if killer is not None:
                await killer
            data = [entry.data async for entry in everything(engine, "chain")]
            assert data[::2] == [b"%d" % number for number in range(400)]
            assert kills == 3

    asyncio.run(main())


def test_registers_survive_kills_without_a_wrong_answer(own_server: EmbeddedServer) -> None:
    """A counter that two clients raise by compare-and-set over kills counts each acknowledged step once."""

    async def main() -> None:
        await own_server.start()
        steps = {"known": 0, "unknown": 0}

        async def count(engine: NatsEngine, until: asyncio.Event) -> None:
            while not until.is_set():
                try:
                    found = await engine.registers.get("counter")
                    value, version = (int(found.value), found.version) if found else (0, 0)
                    await engine.registers.compare_and_set("counter", b"%d" % (value + 1), version=version)
                    steps["known"] += 1
                except Conflict:
                    continue
                except EngineUnavailable:
                    steps["unknown"] += 1

        done = asyncio.Event()
        async with connected(own_server) as engine, connected(own_server) as other:
            tasks = [asyncio.create_task(count(each, done)) for each in (engine, other)]
            for _ in range(3):
                before = steps["known"]
                await wait_for(lambda before=before: steps["known"] > before + 20)
                await kill_and_restart(own_server)
            done.set()
            await asyncio.gather(*tasks)
            found = await engine.registers.get("counter")
            assert found is not None
            assert steps["known"] <= int(found.value) <= steps["known"] + steps["unknown"]

    asyncio.run(main())


def test_follower_and_listener_go_on_over_kills(own_server: EmbeddedServer) -> None:
    """A followed log has no gap and no duplicate over restarts, and signals are heard again."""

    async def main() -> None:
        await own_server.start()
        seen: list[bytes] = []
        heard: list[bytes] = []
        async with connected(own_server) as engine, connected(own_server) as other:

            async def follow() -> None:
                async for entry in other.logs.follow("followed"):
                    seen.append(entry.data)  # noqa: PERF401 - it is watched while it grows

            follower = asyncio.create_task(follow())
            await other.signals.subscribe("bell", heard.append)
            wanted = []
            for round_ in range(3):
                for number in range(50):
                    wanted.append(b"%d.%d" % (round_, number))
                    await engine.logs.append("followed", [wanted[-1]])
                await wait_for(lambda: len(seen) > 10)
                await kill_and_restart(own_server)
                await wait_for(lambda: other.status().connected and engine.status().connected)
                await engine.signals.publish("bell", b"%d" % round_)
            wanted.append(b"end")
            await engine.logs.append("followed", [b"end"])
            await wait_for(lambda: seen[-1:] == [b"end"])
            assert seen == wanted
            await wait_for(lambda: heard == [b"0", b"1", b"2"])
            assert other.status().reconnects == 3
            follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await follower

    asyncio.run(main())


def _stopped(pid: int) -> bool:
    """Whether each thread of a process is: a signal takes its time on a busy machine."""
    states = [
        stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")
    ]
    return set(states) == {"T"}


def test_calls_are_bounded_while_the_server_hangs(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stopped server each call fails in bounded time; when it runs again calls work again."""
    for module in ("logs", "registers", "leases"):
        monkeypatch.setattr(f"virgo.engine.{module}.ENGINE_REQUEST_S", 1.0)

    async def main() -> None:
        await own_server.start()
        async with connected(own_server) as engine:
            version = await engine.registers.compare_and_set("r", b"1", version=0)
            await engine.logs.append("l", [b"1"])
            lease = await engine.leases.acquire("m", "me", ttl_s=30)
            assert lease is not None
            os.kill(own_server.pid, signal.SIGSTOP)
            try:
                await wait_for(lambda: _stopped(own_server.pid))
                begun = time.monotonic()
                calls = [
                    engine.registers.get("r"),
                    engine.registers.compare_and_set("r", b"2", version=version),
                    engine.logs.append("l", [b"2"]),
                    engine.logs.append("l", [b"2"], after=1024),
                    engine.logs.read("l"),
                    engine.leases.renew(lease),
                    engine.leases.acquire("n", "me", ttl_s=30),
                    engine.leases.holder("m"),
                    engine.signals.request("nobody", b"", timeout_s=1),
                ]
                results = await asyncio.gather(*calls, return_exceptions=True)
                assert time.monotonic() - begun < 3
                assert all(isinstance(result, EngineUnavailable | TimeoutError) for result in results), (
                    results
                )
            finally:
                os.kill(own_server.pid, signal.SIGCONT)
            await wait_for(lambda: engine.status().connected)
            found = await engine.registers.get("r")
            assert found is not None
            assert found.value in (b"1", b"2")
            assert (await engine.leases.renew(lease)).token == lease.token

    asyncio.run(main())


def test_calls_work_again_when_the_server_is_back(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a server calls fail in bounded time and say so; after a restart the same engine works."""
    monkeypatch.setattr("virgo.engine.registers.ENGINE_REQUEST_S", 0.5)

    async def main() -> None:
        await own_server.start()
        address = own_server.url
        async with connected(own_server) as engine:
            version = await engine.registers.compare_and_set("r", b"1", version=0)
            await own_server.stop()
            begun = time.monotonic()
            with pytest.raises(EngineUnavailable):
                await engine.registers.compare_and_set("r", b"2", version=version)
            assert time.monotonic() - begun < 2
            with pytest.raises(EngineUnavailable):
                await engine.signals.publish("s", b"")
            assert not engine.status().connected
            await own_server.start()
            assert own_server.url == address, "a restart keeps the address"
            await wait_for(lambda: engine.status().connected)
            assert await engine.registers.compare_and_set("r", b"2", version=version) > version

    asyncio.run(main())


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[EmbeddedServer]]:
    """Three servers of a cluster with TLS between them; not started yet, stopped at the end."""
    create_authority(tmp_path / "ca")
    files = issue(tmp_path / "ca", "n1", hosts=["127.0.0.1"], node=True).files
    tls = ServerTls(files.certificate, files.key, files.authority)
    routes: list[int] = []
    for _ in range(3):
        routes.append(choose_port(taken=routes))
    servers = [
        EmbeddedServer(
            tmp_path / str(number),
            ServerOptions(
                name=f"s{number}",
                password="the same on all",
                cluster=Cluster("c", port, [f"127.0.0.1:{other}" for other in routes], secret="s", tls=tls),
            ),
        )
        for number, port in enumerate(routes)
    ]
    yield servers

    async def stop() -> None:
        await asyncio.gather(*(server.stop() for server in servers))

    asyncio.run(stop())


async def start_all(servers: list[EmbeddedServer]) -> None:
    """Start the servers of a cluster."""
    await asyncio.gather(*(server.start(ready=False) for server in servers))
    await asyncio.gather(*(server.wait_ready() for server in servers))


def test_cluster_of_three_loses_its_leader_and_goes_on(cluster: list[EmbeddedServer]) -> None:
    """Three servers with TLS, the leader of a log killed: writes go on, nothing acknowledged is lost."""
    servers = cluster

    async def main() -> None:
        await start_all(servers)
        async with connected(*servers, replicas=3) as engine, connected(*servers, replicas=3) as other:
            writer = Writer(engine, "log", "w", 3)
            version = await other.registers.compare_and_set("r", b"0", version=0)
            versions = [version]
            task = asyncio.create_task(writer.run())
            await progress([writer])
            leader = await leader_of(engine, servers, log_stream("log"))
            os.kill(leader.pid, signal.SIGKILL)
            await leader.wait()
            for _ in range(5):
                versions.append(await raise_register(other, versions[-1]))
            await progress([writer])
            await leader.start(ready=False)
            writer.stop = True
            await task
            entries = {entry.sequence: entry.data async for entry in everything(other, "log")}
            assert len(set(entries.values())) == len(entries)
            assert all(entries.get(sequence) == data for sequence, data in writer.acknowledged.items())
            found = await engine.registers.get("r")
            assert found is not None
            assert found.version >= versions[-1]
            assert versions == sorted(set(versions))
            assert engine.status().replicas == 3
            lease = await engine.leases.acquire("lease", "one", ttl_s=30)
            assert lease is not None
            assert await other.leases.acquire("lease", "two", ttl_s=30) is None

    asyncio.run(main())


def test_a_server_that_hangs_is_left_for_one_that_serves(cluster: list[EmbeddedServer]) -> None:
    """Connected to a server of a cluster that is stopped, a client is back with another within seconds."""

    async def main() -> None:
        await start_all(cluster)
        async with connected(*cluster, replicas=3) as engine:
            version = await engine.registers.compare_and_set("r", b"0", version=0)
            beats: list[bytes] = []
            await engine.signals.subscribe("beat", beats.append)
            hung = next(server for server in cluster if server.url == engine.status().url)
            os.kill(hung.pid, signal.SIGSTOP)
            try:
                began = time.monotonic()
                await wait_for(lambda: engine.status().url != hung.url and engine.status().connected)
                assert time.monotonic() - began < NODE_LOST_S
                await engine.signals.publish("beat", b"1")
                await wait_for(lambda: beats == [b"1"])
                await raise_register(engine, version)  # which may take an election
            finally:
                os.kill(hung.pid, signal.SIGCONT)

    asyncio.run(main())


async def leader_of(engine: NatsEngine, servers: list[EmbeddedServer], stream: str) -> EmbeddedServer:
    """The server that leads a stream."""
    info = await engine._jetstream.api(f"STREAM.INFO.{stream}", deadline=time.monotonic() + 10)
    assert info["config"]["num_replicas"] == 3
    return next(server for server in servers if server.options.name == info["cluster"]["leader"])


async def raise_register(engine: NatsEngine, version: int) -> int:
    """Set the register, trying again while an outcome is unknown."""
    while True:
        try:
            return await engine.registers.compare_and_set("r", b"%d" % version, version=version)
        except EngineUnavailable:
            found = await engine.registers.get("r")
            assert found is not None
            if found.version != version:
                return found.version


async def everything(engine: NatsEngine, log: str):
    """All entries of a log."""
    start = 1
    while page := await engine.logs.read(log, start=start):
        for entry in page:
            yield entry
        start = page[-1].sequence + 1


async def progress(writers: list[Writer]) -> None:
    """Wait until each has a few more acknowledgements."""
    before = [len(writer.acknowledged) for writer in writers]
    await wait_for(
        lambda: all(
            len(writer.acknowledged) >= count + 5 for writer, count in zip(writers, before, strict=True)
        ),
        timeout_s=30,
    )


def test_a_connection_whose_end_nobody_tells_is_made_anew(server: EmbeddedServer) -> None:
    """The library may fail while it closes a stale connection, and call nobody: that is seen all the same."""

    async def main() -> None:
        async with connected(server) as engine:
            link = engine._link
            before, client = link.generation, link._client
            assert client is not None

            async def fails(*_arguments: object, **_options: object) -> None:
                raise RuntimeError("unable to perform operation; the handler is closed")

            whole, client.close = client.close, fails  # type: ignore[method-assign]
            client._status = client.CLOSED
            deadline = time.monotonic() + 10
            while link.generation == before:
                assert time.monotonic() < deadline, "nobody noticed"
                await asyncio.sleep(0.05)
            assert await engine.registers.get("quiet") is None
            client._status = client.CONNECTED
            await whole()

    asyncio.run(main())
