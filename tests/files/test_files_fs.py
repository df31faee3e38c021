"""`virgo://`: fsspec's own suites of claims, and what ours adds to them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import dask.bag
import fsspec
import fsspec.tests.abstract as suites
import pytest
from fsspec.callbacks import Callback
from tests.conftest import RunningCloud

from virgo.errors import BadArgument
from virgo.files.fs import VirgoFileSystem
from virgo.wire import near

_serial = count(1)


@pytest.fixture(scope="module")
def fs(cloud3: RunningCloud) -> Iterator[VirgoFileSystem]:
    with cloud3.connect("n1") as cloud:
        yield cloud.files.fs


@pytest.fixture(params=["n2", "pool"])
def top(request: pytest.FixtureRequest, fs: VirgoFileSystem) -> str:
    """An empty directory, on a node and in the pool."""
    path = f"/{request.param}/fs-{next(_serial)}"
    fs.mkdir(path)
    return path


class Fixtures(suites.AbstractFixtures):
    """`fs` on a node, and in the pool."""

    where = "n2"

    @pytest.fixture
    def fs(self, cloud3: RunningCloud) -> Iterator[VirgoFileSystem]:
        with cloud3.connect("n1") as cloud:
            yield cloud.files.fs

    @pytest.fixture
    def fs_path(self, fs: VirgoFileSystem) -> str:
        path = f"/{self.where}/suite-{next(_serial)}"
        fs.mkdir(path)
        return path


class TestCopy(Fixtures, suites.AbstractCopyTests):
    """Copies within."""


class TestGet(Fixtures, suites.AbstractGetTests):
    """Copies out."""


class TestPut(Fixtures, suites.AbstractPutTests):
    """Copies in."""


class TestOpen(Fixtures, suites.AbstractOpenTests):
    """Opening."""


class TestPipe(Fixtures, suites.AbstractPipeTests):
    """Whole files."""


class TestPoolCopy(TestCopy):
    """The same in the pool."""

    where = "pool"


def test_it_is_found_by_its_protocol(cloud3: RunningCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """`virgo://` leads to the connection of the process, also after a way through pickle."""
    with cloud3.connect("n3") as cloud:
        monkeypatch.setattr(near, "_providers", [lambda: cloud.client])
        with fsspec.open("virgo://n2/by-url", "w") as file:
            file.write("text")
        assert cloud.files.read_text("/n2/by-url") == "text"
        again = pickle.loads(pickle.dumps(fsspec.filesystem("virgo")))
        assert again.cat_file("virgo://n2/by-url") == again.cat_file("/n2/by-url") == b"text"
        assert again.unstrip_protocol("/n2/by-url") == "virgo://n2/by-url"


def test_trees_are_walked_moved_and_removed(fs: VirgoFileSystem, top: str) -> None:
    """`glob`, `walk`, `find`, `du`, `mv` of files and directories, `rm -r`."""
    for name in ("a.csv", "b.csv", "sub/c.csv", "sub/deep/d.txt"):
        fs.pipe_file(f"{top}/{name}", name.encode())
    assert fs.glob(f"{top}/*.csv") == [f"{top}/a.csv", f"{top}/b.csv"]
    assert fs.glob(f"{top}/**/*.csv") == [f"{top}/a.csv", f"{top}/b.csv", f"{top}/sub/c.csv"]
    assert [(path, sorted(directories), sorted(files)) for path, directories, files in fs.walk(top)] == [
        (top, ["sub"], ["a.csv", "b.csv"]),
        (f"{top}/sub", ["deep"], ["c.csv"]),
        (f"{top}/sub/deep", [], ["d.txt"]),
    ]
    assert fs.du(top) == sum(len(name) for name in ("a.csv", "b.csv", "sub/c.csv", "sub/deep/d.txt"))
    fs.mv(f"{top}/a.csv", f"{top}/sub/")
    fs.mv(f"{top}/sub", f"{top}/moved", recursive=True)
    assert [path[len(top) :] for path in fs.find(top)] == [
        "/b.csv", "/moved/a.csv", "/moved/c.csv", "/moved/deep/d.txt",
    ]  # fmt: skip
    fs.rm(f"{top}/moved", recursive=True)
    assert fs.ls(top, detail=False) == [f"{top}/b.csv"]
    with pytest.raises(FileNotFoundError):
        fs.info(f"{top}/moved")


def test_parts_are_read_at_once_and_failures_stay_in_place(fs: VirgoFileSystem, top: str) -> None:
    """Positions from both ends, many ranges, and one that fails."""
    content = bytes(range(256)) * 40_000
    fs.pipe_file(f"{top}/file", content)
    assert fs.cat_file(f"{top}/file", -5, -1) == content[-5:-1]
    assert fs.cat_file(f"{top}/file", 10_000_000) == content[10_000_000:]
    starts = list(range(0, 10_000_000, 777_777))
    paths = [f"{top}/file"] * len(starts)
    assert fs.cat_ranges(paths, starts, [start + 100_000 for start in starts]) == [
        content[start : start + 100_000] for start in starts
    ]
    good, bad = fs.cat_ranges([f"{top}/file", f"{top}/absent"], [0, 0], [3, 3])
    assert good == b"\0\1\2" and isinstance(bad, FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges([f"{top}/absent"], [0], [3], on_error="raise")


def test_a_transaction_is_seen_whole_or_not_at_all(fs: VirgoFileSystem, top: str) -> None:
    """Files appear together at its end, in place of the old ones; if it fails, nothing has happened."""
    fs.pipe_file(f"{top}/one", b"old")
    with fs.transaction:
        for name in ("one", "two"):
            with fs.open(f"{top}/{name}", "wb") as file:
                file.write(b"new")
        assert fs.cat_file(f"{top}/one") == b"old" and not fs.exists(f"{top}/two")
    assert [fs.cat_file(f"{top}/{name}") for name in ("one", "two")] == [b"new", b"new"]
    with pytest.raises(RuntimeError), fs.transaction:
        with fs.open(f"{top}/one", "wb") as file:
            file.write(b"never")
        raise RuntimeError
    assert fs.cat_file(f"{top}/one") == b"new"
    assert sorted(fs.ls(top, detail=False)) == [f"{top}/one", f"{top}/two"]


def test_files_are_appended_to_and_changed_anywhere(fs: VirgoFileSystem, top: str) -> None:
    """The file objects are Python's: they append, seek, and read what was written."""
    with fs.open(f"{top}/file", "ab") as file:
        file.write(b"one ")
    with fs.open(f"{top}/file", "ab") as file:
        file.write(b"two")
    with fs.open(f"{top}/file", "r+b") as file:
        file.seek(4)
        file.write(b"2")
        file.seek(0)
        assert file.read() == b"one 2wo"
    with fs.open(f"{top}/file", "rt") as text:
        assert text.read() == "one 2wo"
    with pytest.raises(FileExistsError):
        fs.pipe_file(f"{top}/file", b"", mode="create")


