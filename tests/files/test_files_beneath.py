"""Opening below a root, on real directories, with every way out that we know."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virgo.errors import PathEscape
from virgo.files import beneath

SECRET = b"outside"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    """A root with files, links within, links out, a FIFO and a socket; the secret lies beside it."""
    (tmp_path / "secret").write_bytes(SECRET)
    top = tmp_path / "root"
    (top / "a/b").mkdir(parents=True)
    (top / "a/file").write_bytes(b"inside")
    (top / "a/b/deep").write_bytes(b"deep")
    links = {
        "in": "a/file",
        "dir": "a/b",
        "self": ".",
        "loop": "loop",
        "absolute": str(tmp_path / "secret"),
        "absolute_inside": str(top / "a/file"),
        "relative": "../secret",
        "up": "..",
        "a/b/far": "../../../secret",
        "a/b/near": "../file",
        "slash": "/",
        "magic": "/proc/self/root",
        "fd": "/proc/self/fd",
        "new": "a/made",
        "new_out": "../made",
    }
    for name, target in links.items():
        (top / name).symlink_to(target)
    os.mkfifo(top / "fifo")
    descriptor = beneath.open_root(str(top))
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(top)  # a socket's path is short
        listener.bind("socket")
        os.chdir(here)
        yield descriptor
    os.close(descriptor)


def read(root: int, path: str) -> bytes:
    descriptor = beneath.open_regular(root, path, os.O_RDONLY)
    try:
        return os.read(descriptor, 100)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("a/file", b"inside"),
        ("in", b"inside"),
        ("dir/deep", b"deep"),
        ("dir/near", b"inside"),
        ("a/../a/file", b"inside"),
        ("dir/../file", b"inside"),
        ("self/self/in", b"inside"),
    ],
)
def test_links_and_dots_within_the_root_work(root: int, path: str, content: bytes) -> None:
    """What stays inside is opened, also through links and `..`, with the kernel's meaning of `link/..`."""
    assert read(root, path) == content


@pytest.mark.parametrize(
    "path",
    [
        "..", "../secret", "a/../../secret", "/etc/passwd", "absolute", "absolute_inside", "relative",
        "up/secret", "a/b/far", "dir/far", "slash/etc/passwd", "magic/etc/passwd", "fd/0",
        "dir/../../../secret", "self/../secret",
    ],
)  # fmt: skip
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_TRUNC])
def test_every_way_out_is_refused(root: int, path: str, flags: int, tmp_path: Path) -> None:
    """No path or link leads out, for reading, writing or creating, and nothing outside is touched."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PathEscape):
        beneath.open_regular(root, path, flags)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "secret").read_bytes() == SECRET


def test_creating_through_links(root: int, tmp_path: Path) -> None:
    """A dangling link that points inside creates there; one that points out is refused."""
    os.close(beneath.open_regular(root, "new", os.O_RDWR | os.O_CREAT))
    assert (tmp_path / "root/a/made").exists()
    with pytest.raises(PathEscape):
        beneath.open_regular(root, "new_out", os.O_RDWR | os.O_CREAT)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("path", ["fifo", "socket", "a", "self", "loop"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY])
def test_only_regular_files_are_opened_and_nothing_waits(root: int, path: str, flags: int) -> None:
    """A FIFO without another end, a socket, a directory and a circle of links are errors at once."""
    held = len(list(Path("/proc/self/fd").iterdir()))
    start = time.monotonic()
    with pytest.raises(OSError, match=r".") as caught:
        beneath.open_regular(root, path, flags)
    assert not isinstance(caught.value, PathEscape)
    assert time.monotonic() - start < 1
    assert len(list(Path("/proc/self/fd").iterdir())) == held


def test_devices_are_refused() -> None:
    """A device below an export is not a file."""
    root = beneath.open_root("/dev")
    try:
        with pytest.raises(OSError, match="device"):
            beneath.open_regular(root, "null", os.O_RDWR)
    finally:
        os.close(root)


@pytest.mark.parametrize("path", ["up/x", "slash/tmp/x", "../x", "magic/tmp/x"])
def test_changes_of_names_do_not_lead_out(root: int, path: str, tmp_path: Path) -> None:
    """remove, mkdir, rename, stat and their parents stay below the root."""
    before = sorted(tmp_path.iterdir())
    for attempt in (
        lambda: beneath.remove(root, path),
        lambda: beneath.make_directory(root, path),
        lambda: beneath.rename(root, "a/file", root, path),
        lambda: beneath.rename(root, path, root, "a/other"),
        lambda: beneath.status(root, path),
        lambda: beneath.make_directories(root, path),
    ):
        with pytest.raises(PathEscape):
            attempt()
    assert sorted(tmp_path.iterdir()) == before


def test_names_are_changed_not_what_links_point_at(root: int, tmp_path: Path) -> None:
    """Removing, renaming and describing a link means the link."""
    assert beneath.describe(beneath.status(root, "absolute").st_mode) == "link"
    beneath.rename(root, "absolute", root, "moved")
    beneath.remove(root, "moved")
    beneath.remove(root, "dir")
    assert (tmp_path / "secret").exists()
    assert (tmp_path / "root/a/b/deep").exists()


@pytest.mark.parametrize("path", ["", "..", "a/..", "."])
def test_a_root_is_not_removed_or_renamed(root: int, path: str) -> None:
    """Names that mean a directory by position are refused for changes."""
    with pytest.raises((OSError, PathEscape)):
        beneath.remove(root, path)
    with pytest.raises((OSError, PathEscape)):
        beneath.rename(root, path, root, "elsewhere")


def test_a_failed_rename_makes_no_directories(root: int, tmp_path: Path) -> None:
    """Directories for the new name are made only for a file that is there."""
    with pytest.raises(FileNotFoundError):
        beneath.rename(root, "absent", root, "fresh/name")
    assert not (tmp_path / "root/fresh").exists()
    beneath.rename(root, "a/file", root, "fresh/name")
    assert (tmp_path / "root/fresh/name").read_bytes() == b"inside"


def test_identity_tells_a_file_from_its_successor(root: int, tmp_path: Path) -> None:
    """A file that takes another's name, and maybe its inode number, is another file."""
    path = tmp_path / "root/a/file"
    seen = set()
    for _ in range(20):
        descriptor = beneath.open_regular(root, "a/file", os.O_RDWR | os.O_CREAT)
        seen.add(beneath.identity(descriptor))
        os.write(descriptor, b"x")
        assert beneath.identity(descriptor) in seen
        os.close(descriptor)
        path.unlink()
    assert len(seen) == 20


NAMES = st.sampled_from(
    [
        "a",
        "b",
        "file",
        "deep",
        "in",
        "dir",
        "self",
        "absolute",
        "relative",
        "up",
        "far",
        "near",
        "slash",
        "..",
        ".",
    ]
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.lists(NAMES, min_size=1, max_size=7).map("/".join))
def test_whatever_is_read_lies_inside(root: int, path: str) -> None:
    """Random walks over links and dots never read the secret outside."""
    with contextlib.suppress(OSError, PathEscape):
        assert read(root, path) in (b"inside", b"deep", b"")
