"""Fixtures: a three-node cloud shared by the tests, and clouds of a test's own.

Clouds run in a VIRGO_HOME below pytest's directory with a port offset of their own, and are stopped by
the records of what was started.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from virgo.cloud import Cloud, connect
from virgo.errors import NotRunning
from virgo.home import socket_path
from virgo.members import PORTS
from virgo.memory.memcached.place import PORT as MEMCACHED_PORT
from virgo.node import control

# How long an example takes says more of the machine's other work than of ours. What is checked before a
# change lands is the same each time; new examples are looked for at the desk.
settings.register_profile(
    "virgo",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=os.environ.get("CI") == "true",
)
settings.load_profile("virgo")

_offsets = itertools.count(100 + os.getpid() % 40 * 10, 10)


@dataclass(frozen=True)
class RunningCloud:
    """A cloud on this machine, as tests use it."""

    home: Path
    names: list[str]

    @property
    def token(self) -> str:
        """The main token."""
        return (self.home / "token").read_text().strip()

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which `virgo` and `virgo.connect()` find this cloud."""
        return {**os.environ, "VIRGO_HOME": str(self.home)}

    def status(self) -> dict[str, Any]:
        """What `virgo status --json` prints."""
        return control.status(self.home)

    def node(self, name: str) -> dict[str, Any]:
        """One node of the status."""
        return next(node for node in self.status()["nodes"] if node["name"] == name)

    def ports(self, name: str) -> dict[str, int]:
        """A node's ports by module."""
        ports: dict[str, int] = self.node(name)["ports"]
        return ports

    def socket(self, name: str) -> str:
        """A node's Unix socket."""
        return str(socket_path(self.home, name))

    def connect(self, name: str = "n1", **options: Any) -> Cloud:
        """A Python connection through that node."""
        return connect(f"unix:{self.socket(name)}", home=self.home, **options)

    def virgo(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run the command line; fails the test if it fails, unless `check=False`."""
        return subprocess.run(
            [sys.executable, "-m", "virgo.cli", *arguments],
            env=self.environment,
            text=True,
            capture_output=True,
            timeout=90,
            **{"check": True, **options},
        )


def free_offset() -> int:
    """A port offset at which ten nodes find all their ports free."""
    for offset in _offsets:
        wanted = [port + offset + index for port in (*PORTS.values(), MEMCACHED_PORT) for index in range(6)]
        if max(wanted) > 65535:
            break
        if all(_free(port) for port in wanted):
            return offset
    raise AssertionError("no free port offset is left")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def start_cloud(
    home: Path, nodes: int, *, environment: dict[str, str] | None = None, engines: int = 1
) -> RunningCloud:
    """Start a cloud that serves on return."""
    from virgo.node.supervisor import UpOptions

    names = [f"n{index}" for index in range(1, nodes + 1)]
    variables = {"VIRGO_NODE_PORT_OFFSET": str(free_offset()), **(environment or {})}
    control.start_detached(home, UpOptions(nodes=names, engines=engines, environment=variables))
    return RunningCloud(home, names)


def stop_cloud(home: Path) -> None:
    """Stop it if it still runs."""
    try:
        control.stop(home)
    except NotRunning:
        return


@pytest.fixture(scope="session", autouse=True)
def reserved_ports() -> Iterator[None]:
    """Keep the ports of the tests' nodes from being lent to outgoing connections, as the docs advise.

    A connection that was just closed holds its port for a minute; redis-benchmark closes many. Only root
    can ask the kernel for it; others take their chances.
    """
    setting = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
    before = setting.read_text()
    if os.access(setting, os.W_OK):
        wanted = ",".join(f"{PORTS[name]}-{PORTS[name] + 999}" for name in ("files", "queue"))
        setting.write_text(f"{before.strip()},{wanted}".strip(","))
    yield
    if os.access(setting, os.W_OK):
        setting.write_text(before)


@pytest.fixture(scope="session")
def cloud3() -> Iterator[RunningCloud]:
    """Three nodes for all tests of the session; do not kill its nodes."""
    with tempfile.TemporaryDirectory(prefix="virgo-") as directory:
        home = Path(directory)
        try:
            yield start_cloud(home, 3, environment={"VIRGO_MEMORY_MEMCACHED": f"127.0.0.1:{MEMCACHED_PORT}"})
        finally:
            stop_cloud(home)


@contextmanager
def a_cloud(nodes: int = 1, **options: Any) -> Iterator[RunningCloud]:
    """A cloud in a directory of its own, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="virgo-") as directory:
        try:
            yield start_cloud(Path(directory), nodes, **options)
        finally:
            stop_cloud(Path(directory))


@pytest.fixture
def make_cloud() -> Iterator[Callable[..., RunningCloud]]:
    """Start clouds of a test's own: `make_cloud(nodes, environment=..., engines=...)`."""
    homes: list[tempfile.TemporaryDirectory[str]] = []

    def make(nodes: int = 1, **options: Any) -> RunningCloud:
        directory = tempfile.TemporaryDirectory(prefix="virgo-")
        homes.append(directory)
        return start_cloud(Path(directory.name), nodes, **options)

    try:
        yield make
    finally:
        for directory in homes:
            stop_cloud(Path(directory.name))
            directory.cleanup()


__all__ = ["RunningCloud", "a_cloud", "free_offset", "start_cloud", "stop_cloud"]
