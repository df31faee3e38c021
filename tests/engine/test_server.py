"""The embedded server: what it writes, that it is found again, watched and stopped, and nothing else."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from engine.engines import connected
from virgo.engine import binary
from virgo.engine.binary import find_binary
from virgo.engine.nats import connect
from virgo.engine.server import EmbeddedServer, ServerOptions
from virgo.engine.serverconf import ServerTls
from virgo.errors import BadConfig, EngineUnavailable, NotRunning, PortTaken, UnsafeEngine
from virgo.kernel.process import ProcessMark
from virgo.wire.authority import TlsFiles, create_authority, issue


def test_secrets_are_only_in_files_of_the_owner(server: EmbeddedServer) -> None:
    """The password is in no argument, environment, log or record, and in no file that others can read."""
    password = server.password.encode()
    assert len(password) >= 32
    process = Path(f"/proc/{server.pid}")
    assert password not in (process / "cmdline").read_bytes()
    assert password not in (process / "environ").read_bytes()
    holding = [
        path for path in server.directory.rglob("*") if path.is_file() and password in path.read_bytes()
    ]
    assert {path.name for path in holding} == {"engine.conf", "secret.json"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in holding)
    assert server.password not in repr(server) + repr(server.options) + str(server.describe())


def test_only_the_user_with_the_password_gets_in(server: EmbeddedServer) -> None:
    """Without, or with another password there is no connection, and the error says why."""

    async def main() -> None:
        for login in ({}, {"user": "virgo", "password": "guess"}, {"token": "guess"}):
            with pytest.raises(EngineUnavailable, match=r"(?i)authorization"):
                await connect(server.url, **login, timeout_s=0.5)

    asyncio.run(main())


def test_tls_lets_in_only_holders_of_a_certificate(tmp_path: Path) -> None:
    """With TLS a client needs a certificate of the same authority, and sees the server's own."""
    create_authority(tmp_path / "ca")
    create_authority(tmp_path / "other")
    files = issue(tmp_path / "ca", "n1", hosts=["127.0.0.1"], node=True).files
    stranger = issue(tmp_path / "other", "n1", hosts=["127.0.0.1"], node=True).files
    tls = ServerTls(files.certificate, files.key, files.authority)
    server = EmbeddedServer(tmp_path / "engine", ServerOptions(tls=tls))

    def context(authority: Path, certificate: TlsFiles | None) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=authority)
        if certificate is not None:
            made.load_cert_chain(certificate.certificate, certificate.key)
        return made

    async def main() -> None:
        await server.start()
        assert server.url.startswith("tls://")
        login = {"user": server.user, "password": server.password, "timeout_s": 0.7}
        good = context(files.authority, files)
        engine = await connect(server.url, **login, tls=good, monitor=server.monitor)
        assert await engine.registers.compare_and_set("r", b"", version=0)
        await engine.close()
        for bad in (
            context(files.authority, None),
            context(files.authority, stranger),
            context(stranger.authority, files),
        ):
            with pytest.raises(EngineUnavailable):
                await connect(server.url, **login, tls=bad)
        await server.stop()

    try:
        asyncio.run(main())
    finally:
        asyncio.run(server.stop())


