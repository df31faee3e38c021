"""The embedded nats-server: written configuration, start, adoption, watch, stop.

All of it lies in one directory: `engine.conf` (0600, it holds the passwords), `secret.json` (0600),
`ports.json`, `js/` (the data) and `server.log`. The record names the process exactly, by pid and start
time, and the configuration that it runs; a supervisor that was killed and started again adopts the server
that still runs with that configuration, or stops it and starts anew.

The server syncs before it acknowledges, listens on loopback unless told otherwise, and outlives the
process that started it unless that one stops it. It is not restarted here: `wait` returns when it has
ended, and the supervisor calls `start` again, at the same address.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from virgo.engine.binary import Binary, find_binary
from virgo.engine.monitor import fetch_json
from virgo.engine.ports import choose_port, is_free
from virgo.engine.serverconf import Cluster, ServerTls, render
from virgo.errors import EngineUnavailable, NotRunning, PortTaken, VirgoError
from virgo.home import read_record, write_record
from virgo.kernel.ports import is_own, port_taken
from virgo.kernel.process import ProcessMark, terminate
from virgo.limits import ENGINE_DISK_SHARE, ENGINE_START_S, NODE_STOP_S, GiB, MiB

_POLL_S: Final = 0.02
_PORT_ATTEMPTS_MAX: Final = 5
_DISK_BYTES_MIN: Final = 1 * GiB


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How the embedded server runs.

    Attributes:
        name: the server's name, unique in its cluster.
        host: where it listens; beyond loopback it should have `tls`.
        port: 0 chooses a free one and keeps it.
        program: path of a nats-server to run instead of the packaged one.
        unsafe: run a program that is too old or not the pinned one.
        tls: certificates of the client port.
        cluster: the cluster that it is part of.
        password: of the user `virgo`; "" makes one and keeps it. A cluster's servers need the same.
    """

    name: str = "virgo"
    host: str = "127.0.0.1"
    port: int = 0
    program: str = ""
    unsafe: bool = False
    tls: ServerTls | None = None
    cluster: Cluster | None = None
    password: str = field(default="", repr=False)


