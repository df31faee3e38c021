"""A mount from its start to its end: what it shows, what it survives, how it is taken away."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conftest import RunningCloud, a_cloud
from tests.files.mount.conftest import Mounted, mounted
from tests.files.mount.test_mount_posix import NOBODY, opened, refused
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


def processes(mount: Mounted) -> list[int]:
    """The workers of a mount."""
    keeper = mount.record.process["pid"]
    return [int(pid) for pid in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()]


def virgo(cloud: RunningCloud, *words: str) -> subprocess.CompletedProcess[str]:
    return cloud.virgo(*words, check=False)


# --- what is shown --------------------------------------------------------------------------------


def test_nodes_and_exports_stand_where_paths_say(mount: Mounted, new_name: Callable[[], str]) -> None:
    """`/NODE/EXPORT/...` and `/NODE/...` lead to the same files as everywhere else in the cloud."""
    name = new_name()
    assert sorted(path.name for path in mount.place.iterdir()) == ["n1", "n2", "pool"]
    assert {"data", "fixed"} <= {path.name for path in (mount.place / "n1").iterdir()}
    (mount.place / "n1" / "data" / name).write_text("by the kernel")
    with mount.cloud.connect("n2") as cloud:
        assert cloud.files.read_text(f"/n1/data/{name}") == "by the kernel"
        cloud.files.write_text(f"/n2/{name}", "by the wire")
    assert (mount.place / "n2" / name).read_text() == "by the wire"
    assert (mount.beneath("n2") / name).read_text() == "by the wire"


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_tops_of_trees_are_not_changed_or_crossed(mount: Mounted, node: str) -> None:
    """An export is no name to be given or taken; renames and links end where a tree does."""
    top = mount.place / node
    file = top / "file"
    file.write_text("x")
    with refused(errno.EBUSY):
        (top / "data").rmdir()
    with refused(errno.EBUSY, errno.EISDIR):
        file.rename(top / "data")
    with refused(errno.EEXIST):
        (top / "data").mkdir()
    with refused(errno.EXDEV):
        file.rename(top / "data" / "file")
    with refused(errno.EXDEV):
        os.link(file, top / "data" / "file")
    with refused(errno.EPERM):
        (mount.place / "new").touch()
    for change in (
        (top / "fixed" / "new").touch,
        lambda: (top / "fixed" / "file").write_text("x"),
        (top / "fixed" / "file").unlink,
        lambda: (top / "fixed" / "file").chmod(0o777),
        lambda: os.setxattr(top / "fixed" / "file", "user.x", b""),
    ):
        with refused(errno.EROFS):
            change()
    assert (top / "fixed" / "file").read_text() == "fixed"


def test_links_out_of_an_export_lead_where_the_reader_is(mount: Mounted, tmp_path: Path) -> None:
    """As with every network file system: the link is text, and nothing of the node's machine shows by it."""
    (tmp_path / "reader's").write_text("of the reader's machine")
    for node in ("n1", "n2"):
        link = mount.place / node / "link-out"
        link.symlink_to(tmp_path / "reader's")
        assert link.read_text() == "of the reader's machine"
        link.unlink()


# --- nobody in between ----------------------------------------------------------------------------


def test_data_of_local_files_goes_by_nobody(mount: Mounted, new_name: Callable[[], str]) -> None:
    """Read, written and mapped without one request for data to the server."""
    file = mount.place / "n1" / new_name()
    before = mount.upcalls("read", "write", "flush")
    file.write_bytes(b"x" * 5_000_000)
    with opened(file, os.O_RDWR) as descriptor:
        for position in range(0, 5_000_000, 100_000):
            assert os.pread(descriptor, 10, position) == b"x" * 10
    subprocess.run(["cmp", file, mount.beneath("n1") / file.name], check=True)
    assert mount.upcalls("read", "write", "flush") == before


def test_several_workers_answer(mount: Mounted) -> None:
    """There is more than one process, and what one learnt the others know."""
    assert mount.record.workers == len(processes(mount)) >= min(2, os.cpu_count() or 1)
    directory = mount.place / "n1" / "many"
    directory.mkdir()
    programs = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import os\nfor n in range(200): os.stat(open('{directory}/{who}-%d' % n, 'w').name)",
            ]
        )
        for who in range(4)
    ]
    assert [program.wait(60) for program in programs] == [0] * 4
    assert len(list(directory.iterdir())) == 800


# --- other nodes, and their faults ----------------------------------------------------------------


def test_who_opens_sees_what_was_closed_elsewhere(cloud2: RunningCloud, mount: Mounted) -> None:
    """Close-to-open between two mounts: of content, size and mode, however often the file was read before."""
    with mounted(cloud2, afar=("n1",)) as other:
        here, there = mount.place / "n1" / "coherent", other.place / "n1" / "coherent"
        for turn, size in enumerate((10, 200_000, 3, 200_000)):
            writer, reader = (here, there) if turn % 2 == 0 else (there, here)
            writer.write_bytes(b"%d" % turn * size)
            with reader.open("rb") as file:
                assert file.read() == b"%d" % turn * size


