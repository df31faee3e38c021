"""File objects beside real ones: the same operations give the same results, blocking and with asyncio."""

from __future__ import annotations

import errno
import io
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from files.loopback import Node, blocking_cloud
from virgo.errors import BadArgument, DiskFull, FileMissing, FileRefused, FileThere, VirgoError
from virgo.files import calls
from virgo.limits import FILE_CHUNK_BYTES

MODES = ("r", "r+", "w", "w+", "a", "a+", "x", "x+")


@pytest.fixture(params=["blocking", "asyncio"])
def nodes(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[Node]]:
    with blocking_cloud(tmp_path / "cloud", face=request.param) as started:
        yield started


def outcome(work: Callable[[], Any]) -> Any:
    """What it returns, or the kind of error that both sides must share."""
    try:
        return work()
    except io.UnsupportedOperation:
        return io.UnsupportedOperation
    except FileExistsError:
        return FileExistsError
    except FileNotFoundError:
        return FileNotFoundError
    except OSError:
        return OSError
    except ValueError:
        return ValueError


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("buffering", [0, -1])
def test_modes_do_what_they_do_for_open(
    nodes: list[Node], tmp_path: Path, mode: str, buffering: int, present: bool
) -> None:
    """Each mode, on a present and an absent file, gives what Python's open gives, step by step."""
    here, there = tmp_path / "file", "/n2/file"
    files = nodes[0].files
    if present:
        here.write_bytes(b"0123456789")
        files.write_bytes(there, b"0123456789")
    mine = outcome(lambda: files.open(there, mode + "b", buffering=buffering))
    real = outcome(lambda: here.open(mode + "b", buffering=buffering))
    if isinstance(real, type):
        assert mine is real
        return
    with mine, real:
        steps: list[Callable[[Any], Any]] = [
            lambda file: (file.readable(), file.writable(), file.seekable(), file.isatty()),
            lambda file: file.tell(),
            lambda file: file.read(3),
            lambda file: file.write(b"AB"),
            lambda file: file.tell(),
            lambda file: file.flush(),
            lambda file: file.seek(0),
            lambda file: file.read(),
            lambda file: file.seek(1),
            lambda file: file.write(b"xyz"),
            lambda file: file.seek(-2, 2),
            lambda file: file.read(),
            lambda file: file.truncate(4),
            lambda file: file.tell(),
            lambda file: file.write(b"end"),
            lambda file: file.seek(0),
            lambda file: file.readlines(),
            lambda file: file.mode,
        ]
        for number, step in enumerate(steps):
            assert outcome(lambda: step(mine)) == outcome(lambda: step(real)), number  # noqa: B023
    assert files.read_bytes(there) == here.read_bytes()
    assert outcome(mine.tell) is outcome(real.tell) is ValueError


class FileMachine(RuleBasedStateMachine):
    """Random operations on a file of the cloud and on a real one, buffered and raw."""

    @initialize(
        mode=st.sampled_from(["r+b", "w+b", "a+b", "rb", "wb", "ab"]),
        buffering=st.sampled_from([0, 2, 16, 8192, -1]),
        content=st.binary(max_size=200),
        face=st.sampled_from(["blocking", "asyncio"]),
    )
    def start(self, mode: str, buffering: int, content: bytes, face: str) -> None:
        self.stack = ExitStack()
        directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.nodes = self.stack.enter_context(blocking_cloud(directory / "cloud", 1, face=face))
        self.files, self.path = self.nodes[0].files, directory / "real"
        self.path.write_bytes(content)
        self.files.write_bytes("/n1/file", content)
        self.mine: Any = self.stack.enter_context(self.files.open("/n1/file", mode, buffering=buffering))
        self.real: Any = self.stack.enter_context(self.path.open(mode, buffering=buffering))

    def both(self, work: Callable[[Any], Any]) -> None:
        assert outcome(lambda: work(self.mine)) == outcome(lambda: work(self.real))

    @rule(size=st.integers(-1, 300))
    def read(self, size: int) -> None:
        self.both(lambda file: file.read(size))

    @rule(size=st.integers(0, 50))
    def readinto(self, size: int) -> None:
        def work(file: Any) -> tuple[int, bytes]:
            buffer = bytearray(size)
            return file.readinto(buffer), bytes(buffer)

        self.both(work)

    @rule()
    def readline(self) -> None:
        self.both(lambda file: file.readline())

    @rule(data=st.binary(max_size=100) | st.just(b"line\nline\n"))
    def write(self, data: bytes) -> None:
        self.both(lambda file: file.write(data))

    @rule(offset=st.integers(-50, 400), whence=st.sampled_from([0, 1, 2, 7]))
    def seek(self, offset: int, whence: int) -> None:
        self.both(lambda file: file.seek(offset, whence))

    @rule()
    def tell(self) -> None:
        self.both(lambda file: file.tell())

    @rule(size=st.none() | st.integers(-1, 300))
    def truncate(self, size: int | None) -> None:
        self.both(lambda file: file.truncate(size))

    @rule()
    def flush_and_compare(self) -> None:
        self.both(lambda file: file.flush())
        assert self.files.read_bytes("/n1/file") == self.path.read_bytes()

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            with self.stack:
                self.mine.close()
                self.real.close()
                assert self.files.read_bytes("/n1/file") == self.path.read_bytes()
                assert self.files.stats()["open"] == 0


