"""A mount from its start to its end: what it survives, and how it is taken away."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import RunningCloud, a_cloud
from tests.files.mount.conftest import Mounted, mounted
from tests.files.mount.test_mount_posix import refused
from tests.waiting import until

from virgo import config as configuration
from virgo.errors import BadConfig, FileRefused, NotRunning, VirgoError
from virgo.files.mount import control
from virgo.kernel.process import ProcessMark
from virgo.limits import MOUNT_VALID_S, MOUNT_WORKER_LIFE_S

BOUND_S = 5.0  # within which whoever asks a lost node is told


@pytest.fixture(scope="module")
def two_nodes(can_mount: None) -> Iterator[RunningCloud]:
    """A cloud of two nodes."""
    with a_cloud(2) as cloud:
        yield cloud


@pytest.fixture
def shaken(two_nodes: RunningCloud) -> RunningCloud:
    """The nodes may be stopped and killed; here they serve again, whatever was done to them before."""
    until(lambda: all(_serves(two_nodes, name) for name in two_nodes.names))
    return two_nodes


def _serves(running: RunningCloud, name: str) -> bool:
    try:
        with running.connect(name) as cloud:
            return len(cloud.files.ls("/")) == 3
    except VirgoError:
        return False


@pytest.fixture
def shaky(shaken: RunningCloud) -> Iterator[Mounted]:
    """A mount of it."""
    with mounted(shaken) as found:
        yield found


def virgo(cloud: RunningCloud, *words: str) -> subprocess.CompletedProcess[str]:
    return cloud.virgo(*words, check=False)


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["stopped", "killed"])
def test_a_lost_node_is_an_error_in_bounded_time_and_comes_back(shaky: Mounted, fault: str) -> None:
    """EHOSTDOWN, for what is open too; the files of other nodes go on; afterwards all is as before."""
    file = shaky.place / "n2" / "file"
    file.write_text("content")
    (shaky.place / "n1" / "file").write_text("of n1")
    with file.open("rb", buffering=0) as held:
        pid = shaky.cloud.node("n2")["pid"]
        os.kill(pid, signal.SIGSTOP if fault == "stopped" else signal.SIGKILL)
        try:
            for attempt in (
                file.read_bytes,
                held.read,
                (shaky.place / "n2").stat,
                (file.parent / "new").touch,
            ):
                begun = time.monotonic()
                if fault == "killed":
                    try:
                        attempt()
                    except OSError as error:
                        assert error.errno == errno.EHOSTDOWN
                else:
                    time.sleep(MOUNT_VALID_S + 0.1)  # what the kernel was told is true no more
                    begun = time.monotonic()
                    with refused(errno.EHOSTDOWN):
                        attempt()
                assert time.monotonic() - begun < BOUND_S
                assert (shaky.place / "n1" / "file").read_text() == "of n1"
        finally:
            if fault == "stopped":
                os.kill(pid, signal.SIGCONT)

        until(lambda: _reads(file, "content"))
        held.seek(0)
        assert held.read() == b"content"


def test_a_killed_worker_is_replaced(shaky: Mounted) -> None:
    """What it had begun fails; open files and everything else go on."""
    file = shaky.place / "n1" / "file"
    file.write_bytes(b"content")
    with file.open("r+b", buffering=0) as held:
        time.sleep(MOUNT_WORKER_LIFE_S + 0.1)  # a worker that ends sooner is not started again
        first = shaky.workers()
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(set(shaky.workers()) - set(first)) == len(first), within_s=10)
        assert held.read() == b"content"
        os.fsync(held.fileno())
        assert file.stat().st_size == 7
        (file.parent / "new").write_text("goes on")
        young = shaky.workers()[0]
        os.kill(young, signal.SIGKILL)  # it has only just begun: another one begins a moment later
        until(lambda: young not in (now := shaky.workers()) and len(now) == len(first))
        assert (file.parent / "new").read_text() == "goes on"
    assert control.stats(shaky.record)["restarts"] == len(first) + 1


def test_whoever_looks_after_it_may_be_killed(shaky: Mounted) -> None:
    """The workers go on; it can be unmounted, and mounted again."""
    keeper = int(str(shaky.record.process["pid"]))
    os.kill(keeper, signal.SIGKILL)
    (shaky.place / "n1" / "file").write_text("goes on")
    control.stop(shaky.cloud.home, shaky.place)
    assert not shaky.place.is_mount()
    mark = control.start(shaky.cloud.home, control.Options(str(shaky.place), _roots_of(shaky.cloud)))
    assert mark.place == str(shaky.place)
    assert (shaky.place / "n1" / "file").read_text() == "goes on"


def _roots_of(running: RunningCloud) -> list[control.Root]:
    with running.connect() as cloud:
        return control.survey(cloud.client, configuration.load({"VIRGO_HOME": str(running.home)}))[0]


def test_what_a_crash_left_is_mounted_over(shaky: Mounted) -> None:
    """All its processes killed: programs get an error, and `virgo mount` mends it."""
    for pid in (int(str(shaky.record.process["pid"])), *shaky.workers()):
        os.kill(pid, signal.SIGKILL)
    with refused(errno.ENOTCONN, errno.ECONNABORTED):
        (shaky.place / "n1").stat()
    done = virgo(shaky.cloud, "mount", str(shaky.place))
    assert done.returncode == 0, done.stderr
    assert (shaky.place / "n1").is_dir()


# --- the verbs ------------------------------------------------------------------------------------


def test_mounted_listed_and_taken_away_by_verbs(shaken: RunningCloud, tmp_path: Path) -> None:
    """`virgo mount`, `mounts` and `umount`, with what they say when they cannot."""
    place = tmp_path / "cloud"
    try:
        _verbs(shaken, place)
    finally:
        if place.is_mount():
            control.stop(shaken.home, place, force=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    full = virgo(shaken, "mount", str(tmp_path / "full"))
    assert full.returncode != 0 and "not empty" in full.stderr


def _verbs(shaken: RunningCloud, place: Path) -> None:
    said = virgo(shaken, "mount", str(place))
    assert said.returncode == 0 and f"{place} shows n1, n2" in said.stdout
    assert str(place) in virgo(shaken, "mounts").stdout
    again = virgo(shaken, "mount", str(place))
    assert again.returncode != 0 and "mounted already" in again.stderr and "umount" in again.stderr
    with (place / "n1" / "busy").open("w"):
        busy = virgo(shaken, "umount", str(place))
        assert busy.returncode != 0 and "in use" in busy.stderr and "--force" in busy.stderr
        assert virgo(shaken, "umount", "--force", str(place)).returncode == 0
    assert not place.is_mount() and place.is_dir()
    nothing = virgo(shaken, "umount", str(place))
    assert nothing.returncode != 0 and "nothing of the cloud is mounted" in nothing.stderr


def test_unmounting_ends_every_process_and_leaves_nothing(shaken: RunningCloud) -> None:
    """No process, no record and no file in memory is left."""
    with mounted(shaken) as mount:
        record = mount.record
        pids = mount.workers()
        control.stop(shaken.home, mount.place)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), within_s=10)
        assert not ProcessMark.from_json(record.process).alive()
        assert not Path(record.state_directory).exists()
        assert control.mounts(shaken.home) == []
        with pytest.raises(NotRunning):
            control.stop(shaken.home, mount.place)


def test_a_mount_outlives_its_node(shaken: RunningCloud) -> None:
    """Files of this machine are there while the node is not."""
    with mounted(shaken, afar=()) as mount:
        (mount.place / "n2" / "file").write_text("here")
        os.kill(shaken.node("n2")["pid"], signal.SIGKILL)
        assert (mount.place / "n2" / "file").read_text() == "here"
        until(lambda: shaken.node("n2")["state"] == "up", within_s=20)


def test_it_is_refused_where_something_is(shaken: RunningCloud, tmp_path: Path) -> None:
    """A file in the way is told as such, and left alone."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileRefused, match="cannot be mounted on"):
        control.start(shaken.home, control.Options(str(tmp_path / "file"), []))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_mount_that_cannot_begin_says_why_and_leaves_nothing(shaken: RunningCloud, tmp_path: Path) -> None:
    """A way to another machine without certificates is told as such; the directory is as before."""
    place = tmp_path / "cloud"
    options = control.Options(
        str(place), _roots_of(shaken), peers=[control.Peer("n2", 2, "tls:127.0.0.1:1", True)]
    )
    with pytest.raises(BadConfig, match=r"node\.crt"):
        control.start(shaken.home, options)
    assert not place.is_mount() and list(place.iterdir()) == []


