"""Servers for one measurement: redis-server, memcached, and a cloud of ours. Loopback, ports of their own.

Each is stopped by its process or its record, never by name, and keeps its files in a temporary directory.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Need

if TYPE_CHECKING:
    from virgo.kernel.process import ProcessMark
    from virgo.node.supervisor import UpOptions

REDIS = Need("program", "redis-server", "Debian package redis-server")
REDIS_BENCHMARK = Need("program", "redis-benchmark", "Debian package redis-tools")
MEMCACHED = Need("program", "memcached", "Debian package memcached")
WORKERS = 2  # of every contender that runs calls
_START_S = 10.0
_STOP_S = 10.0


def module(name: str) -> Need:
    """A peer from PyPI."""
    return Need("module", name, f"`sh benchmarks/run.sh` installs it (benchmarks/requirements.txt: {name})")


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A server process that may be ended, and started anew with the same command.

    Args:
        command: what runs in the foreground.
        port: where it listens.
    """

    def __init__(self, command: Sequence[str], port: int) -> None:
        self.command = command
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Server {self.command[0]} at {self.port}, pid {self.pid}>"

    def __enter__(self) -> Server:
        self.start()
        self.await_port()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """Of the running process, 0 if there is none."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start it, without waiting for anything."""
        self._process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def await_port(self) -> None:
        """Wait until it listens."""
        assert self._process is not None
        deadline = time.monotonic() + _START_S
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"{self.command!r} ended at its start with status {self._process.returncode}"
                )
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.command!r} does not listen after {_START_S:g} s")
            time.sleep(0.02)

    def end(self, number: signal.Signals = signal.SIGTERM, *, time_s: float = _STOP_S) -> None:
        """Send a signal, and wait for the end; SIGKILL if it does not come."""
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(time_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise RuntimeError(f"{self.command!r} did not end within {time_s:g} s") from None
        finally:
            self._process = None


def redis(directory: str, *options: str) -> Server:
    """A redis-server that keeps its files in `directory`; by default without persistence."""
    port = free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", directory]
    command += ["--save", "", "--appendonly", "no", "--daemonize", "no"]
    return Server([*command, *options], port)


def memcached_of(megabytes: int, *options: str) -> Server:
    """A memcached with so much room."""
    port = free_port()
    command = ["memcached", "-l", "127.0.0.1", "-p", str(port), "-U", "0", "-m", str(megabytes)]
    if os.geteuid() == 0:
        command += ["-u", "root"]  # it does not run as root unless told so
    return Server([*command, *options], port)


@contextlib.contextmanager
def redis_server() -> Iterator[int]:
    """A fresh redis-server without persistence; gives its port."""
    with tempfile.TemporaryDirectory(prefix="redis-") as directory, redis(directory) as server:
        yield server.port


@contextlib.contextmanager
def memcached(megabytes: int = 256, *options: str) -> Iterator[int]:
    """A fresh memcached; gives its port."""
    with memcached_of(megabytes, *options) as server:
        yield server.port


@dataclass(frozen=True, slots=True)
class Virgo:
    """A cloud of one node, `n1`.

    Attributes:
        home: its VIRGO_HOME.
        memory_port: TCP port of its memory module.
        options: how it is started.
    """

    home: Path
    memory_port: int
    options: UpOptions

    @property
    def token(self) -> str:
        """For TCP."""
        return (self.home / "token").read_text().strip()

    def start(self) -> None:
        """As `virgo up --detach`: returns when it serves."""
        from virgo.node import control

        control.start_detached(self.home, self.options)

    def stop(self) -> None:
        """As `virgo down`; nothing if it is not up."""
        from virgo.errors import NotRunning
        from virgo.node import control

        with contextlib.suppress(NotRunning):
            control.stop(self.home)

    def supervisor(self) -> ProcessMark:
        """The process that all others descend from."""
        return self._mark("up")

    def node(self) -> ProcessMark:
        """The node's process."""
        return self._mark("n1")

    def _mark(self, name: str) -> ProcessMark:
        from virgo.home import read_record, record_path
        from virgo.kernel.process import ProcessMark

        record = read_record(record_path(self.home, name))
        if record is None:
            raise RuntimeError(f"{name} does not run under {self.home}")
        return ProcessMark.from_json(record["process"])


@contextlib.contextmanager
def virgo_cloud() -> Iterator[Virgo]:
    """A cloud of one node in a VIRGO_HOME of its own, as `virgo up --nodes 1 --detach` starts it.

    It is told that this process owns it, so it ends even if this process is killed.
    """
    from virgo.kernel.process import ProcessMark
    from virgo.members import PORTS
    from virgo.node.supervisor import UpOptions

    with tempfile.TemporaryDirectory(prefix="home-") as directory:
        offset = _free_offset()
        options = UpOptions(
            nodes=["n1"],
            owner=ProcessMark.of(os.getpid()).to_json(),
            environment={
                "VIRGO_NODE_PORT_OFFSET": str(offset),
                "VIRGO_NODE_BIND": "127.0.0.1",
                "VIRGO_CPU_WORKERS": str(WORKERS),
            },
        )
        cloud = Virgo(Path(directory), PORTS["memory"] + offset, options)
        try:
            cloud.start()
            yield cloud
        finally:
            cloud.stop()


def _free_offset() -> int:
    """A port offset at which a node finds its six ports free."""
    from virgo.members import PORTS

    for offset in random.sample(range(600, 1500), 100):
        if all(_free(port + offset) for port in PORTS.values()):
            return offset
    raise RuntimeError("no port offset with six free ports was found")


def _free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False
