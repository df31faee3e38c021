"""A redis-server beside which ours is tested, a cloud of one node, an owner of a store."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from conftest import a_cloud
from memory.owners import Owner

if TYPE_CHECKING:
    from conftest import RunningCloud
    from virgo.cloud import Cloud


@pytest.fixture(scope="module")
def one() -> Iterator[RunningCloud]:
    """A cloud of one node, for the tests of a file."""
    with a_cloud() as running:
        yield running


@pytest.fixture
def cloud(one: RunningCloud) -> Iterator[Cloud]:
    """A connection to it that maps its node's store, which is empty."""
    with one.connect() as connected:
        connected.memory.clear()
        assert connected.memory.mapped
        yield connected


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    """The owner of a store, in a process of its own."""
    found = Owner(tmp_path / "memory")
    yield found
    found.end()


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    """A redis-server of our own."""
    path = tmp_path_factory.mktemp("redis") / "s"
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
    )
    client = redis.Redis(unix_socket_path=str(path), retry=None)
    deadline = time.monotonic() + 10
    while True:
        try:
            client.ping()
            break
        except redis.ConnectionError:
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.02)
    yield client
    client.close()
    server.terminate()
    server.wait()
