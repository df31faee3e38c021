"""What a mount shows: nodes, exports and the pool; who is in between, what two nodes see of each other."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import RunningCloud
from tests.files.mount.conftest import Mounted, mounted
from tests.files.mount.test_mount_posix import NOBODY, opened, refused

from virgo.files.mount import control

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
    assert mount.record.workers == len(mount.workers()) >= min(2, os.cpu_count() or 1)
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


# --- other nodes, and disks -----------------------------------------------------------------------


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