TestFileMachine = FileMachine.TestCase
TestFileMachine.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def move(file: Any, offset: int, whence: int) -> None:
    """Seek in a text; the number that comes back means something to its own file only."""
    file.seek(offset, whence)


class TextMachine(RuleBasedStateMachine):
    """Random operations on a text of the cloud and on a real one; places are marked and returned to."""

    @initialize(
        mode=st.sampled_from(["r+", "w+", "a+", "r", "w", "a"]),
        encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-be", "latin-1", "shift_jis"]),
        newline=st.sampled_from([None, "", "\n", "\r", "\r\n"]),
        buffering=st.sampled_from([1, 3, 64, -1]),
        content=st.text("ab\n\r", max_size=60),
        face=st.sampled_from(["blocking", "asyncio"]),
    )
    def start(self, mode: str, buffering: int, content: str, face: str, **layout: Any) -> None:
        self.stack = ExitStack()
        directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.nodes = self.stack.enter_context(blocking_cloud(directory / "cloud", 1, face=face))
        self.files, self.path = self.nodes[0].files, directory / "real"
        self.path.write_bytes(content.encode(layout["encoding"]))
        self.files.write_bytes("/n1/file", content.encode(layout["encoding"]))
        options = {"buffering": buffering, "errors": "replace", **layout}
        self.mine: Any = self.stack.enter_context(self.files.open("/n1/file", mode, **options))
        self.real: Any = self.stack.enter_context(self.path.open(mode, **options))
        self.marks = [(0, 0)]

    def both(self, work: Callable[[Any], Any]) -> None:
        assert outcome(lambda: work(self.mine)) == outcome(lambda: work(self.real))

    @rule(size=st.integers(-1, 70))
    def read(self, size: int) -> None:
        self.both(lambda file: file.read(size))

    @rule(size=st.sampled_from([-1, -1, -1, 0, 1, 5]))
    def readline(self, size: int) -> None:
        self.both(lambda file: file.readline(size))

    @rule()
    def read_all_and_tell_its_line_ends(self) -> None:
        self.both(lambda file: file.seek(0))
        self.both(lambda file: file.read())
        self.both(lambda file: file.newlines)

    @rule(text=st.text("aß\u3042\n\r", max_size=20))
    def write_at_the_end(self, text: str) -> None:
        self.both(lambda file: move(file, 0, 2))
        self.both(lambda file: file.write(text))

    @rule()
    def mark(self) -> None:
        self.marks.append((self.mine.tell(), self.real.tell()))
        self.both(lambda file: move(file, 0, 1))

    @rule(number=st.integers(0, 20))
    def return_to_a_mark(self, number: int) -> None:
        mine, real = self.marks[number % len(self.marks)]
        assert outcome(lambda: self.mine.seek(mine) == mine) == outcome(lambda: self.real.seek(real) == real)

    @rule(offset=st.integers(-3, 3), whence=st.sampled_from([1, 2, 7]))
    def seek(self, offset: int, whence: int) -> None:
        self.both(lambda file: move(file, offset, whence))

    @rule()
    def flush_and_compare(self) -> None:
        self.both(lambda file: file.flush())
        assert self.files.read_bytes("/n1/file") == self.path.read_bytes()

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            with self.stack:
                self.mine.close()
                self.real.close()
                assert self.files.read_bytes("/n1/file") == self.path.read_bytes()
                assert self.files.stats()["open"] == 0


