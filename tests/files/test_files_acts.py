"""Acts on a node's files: what hostile or confused askers get; nothing outside of a root is touched."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virgo.errors import BadArgument, FileMissing, FileRefused, PathEscape, VirgoError
from virgo.files.acts import Acts
from virgo.files.descriptors import DescriptorTable
from virgo.files.local import LocalFiles


@pytest.fixture
def acts(tmp_path: Path) -> Iterator[Acts]:
    """On the roots "" and "fixed", the second read-only."""
    with make(tmp_path) as found:
        yield found


@contextmanager
def make(tmp_path: Path) -> Iterator[Acts]:
    roots = {name: str(tmp_path / (name or "private")) for name in ("", "fixed")}
    for root in roots.values():
        Path(root).mkdir(exist_ok=True)
    local = LocalFiles(roots, ["fixed"])
    local.table = DescriptorTable(tmp_path / "table" / "journal", number=1, reopen=local.reopen)
    try:
        yield Acts(local, keeps_owners=os.geteuid() == 0, umask=0o022)
    finally:
        local.table.shut()


def act(acts: Acts, name: str, *arguments: Any, root: str = "") -> Any:
    return msgspec.msgpack.decode(acts.run(root, name, msgspec.msgpack.encode(arguments)))


def refusal(acts: Acts, name: str, *arguments: Any, root: str = "") -> int:
    with pytest.raises(VirgoError) as caught:
        act(acts, name, *arguments, root=root)
    return int(getattr(caught.value, "errno", 0) or 0)


OWNER = (os.getuid(), os.getgid())


def test_a_name_is_one_name(acts: Acts, tmp_path: Path) -> None:
    """Paths, dots and NUL in place of a name make nothing and remove nothing."""
    (tmp_path / "victim").write_text("x")
    for name in (b"..", b".", b"", b"../victim", b"a/b", b"a\0b"):
        with pytest.raises(BadArgument):
            act(acts, "LOOK", b"", name)
        with pytest.raises(BadArgument):
            act(acts, "REMOVE", b"", name, False)
        with pytest.raises(BadArgument):
            act(acts, "MAKE_DIRECTORY", b"", name, 0o755, OWNER)
    assert refusal(acts, "LOOK", b"", b"x" * 256) == errno.ENAMETOOLONG
    assert (tmp_path / "victim").read_text() == "x"


def test_a_path_does_not_lead_out(acts: Acts, tmp_path: Path) -> None:
    """By `..`, by an absolute path, or by a link that somebody has put there."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "private" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "private" / "up").symlink_to("..")
    for path in (
        b"..",
        b"../outside",
        b"/",
        os.fsencode(tmp_path),
        b"link",
        b"up/outside",
        b"x/../../outside",
    ):
        with pytest.raises((PathEscape, FileRefused, FileMissing)):
            act(acts, "MAKE_DIRECTORY", path, b"new", 0o755, OWNER)
        with pytest.raises((PathEscape, FileRefused, FileMissing)):
            act(acts, "ENTRIES", (path, b"", 0), 0, 4096, False)
    assert list((tmp_path / "outside").iterdir()) == []


def test_what_is_read_only_is_not_changed(acts: Acts, tmp_path: Path) -> None:
    """Neither by name nor by opening it."""
    (tmp_path / "fixed" / "file").write_text("fixed")
    assert refusal(acts, "CREATE", b"", b"new", os.O_WRONLY, 0o644, OWNER, root="fixed") == errno.EROFS
    assert refusal(acts, "REMOVE", b"", b"file", False, root="fixed") == errno.EROFS
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        assert refusal(acts, "OPEN", (b"file", b"", 0), flags, False, root="fixed") == errno.EROFS
    assert (tmp_path / "fixed" / "file").read_text() == "fixed"
    assert refusal(acts, "LOOK", b"", b"file", root="nowhere") == errno.ENOENT


def test_another_file_of_the_same_name_is_stale(acts: Acts, tmp_path: Path) -> None:
    """It is neither read, changed nor opened in place of what was meant."""
    file = tmp_path / "private" / "file"
    file.write_text("first")
    identity = act(acts, "LOOK", b"", b"file")[0]
    file.rename(tmp_path / "private" / "moved")
    file.write_text("second")
    for name, rest in (("ATTRIBUTES", ()), ("OPEN", (os.O_RDWR | os.O_TRUNC, False)), ("TARGET", ())):
        assert refusal(acts, name, (b"file", identity, 0), *rest) == errno.ESTALE
    assert act(acts, "ATTRIBUTES", (b"moved", identity, 0))
    assert file.read_text() == "second"


def test_an_open_file_is_reached_without_its_name(acts: Acts, tmp_path: Path) -> None:
    """By the descriptor, when the path leads elsewhere or nowhere."""
    found, descriptor = act(acts, "CREATE", b"", b"file", os.O_RDWR, 0o666, OWNER)
    assert (tmp_path / "private" / "file").stat().st_mode & 0o777 == 0o666  # whatever the umask of the node
    act(acts, "APPEND", descriptor, b"content")
    act(acts, "REMOVE", b"", b"file", False)
    where = (b"file", found[0], descriptor)
    attributes = act(acts, "CHANGE", where, (None, None, None, 3, None, None, False))
    assert int.from_bytes(attributes[8:16], "little") == 3
    assert refusal(acts, "ATTRIBUTES", (b"file", found[0], 0)) == errno.ENOENT


def test_a_fifo_is_not_waited_for(acts: Acts, tmp_path: Path) -> None:
    """To open one for data is refused at once."""
    os.mkfifo(tmp_path / "private" / "fifo")
    assert refusal(acts, "OPEN", (b"fifo", b"", 0), os.O_RDONLY, False) == errno.ESTALE


@given(
    st.sampled_from(["LOOK", "OPEN", "CHANGE", "ENTRIES", "RENAME", "COPY", "NONSENSE"]),
    st.binary(max_size=60),
)
def test_any_bytes_for_arguments_are_refused_in_words(name: str, packed: bytes) -> None:
    """Never an error that is none of ours."""
    import tempfile

    with (
        tempfile.TemporaryDirectory() as directory,
        make(Path(directory)) as acts,
        pytest.raises(VirgoError),
    ):
        acts.run("", name, packed + b"\xc1")


@pytest.mark.parametrize("value", [None, -1, "text", b"", [1], 2**70])
def test_arguments_of_another_kind_are_refused(acts: Acts, value: object) -> None:
    """Naming the act."""
    with pytest.raises((BadArgument, OverflowError)):
        act(acts, "ENTRIES", value, 0, 100, False)