def test_checksums_are_made_where_the_file_is(fs: VirgoFileSystem, top: str) -> None:
    """By any algorithm of hashlib; another is refused, and nothing stays open."""
    content = b"x" * 9_000_000
    fs.pipe_file(f"{top}/file", content)
    assert fs.digest(f"{top}/file") == hashlib.sha256(content).hexdigest()
    assert fs.digest(f"{top}/file", "md5") == hashlib.md5(content).hexdigest()
    with pytest.raises(BadArgument, match="no checksum"):
        fs.digest(f"{top}/file", "shake_128")


def test_long_copies_tell_how_far_they_are(fs: VirgoFileSystem, top: str, tmp_path: Path) -> None:
    """A callback of fsspec hears the size, and every piece."""
    (tmp_path / "file").write_bytes(b"x" * 10_000_000)
    for copy in (
        lambda told: fs.put_file(tmp_path / "file", f"{top}/file", callback=told),
        lambda told: fs.get_file(f"{top}/file", tmp_path / "back", callback=told),
    ):
        told = Callback()
        copy(told)
        assert (told.size, told.value) == (10_000_000, 10_000_000)
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()


def test_what_others_have_built_on_fsspec_works(
    cloud3: RunningCloud, fs: VirgoFileSystem, top: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask reads text by it, in pieces; a mapper keeps values, as zarr does."""
    fs.pipe_file(f"{top}/words.txt", b"one\ntwo\nthree\n" * 1000)
    with cloud3.connect("n3") as cloud:
        monkeypatch.setattr(near, "_providers", [lambda: cloud.client])
        words = dask.bag.read_text(f"virgo:/{top}/words.txt", blocksize=5000)
        counted = dict(words.str.strip().frequencies().compute(scheduler="threads"))
    assert counted == {"one": 1000, "two": 1000, "three": 1000}
    mapper = fs.get_mapper(f"{top}/store")
    mapper["a/b"] = b"value"
    assert mapper["a/b"] == b"value" and list(mapper) == ["a/b"]


def test_what_cannot_be_listed_is_an_error(fs: VirgoFileSystem) -> None:
    """And not an empty listing."""
    with pytest.raises(FileNotFoundError):
        fs.ls("/n2/nowhere/else")
    with pytest.raises(FileNotFoundError):
        fs.ls("/nowhere/else")