# --- less than everything ---------------------------------------------------------------------------


def test_a_file_of_the_pool_on_a_lost_node_is_host_down(shaken: RunningCloud) -> None:
    """And not a file that is not there; files on other nodes go on."""
    with mounted(shaken) as mount:
        pool = mount.place / "pool"
        for node in ("n1", "n2"):
            with mount.cloud.connect(node) as cloud:
                cloud.files.write_text(f"/pool/on-{node}", node)
                assert cloud.files.stat(f"/pool/on-{node}").node == node
        pid = shaken.node("n2")["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(MOUNT_VALID_S + 0.1)
            begun = time.monotonic()
            with refused(errno.EHOSTDOWN):
                (pool / "on-n2").read_text()
            assert time.monotonic() - begun < BOUND_S
            assert (pool / "on-n1").read_text() == "n1"
        finally:
            os.kill(pid, signal.SIGCONT)
        until(lambda: _reads(pool / "on-n2", "n2"))


def _reads(path: Path, content: str) -> bool:
    try:
        return path.read_text() == content
    except OSError:
        return False


def test_without_the_right_to_pass_files_through_the_server_does_it(
    shaken: RunningCloud, tmp_path: Path
) -> None:
    """In a user namespace, where anybody may mount: it says so, and everything works."""
    if subprocess.run(["unshare", "-Ur", "true"], capture_output=True).returncode:
        pytest.skip("this kernel lets nobody make a user namespace")
    place = tmp_path / "cloud"
    command = f"{sys.executable} -m virgo.cli"
    script = (
        f"set -e; {command} mount {place}; cd {place}/n1; exec 5<>open; rm open; echo kept >&5;"
        f" echo written > file; cat file /proc/self/fd/5; cd /; exec 5>&-;"
        f" {command} mounts; {command} umount {place}"
    )
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script],
        env=shaken.environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Data goes through the server" in done.stderr
    assert "written\nkept\n" in done.stdout and " server " in done.stdout