TestTextMachine = TextMachine.TestCase
TestTextMachine.settings = TestFileMachine.settings


def test_text_is_text(nodes: list[Node], tmp_path: Path) -> None:
    """Encoding, newlines, iteration and print work as on a real text file; the default is UTF-8."""
    files = nodes[0].files
    text = "eins\nzwei — ß\r\ndrei\n" * 10_000
    for options in ({}, {"newline": ""}, {"newline": "\r\n"}, {"encoding": "utf-16"}):
        with (
            files.open("/n3/text", "w", **options) as mine,
            (tmp_path / "t").open("w", **{"encoding": "utf-8", **options}) as real,
        ):
            assert mine.write(text) == real.write(text)
            print("last", 1, file=mine)
            print("last", 1, file=real)
        assert files.read_bytes("/n3/text") == (tmp_path / "t").read_bytes()
        with (
            files.open("/n3/text", **options) as mine,
            (tmp_path / "t").open(**{"encoding": "utf-8", **options}) as real,
        ):
            assert list(mine) == list(real)
    with files.open("/n3/text", "rb") as mine, pytest.raises((io.UnsupportedOperation, AttributeError)):
        mine.fileno()


@pytest.mark.parametrize(
    "options",
    [{"mode": "rb", "encoding": "utf-8"}, {"mode": "r", "buffering": 0}, {"mode": "rw"}, {"mode": "rbt"}],
)
def test_arguments_that_do_not_go_together(nodes: list[Node], options: dict[str, Any]) -> None:
    """What Python's open calls a ValueError is one here, and leaves nothing open."""
    files = nodes[0].files
    files.write_bytes("/n1/file", b"")
    with pytest.raises(ValueError):
        files.open("/n1/file", **options)
    with pytest.raises(ValueError):
        files.open("/n1/file", "r", newline="x")
    assert files.stats()["open"] == 0


def test_errors_are_ours_and_pythons(nodes: list[Node]) -> None:
    """One class tells both what happened in the cloud and what Python's code expects."""
    files = nodes[0].files
    files.write_bytes("/n2/file", b"x")
    with pytest.raises(FileNotFoundError) as missing:
        files.open("/n2/absent")
    assert isinstance(missing.value, FileMissing)
    assert missing.value.errno == errno.ENOENT
    with pytest.raises(FileRefused) as refused:
        files.open("/n2")
    assert refused.value.errno == errno.EISDIR
    with pytest.raises(FileExistsError) as there:
        files.open("/n2/file", "x")
    assert isinstance(there.value, FileThere)
    with pytest.raises(PermissionError):
        files.read_bytes("/n2/../n1/x")
    with pytest.raises(BadArgument):
        files.open_descriptor("/n2/file", "nonsense")


def test_big_files_go_in_pieces(nodes: list[Node], tmp_path: Path) -> None:
    """Contents around the size of a piece come back whole by every way of moving them."""
    files = nodes[0].files
    generator = random.Random(1)
    for size in (0, 1, 1 << 20, FILE_CHUNK_BYTES - 1, FILE_CHUNK_BYTES + 1, 5 * FILE_CHUNK_BYTES + 7):
        data = generator.randbytes(size)
        assert files.write_bytes("/n2/big", data, durable=True) == size
        assert files.read_bytes("/n2/big") == data
        assert files.get("/n2/big", tmp_path / "local") == size
        assert (tmp_path / "local").read_bytes() == data
        assert files.put(tmp_path / "local", "/pool/big", durable=True) == size
        descriptor = files.open_descriptor("/pool/big", "r+")
        assert files.read(descriptor, size + 100, 0) == data
        assert files.read(descriptor, size, 1) == data[1:]
        assert files.write(descriptor, memoryview(data), size) == size
        assert files.read(descriptor, 3 * size, 0) == data + data
        files.truncate(descriptor, 0)
        files.close(descriptor)
    assert files.stats()["open"] == 0


