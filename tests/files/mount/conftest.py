"""Mounts for the tests: of a cloud of two nodes, whose second is treated as one of another machine.

They take /dev/fuse and the right to mount. Where that is not given the tests say so and are skipped: what a
mount is made of (the protocol, the table, acts on another node) is tested without one too.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.conftest import RunningCloud, a_cloud

from virgo import config as configuration
from virgo.errors import NotRunning
from virgo.files.mount import control
from virgo.files.mount.process import Options, Record


def refused() -> str:
    """Why nothing can be mounted here; empty if it can."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "there is no /dev/fuse that this user may open"
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/tmp"]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=30)
    return "" if done.returncode == 0 else f"this user may not mount: {done.stderr.strip()}"


@pytest.fixture(scope="session")
def can_mount() -> None:
    """Skips where nothing can be mounted, and says why."""
    reason = refused()
    if reason:
        pytest.skip(f"mounts are not tested here: {reason}")


@dataclass(frozen=True)
class Mounted:
    """A mount, as tests use it."""

    cloud: RunningCloud
    place: Path

    @property
    def record(self) -> Record:
        """What is known of it outside."""
        found = control.find(self.cloud.home, self.place)
        assert found is not None
        return found

    def workers(self) -> list[int]:
        """The processes that answer the kernel."""
        keeper = self.record.process["pid"]
        return [int(pid) for pid in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()]

    def upcalls(self, *operations: str) -> int:
        """How often the kernel has asked for these operations."""
        counted = control.stats(self.record)["upcalls"]
        return sum(counted.get(operation, 0) for operation in operations)

    def beneath(self, node: str) -> Path:
        """Where a node's own files really are."""
        return self.cloud.home / "nodes" / node / "files"


@contextmanager
def mounted(
    cloud: RunningCloud, *, afar: tuple[str, ...] = ("n2",), passes: bool = True
) -> Iterator[Mounted]:
    """Mount a cloud for the block."""
    with tempfile.TemporaryDirectory(prefix="virgo-mount-") as directory:
        Path(directory).chmod(0o755)
        place = Path(directory) / "cloud"
        config = configuration.load({**os.environ, "VIRGO_HOME": str(cloud.home)})
        with cloud.connect("n1") as connected:
            roots, peers = control.survey(connected.client, config, afar=afar)
        control.start(cloud.home, Options(str(place), roots, peers, passes=passes))
        try:
            yield Mounted(cloud, place)
        finally:
            try:
                control.stop(cloud.home, place, force=True)
            except NotRunning:  # the test itself has unmounted
                assert not place.is_mount()


@pytest.fixture(scope="session")
def cloud2(can_mount: None) -> Iterator[RunningCloud]:
    """Two nodes, each with exports: one that is read-only, one on a small disk. Do not kill them."""
    with tempfile.TemporaryDirectory(prefix="virgo-exports-") as directory:
        exports = {name: str(Path(directory) / name) for name in ("data", "fixed", "small")}
        for path in exports.values():
            Path(path).mkdir()
        (Path(directory) / "fixed" / "file").write_text("fixed")
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", exports["small"]], check=True)
        environment = {
            "VIRGO_FILES_EXPORTS": json.dumps(exports),
            "VIRGO_FILES_READ_ONLY": '["fixed"]',
        }
        try:
            with a_cloud(2, environment=environment) as cloud:
                yield cloud
        finally:
            subprocess.run(["umount", "--lazy", exports["small"]], check=True)


@pytest.fixture(scope="session")
def mount(cloud2: RunningCloud) -> Iterator[Mounted]:
    """The cloud, files of n1 passed through, n2 afar."""
    with mounted(cloud2) as found:
        yield found


@pytest.fixture(scope="session")
def served(cloud2: RunningCloud) -> Iterator[Mounted]:
    """The same with all data by way of the server."""
    with mounted(cloud2, passes=False) as found:
        yield found


@pytest.fixture
def new_name() -> Callable[[], str]:
    """Names that no other test has."""
    return lambda: f"test-{os.urandom(6).hex()}"


@pytest.fixture(params=["local", "served", "remote"])
def tree(request: pytest.FixtureRequest, new_name: Callable[[], str]) -> Path:
    """An empty directory below a mount: of this machine, of this machine by way of the server, and afar."""
    which = request.getfixturevalue("served" if request.param == "served" else "mount")
    directory = which.place / ("n2" if request.param == "remote" else "n1") / new_name()
    directory.mkdir()
    return directory