APPENDS = """
import sys
for number in range(200):
    with open(sys.argv[1], "a") as file:
        file.write(f"{sys.argv[2]} {number}\\n")
"""


def test_two_nodes_append_to_one_file(cloud2: RunningCloud, mount: Mounted) -> None:
    """Every line of both is there once and whole, though both write at once."""
    with mounted(cloud2, afar=("n1",)) as other:
        log = mount.place / "n1" / "log"
        log.touch()
        writers = [
            subprocess.Popen([sys.executable, "-c", APPENDS, place / "n1" / "log", name])
            for place, name in ((mount.place, "here"), (other.place, "there"))
        ]
        assert [writer.wait(60) for writer in writers] == [0, 0]
        wanted = sorted(f"{name} {number}" for name in ("here", "there") for number in range(200))
        assert sorted((mount.beneath("n1") / "log").read_text().splitlines()) == wanted
        for place in (mount.place, other.place):
            assert sorted((place / "n1" / "log").read_text().splitlines()) == wanted


@pytest.mark.parametrize("node", ["n1", "n2"])
@pytest.mark.parametrize("which", ["mount", "served"])
def test_a_full_disk_is_an_error_and_nothing_is_lost_in_silence(
    which: str, node: str, request: pytest.FixtureRequest
) -> None:
    """ENOSPC to who writes; what was counted as written is there, and once there is room it goes on."""
    file = request.getfixturevalue(which).place / node / "small" / f"{which}-{node}"
    written = 0
    with file.open("wb", buffering=0) as sink, refused(errno.ENOSPC):
        while True:
            written += sink.write(b"x" * 100_000)
    assert file.read_bytes()[:written] == b"x" * written
    assert written > 500_000
    file.write_bytes(b"there is room again")
    assert file.read_bytes() == b"there is room again"
    file.unlink()


def test_files_of_a_node_that_is_not_root_are_its_users(can_mount: None, tmp_path: Path) -> None:
    """Also if root has mounted them: else the node could not read what is made below the mount."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    directory, place = tmp_path / "files", tmp_path / "cloud"
    directory.mkdir()
    os.chown(directory, NOBODY, NOBODY)
    root = control.Root("n1", "", str(directory), keeps_owners=False)
    control.start(tmp_path, control.Options(str(place), [root]))
    try:
        (place / "n1" / "file").touch()
        (place / "n1" / "sub").mkdir()
        made = [(directory / name).stat() for name in ("file", "sub")]
        assert [(status.st_uid, status.st_gid) for status in made] == [(NOBODY, NOBODY)] * 2
    finally:
        control.stop(tmp_path, place, force=True)


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
        first = processes(shaky)
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(set(processes(shaky)) - set(first)) == len(first), within_s=10)
        assert held.read() == b"content"
        os.fsync(held.fileno())
        assert file.stat().st_size == 7
        (file.parent / "new").write_text("goes on")
        young = processes(shaky)[0]
        os.kill(young, signal.SIGKILL)  # it has only just begun: another one begins a moment later
        until(lambda: young not in (now := processes(shaky)) and len(now) == len(first))
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
    for pid in (int(str(shaky.record.process["pid"])), *processes(shaky)):
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
        pids = processes(mount)
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


# --- the pool -------------------------------------------------------------------------------------


def test_the_pool_is_one_tree_over_all_nodes(mount: Mounted, new_name: Callable[[], str]) -> None:
    """Files are made, read, renamed and removed below `/pool`, wherever the cloud has placed them."""
    top = mount.place / "pool" / new_name()
    (top / "sub").mkdir(parents=True)
    (top / "sub" / "file").write_bytes(b"placed" * 50_000)
    with mount.cloud.connect("n2") as cloud:
        path = f"/pool/{top.name}/sub/file"
        assert cloud.files.read_bytes(path) == b"placed" * 50_000
        where = cloud.files.stat(path).node
        cloud.files.write_text(f"/pool/{top.name}/other", "by the wire")
    assert (mount.cloud.home / "nodes" / where / "files-pool" / top.name / "sub" / "file").exists()
    assert (top / "other").read_text() == "by the wire"
    assert sorted(entry.name for entry in top.iterdir()) == ["other", "sub"]
    (top / "other").rename(top / "sub" / "renamed")
    with (top / "sub" / "renamed").open("a+b") as file:
        file.write(b", and more")
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        assert file.read() == b"by the wire, and more"
        (top / "sub" / "renamed").unlink()
        file.seek(3)
        assert file.read(3) == b"the"
    (top / "sub" / "file").chmod(0o600)
    assert (top / "sub" / "file").stat().st_mode & 0o777 == 0o600
    with refused(errno.ENOTEMPTY):
        (top / "sub").rmdir()
    with refused(errno.EOPNOTSUPP):
        (top / "link").symlink_to("file")
    with refused(errno.EXDEV):
        (top / "sub").rename(top / "moved")
    subprocess.run(["mv", top / "sub", top / "moved"], check=True)
    assert (top / "moved" / "file").read_bytes() == b"placed" * 50_000
    subprocess.run(["rm", "-r", top], check=True)
    assert not top.exists()


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