def test_names(nodes: list[Node]) -> None:
    """ls, stat, exists, mkdir, rename and remove say what is there."""
    files = nodes[0].files
    assert [item.name for item in files.ls()] == ["n1", "n2", "n3", "pool"]
    files.mkdir("/n2/a/b")
    files.mkdir("/n2/a/b", exist_ok=True)
    with pytest.raises(FileThere):
        files.mkdir("/n2/a/b")
    files.write_text("/n2/a/file", "é")
    with pytest.raises(FileThere):
        files.mkdir("/n2/a/file", exist_ok=True)
    assert [(item.name, item.is_directory, item.size) for item in files.ls("/n2/a")][1] == ("file", False, 2)
    assert (files.stat("/n2/a/file").kind, files.stat("/n2/a").is_directory) == ("file", True)
    files.rename("/n2/a/file", "/n2/c/file")
    assert (files.exists("/n2/a/file"), files.exists("/n2/c/file")) == (False, True)
    assert files.read_text("/n2/c/file") == "é"
    files.remove("/n2/c/file")
    files.remove("/n2/c")
    odd = os.fsdecode(b"caf\xe9")
    files.write_bytes(f"/n2/odd/{odd}", b"1")
    assert [item.name for item in files.ls("/n2/odd")] == [odd]


def test_sync_reaches_the_disk_through_every_layer(nodes: list[Node]) -> None:
    """sync flushes text and buffers and then has the node fsync."""
    files = nodes[0].files
    for mode, data in (("w", "text"), ("wb", b"bytes"), ("r+b", b"again")):
        with files.open("/n1/durable", mode) as file:
            file.write(data)
            files.sync(file)
            assert len(files.read_bytes("/n1/durable")) == 5 - (mode == "w")
    assert files.stats()["syncs"] == 3


class CutShort:
    """A runner whose node writes at most so many bytes at a time, then none: a disk that fills up."""

    def __init__(self, room: int, most: int) -> None:
        self.room, self.most = room, most
        self.stored = bytearray()

    def run(self, call: Any) -> Any:
        name, _descriptor, data, position = call.request
        assert (name, position) == ("VIRGO_WRITE", len(self.stored))
        count = min(len(data), self.room, self.most)
        if data and not count:
            raise DiskFull("no room")
        self.room -= count
        self.stored += data[:count]
        return count

    def run_many(self, many: list[Any]) -> list[Any]:
        raise AssertionError


@pytest.mark.parametrize("most", [1 << 30, FILE_CHUNK_BYTES, 1_000_000])
@pytest.mark.parametrize("room", [0, 1, FILE_CHUNK_BYTES, FILE_CHUNK_BYTES + 1, 3 * FILE_CHUNK_BYTES])
def test_a_count_is_never_more_than_was_written(room: int, most: int) -> None:
    """`write` counts exactly; `write_bytes` raises unless all was written."""
    data = random.Random(2).randbytes(2 * FILE_CHUNK_BYTES + 5)
    runner = CutShort(room, most)
    try:
        assert calls.drive(runner, calls.writing(1, data, 0)) == len(runner.stored)
    except DiskFull:
        assert room == 0
    runner = CutShort(room, most)
    if room < len(data):
        with pytest.raises(DiskFull):
            calls.drive(runner, calls.writing_whole(1, data, 0))
    else:
        assert calls.drive(runner, calls.writing_whole(1, data, 0)) == len(data)
    assert runner.stored == data[:room]


def test_close_says_what_the_node_says(nodes: list[Node]) -> None:
    """An error of closing reaches the program, once, and the object is closed all the same."""
    files = nodes[0].files
    file = files.open("/n1/file", "wb", buffering=0)
    files.close(file.descriptor)
    with pytest.raises(VirgoError):
        file.close()
    assert file.closed
    file.close()
    assert "closed" in repr(file)