def test_restarted_supervisor_adopts_the_running_server(tmp_path: Path) -> None:
    """A server outlives the process that started it; the next start takes it over, same pid and address."""
    script = (
        "import asyncio, os, sys; from pathlib import Path; from virgo.engine.server import EmbeddedServer\n"
        "server = EmbeddedServer(Path(sys.argv[1])); asyncio.run(server.start())\n"
        "print(server.pid, server.url, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    pid, url = done.stdout.split()
    adopting = EmbeddedServer(tmp_path)

    async def main() -> None:
        await adopting.start()
        assert (str(adopting.pid), adopting.url, adopting.adopted) == (pid, url, True)
        async with connected(adopting) as engine:
            assert await engine.registers.compare_and_set("r", b"", version=0)
        ended = asyncio.create_task(adopting.wait())
        await asyncio.sleep(0)
        assert not ended.done()
        os.kill(adopting.pid, 9)
        async with asyncio.timeout(5):
            await ended
        assert adopting.pid == 0
        await adopting.start()
        assert not adopting.adopted
        assert adopting.url == url
        async with connected(adopting) as engine:
            assert await engine.registers.get("r") is not None
        await adopting.stop()

    asyncio.run(main())


def test_server_of_an_unrecorded_start_is_found(own_server: EmbeddedServer) -> None:
    """A starter killed before it could record the server does not leave it behind for ever."""

    async def main() -> None:
        await own_server.start()
        pid = own_server.pid
        own_server.record.unlink()
        again = EmbeddedServer(own_server.directory)
        again.prepare()
        assert again.pid == pid

    asyncio.run(main())


def test_record_of_a_dead_process_is_not_believed(own_server: EmbeddedServer) -> None:
    """A record whose pid is another process by now leads to a new server, and nobody is signalled."""

    async def main() -> None:
        with subprocess.Popen(["sleep", "60"]) as stranger:
            own_server.directory.mkdir()
            mark = ProcessMark.of(stranger.pid).to_json()
            own_server.record.write_text(f'{{"process": {{"pid": {stranger.pid}, "started": "x:1"}}}}')
            await own_server.start()
            assert own_server.pid not in (0, stranger.pid)
            await own_server.stop()
            assert ProcessMark.from_json(mark).alive()
            stranger.kill()

    asyncio.run(main())


def test_changed_options_restart_the_server(own_server: EmbeddedServer) -> None:
    """A running server with other settings than wanted is replaced, and its data stay."""

    async def main() -> None:
        await own_server.start()
        pid = own_server.pid
        async with connected(own_server) as engine:
            await engine.registers.compare_and_set("r", b"kept", version=0)
        changed = EmbeddedServer(own_server.directory, ServerOptions(password="chosen"))
        await changed.start()
        assert changed.pid not in (0, pid)
        async with connected(changed) as engine:
            found = await engine.registers.get("r")
            assert found is not None
        await changed.stop()

    asyncio.run(main())


def test_named_port_that_is_taken_is_said(tmp_path: Path) -> None:
    """A port that the user chose and another process holds is PortTaken, and nothing is started."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        server = EmbeddedServer(tmp_path, ServerOptions(port=holder.getsockname()[1]))
        with pytest.raises(PortTaken, match=str(os.getpid())):
            asyncio.run(server.start())
        assert server.pid == 0


def test_server_that_ends_at_its_start_says_why(tmp_path: Path) -> None:
    """The last words of a server that cannot run are in the error."""
    (tmp_path / "js").write_text("a file where the data should go")
    server = EmbeddedServer(tmp_path)
    with pytest.raises(NotRunning, match="storage directory"):
        asyncio.run(server.start())
    assert server.pid == 0


def test_stop_ends_the_server_and_leaves_no_zombie(own_server: EmbeddedServer) -> None:
    """After `stop` the process is gone, its record too, and stopping again is harmless."""

    async def main() -> None:
        await own_server.start()
        pid = own_server.pid
        await own_server.stop()
        assert not Path(f"/proc/{pid}").exists()
        assert not own_server.record.exists()
        await own_server.stop()
        await own_server.wait()

    asyncio.run(main())


def test_packaged_program_is_the_pinned_one() -> None:
    """The installed nats-server has the pinned checksum and a version that is new enough."""
    found = find_binary()
    assert found.packaged
    assert found.findings == ()
    assert found.version == "2.15.1"


def test_wrong_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packaged program with one changed byte is not run, unless that is asked for."""
    changed = tmp_path / "nats-server"
    shutil.copy(find_binary().path, changed)
    with changed.open("ab") as file:
        file.write(b"\0")
    monkeypatch.setattr(binary, "_packaged", lambda: changed)
    with pytest.raises(UnsafeEngine, match="SHA-256"):
        EmbeddedServer(tmp_path / "engine").prepare()
    assert find_binary(unsafe=True).findings


def test_named_program_is_preferred_and_its_version_checked(tmp_path: Path) -> None:
    """The user's own program needs no checksum but a version; a path without a program is BadConfig."""
    own = tmp_path / "my-server"
    shutil.copy(find_binary().path, own)
    found = find_binary(str(own))
    assert (found.path, found.packaged, found.findings) == (own, False, ())
    own.write_text("#!/bin/sh\necho nats-server: v2.9.0\n")
    with pytest.raises(UnsafeEngine, match=r"2\.9\.0"):
        find_binary(str(own))
    with pytest.raises(BadConfig):
        find_binary(str(tmp_path / "nothing"))


def test_supervisor_restarts_a_killed_server(own_server: EmbeddedServer) -> None:
    """`wait` returns when the server dies, and the next `start` has it serve at the same address."""

    async def main() -> None:
        await own_server.start()
        url = own_server.url

        async with asyncio.timeout(30):
            for _ in range(2):
                killed = own_server.pid
                os.kill(killed, 9)
                await own_server.wait()
                await own_server.start()
                assert own_server.pid not in (0, killed)
        assert own_server.url == url

    asyncio.run(main())


def test_a_port_that_is_taken_at_the_last_moment_is_chosen_anew(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another program takes the monitoring port between the choice and the start, another one is taken."""
    spawn, taken = EmbeddedServer._spawn, []

    def late(self: EmbeddedServer) -> None:
        if len(taken) < 2:
            taken.append(socket.create_server(("127.0.0.1", self._ports["monitor"])))
        spawn(self)

    monkeypatch.setattr(EmbeddedServer, "_spawn", late)
    try:
        asyncio.run(own_server.start())
        assert len(taken) == 2
        assert own_server._ports["monitor"] not in [each.getsockname()[1] for each in taken]
    finally:
        for each in taken:
            each.close()