class EmbeddedServer:
    """One nats-server under one directory.

    Args:
        directory: its files; made on demand.
        record: where the process is recorded; by default `server.json` in the directory.
    """

    user: Final = "virgo"

    def __init__(
        self, directory: Path, options: ServerOptions | None = None, *, record: Path | None = None
    ) -> None:
        self.directory = directory
        self.options = options or ServerOptions()
        self.record = record or directory / "server.json"
        self.binary: Binary | None = None
        self.adopted = False
        self._mark: ProcessMark | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}
        self._secret: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<EmbeddedServer {self.url if self._ports else 'unstarted'} pid {self.pid}>"

    @property
    def pid(self) -> int:
        """The server's process id, 0 if it does not run."""
        return self._mark.pid if self._mark is not None and self._mark.alive() else 0

    @property
    def port(self) -> int:
        """The client port; known from the first `prepare` on."""
        return self._ports["client"]

    @property
    def url(self) -> str:
        """Where clients connect, with `user` and `password`."""
        scheme = "tls" if self.options.tls is not None else "nats"
        host = "127.0.0.1" if self.options.host in ("0.0.0.0", "::") else self.options.host  # noqa: S104
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def monitor(self) -> str:
        """URL of the monitoring port, on loopback."""
        return f"http://127.0.0.1:{self._ports['monitor']}"

    @property
    def password(self) -> str:
        """The password of `user`."""
        return self._secret["password"]

    def describe(self) -> dict[str, Any]:
        """What `status` shows; no secrets."""
        version = self.binary.version if self.binary is not None else ""
        url = self.url if self._ports else ""
        return {"name": self.options.name, "url": url, "pid": self.pid, "version": version}

    # --- life -------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Choose ports and secrets and write the configuration; starts nothing.

        Raises:
            PortTaken, UnsafeEngine, BadConfig, NotRunning: see `start`.
        """
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.binary = find_binary(self.options.program, unsafe=self.options.unsafe)
        self._secret = self._kept_secret()
        self._adopt()
        self._ports = self._kept_ports()
        if self._mark is None:
            self._check_ports()
        _write_private(self._configuration, self._render())

    async def start(self, *, ready: bool = True) -> None:
        """Start the server, or adopt the one that runs here already.

        Args:
            ready: wait until JetStream serves. The first servers of a cluster are ready only when most
                of them run: start them with False, then await `wait_ready` of each.

        Raises:
            PortTaken: another process holds a port that must be this one.
            UnsafeEngine: the program is too old, or not the pinned one.
            NotRunning: it ended at once; the message has its last words.
            EngineUnavailable: it runs but does not serve in time, or its files cannot be written.
        """
        attempts = 0
        while True:
            attempts += 1
            try:
                await self._start(ready=ready)
                return
            except NotRunning as error:
                # Another program was faster to take a port that we had found free: choose again.
                if "address already in use" not in error.message or attempts == _PORT_ATTEMPTS_MAX:
                    raise

    async def _start(self, *, ready: bool) -> None:
        try:
            await asyncio.to_thread(self.prepare)
            if self._mark is not None and self._fingerprint() != self._recorded().get("fingerprint"):
                await self.stop()  # it runs with other settings than now wanted
                await asyncio.to_thread(self._check_ports)
            if self._mark is None:
                self._spawn()
        except VirgoError:
            raise
        except OSError as error:
            raise EngineUnavailable(
                f"the engine under {self.directory} cannot be started: {error.strerror}: {error.filename}",
                hint="Make room on the disk, or mend what the message names.",
            ) from error
        await self.wait_ready(whole=ready)

    async def wait_ready(self, *, whole: bool = True) -> None:
        """Wait until it serves: `whole` with JetStream and all streams, else only connections."""
        deadline = time.monotonic() + ENGINE_START_S
        query = "" if whole else "?js-server-only=true"
        state = "no answer"
        while True:
            self._check_alive()
            with contextlib.suppress(EngineUnavailable, msgspec.DecodeError):
                answer = msgspec.json.decode(await fetch_json(f"{self.monitor}/healthz{query}"))
                state = str(answer.get("error") or answer["status"])
                if answer["status"] == "ok":
                    return
            if time.monotonic() > deadline:
                raise EngineUnavailable(
                    f"the engine at {self.url} does not serve after {ENGINE_START_S:g} s: {state}",
                    hint=f"Its log is {self._log}.",
                )
            await asyncio.sleep(_POLL_S)

    async def wait(self) -> None:
        """Wait until the server's process has ended; at once if it does not run."""
        if self._mark is None or not self._mark.alive():
            self._reap()
            return
        try:
            descriptor = os.pidfd_open(self._mark.pid)
        except ProcessLookupError:
            self._reap()
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        try:
            if self._mark.alive():  # the pidfd is that process's, and no successor's
                loop.add_reader(descriptor, ended.set)
                await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        self._reap()

    async def stop(self) -> None:
        """End the server: SIGTERM, then SIGKILL. What it acknowledged is on disk either way.

        Raises:
            DeadlineExceeded: it hangs in the kernel, and is still ours to end.
        """
        mark = self._mark
        if mark is not None:
            await asyncio.to_thread(terminate, mark, NODE_STOP_S)
        if self._mark is not mark:
            return  # whoever waited for its end has started the next one already
        self._mark = None
        self._reap()
        self.record.unlink(missing_ok=True)

    # --- how --------------------------------------------------------------------------------

    @property
    def _configuration(self) -> Path:
        return self.directory / "engine.conf"

    @property
    def _log(self) -> Path:
        return self.directory / "server.log"

    def _spawn(self) -> None:
        assert self.binary is not None
        with (self.directory / "server.err").open("wb") as errors:
            self._process = subprocess.Popen(  # noqa: S603 - checked by find_binary
                [self.binary.path, "-c", self._configuration],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd=self.directory,
                start_new_session=True,
            )
        self.adopted = False
        self._mark = ProcessMark.of(self._process.pid)
        self.write_record()

    def write_record(self) -> None:
        """Write down which process the server is, if it runs. Raises OSError."""
        if self._mark is None:
            return
        write_record(
            self.record,
            {
                "process": self._mark.to_json(),
                "fingerprint": self._fingerprint(),
                "url": self.url,
                "monitor": self.monitor,
            },
        )

    def _adopt(self) -> None:
        """Take over the process that the record names, or the server's own pid file, if it lives."""
        if self._mark is not None and self._mark.alive():
            return
        self._mark = None
        recorded = self._recorded().get("process")
        if recorded is not None:
            mark = ProcessMark.from_json(recorded)
            self._mark = mark if mark.alive() else None
        else:
            self._mark = self._orphan()
        self.adopted = self._mark is not None

    def _orphan(self) -> ProcessMark | None:
        """A server whose starter died before it could record it: its command line names our file."""
        try:
            pid = int((self.directory / "server.pid").read_text(encoding="ascii"))
            mark = ProcessMark.of(pid)
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError, NotRunning):
            return None
        return mark if os.fsencode(self._configuration) in command else None

    def _recorded(self) -> dict[str, Any]:
        return read_record(self.record) or {}

    def _check_alive(self) -> None:
        if self._mark is not None and self._mark.alive():
            return
        self._reap()
        words = (self.directory / "server.err").read_text(encoding="utf-8", errors="replace").strip()
        if not words and self._log.exists():
            words = _tail(self._log)
        raise NotRunning(
            f"the engine ended at its start: {words.splitlines()[-1][-300:] if words else 'without a word'}",
            hint=f"Its log is {self._log}.",
        )

    def _reap(self) -> None:
        """Collect the exit status of our own child, lest it stay as a zombie."""
        if self._process is not None and (self._mark is None or not self._mark.alive()):
            self._process.wait()
            self._process = None

    def _kept_secret(self) -> dict[str, str]:
        path = self.directory / "secret.json"
        kept = read_record(path) or {}
        secret = {
            "password": self.options.password or kept.get("password") or secrets.token_urlsafe(32),
            "system": kept.get("system") or secrets.token_urlsafe(32),
        }
        if secret != kept:
            write_record(path, secret)
        return secret

    def _kept_ports(self) -> dict[str, int]:
        """The ports of last time; those that are free to choose change only if another has taken them."""
        path = self.directory / "ports.json"
        kept = read_record(path) or {}
        ports: dict[str, int] = {}
        for use, host in (("client", self.options.host), ("monitor", "127.0.0.1")):
            port = self.options.port if use == "client" and self.options.port else kept.get(use, 0)
            if not port or (self._mark is None and port != self.options.port and not is_free(host, port)):
                port = choose_port(host, taken=ports.values())
            ports[use] = port
        if ports != kept:
            write_record(path, ports)
        return ports

    def _check_ports(self) -> None:
        wanted = [(self.options.host, self.port)]
        if self.options.cluster is not None:
            wanted.append((self.options.cluster.host, self.options.cluster.port))
        for host, port in wanted:
            if not is_free(host, port):
                error = port_taken(port, host)
                engine_hint = "Stop that process, or set engine.port to another one."
                raise PortTaken(error.message, hint=engine_hint if is_own(host) else error.hint)

    def _fingerprint(self) -> str:
        """Of program and configuration, to tell whether a running server is the wanted one."""
        assert self.binary is not None
        text = f"{self.binary.path}\n{self.binary.version}\n{self._render()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _render(self) -> str:
        return render(
            directory=self.directory,
            name=self.options.name,
            host=self.options.host,
            port=self.port,
            monitor_port=self._ports["monitor"],
            password=self._secret["password"],
            system_password=self._secret["system"],
            disk_bytes=self._disk_bytes(),
            tls=self.options.tls,
            cluster=self.options.cluster,
        )

    def _disk_bytes(self) -> int:
        """What JetStream may fill: settled at first, so that a restart has the same configuration."""
        path = self.directory / "disk.json"
        kept = read_record(path)
        if kept is not None:
            return int(kept["bytes"])
        free = shutil.disk_usage(self.directory).free
        size = max(_DISK_BYTES_MIN, int(free * ENGINE_DISK_SHARE) // MiB * MiB)
        write_record(path, {"bytes": size})
        return size


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all; not if it is so already.

    An engine must be able to start again on a disk that is full.
    """
    if path.exists() and path.stat().st_mode & 0o077 == 0 and path.read_text(encoding="utf-8") == text:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        return file.read().decode("utf-8", "replace").strip()
