"""The table of open files: it outlives the process, bounds what the kernel holds, mixes nothing up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from virgo.errors import BadDescriptor, Busy, FileMissing
from virgo.files import core, journal
from virgo.files.core import Spot
from virgo.files.descriptors import DescriptorTable
from virgo.files.local import LocalFiles
from virgo.limits import DESCRIPTOR_IDLE_FULL_S, DESCRIPTOR_IDLE_S, DESCRIPTOR_SERIALS_RESERVED
from virgo.members import compose_id, node_of

NUMBER = 7


def make_files(directory: Path, **bounds: Any) -> LocalFiles:
    root = directory / "root"
    root.mkdir(parents=True, exist_ok=True)
    files = LocalFiles({"": str(root)}, [])
    files.table = DescriptorTable(directory / "table/journal", number=NUMBER, reopen=files.reopen, **bounds)
    return files


def open_file(files: LocalFiles, path: str, mode: str = "w+") -> int:
    return files.open(Spot("", path), core.parse_mode(mode), path)


WRITER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_files_descriptors import make_files, open_file
files = make_files(Path(sys.argv[1]))
kept = open_file(files, "kept", "w+")
log = open_file(files, "log", "a")
closed = open_file(files, "closed", "w+")
files.close(closed)
files.write(kept, b"acknowledged", 0)
print(kept, log, closed, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_descriptors_survive_kill_9(tmp_path: Path) -> None:
    """After kill -9 open descriptors go on with mode and content; closed ones stay closed."""
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept, log, closed = map(int, done.stdout.split())
    files = make_files(tmp_path)
    assert files.read(kept, 100, 0) == b"acknowledged"
    assert files.write(kept, b"A", 0) == 1
    assert files.write(log, b"one", 0) + files.write(log, b"two", 0) == 6
    assert (tmp_path / "root/log").read_bytes() == b"onetwo"
    for use in (lambda: files.read(closed, 1, 0), lambda: files.close(closed)):
        with pytest.raises(BadDescriptor):
            use()
    assert node_of(open_file(files, "new")) == NUMBER
    assert open_file(files, "newer") not in (kept, log, closed)
    files.table.shut()


def test_a_descriptor_is_never_given_twice(tmp_path: Path) -> None:
    """Serials rise over any number of lives, also when the end of the journal is lost."""
    seen: set[int] = set()
    journal = tmp_path / "table/journal"
    for _life in range(5):
        files = make_files(tmp_path)
        given = [open_file(files, "file") for _ in range(3)]
        assert not seen & set(given)
        assert all(item > 0 for item in given)
        assert min(given) > max(seen, default=0)
        seen.update(given)
        files.table.shut()
        lines = journal.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if b"reserved" in line]  # what fsync had put on the disk
        journal.write_bytes(b"".join(kept) + lines[-1][:10])
    assert max(seen) < compose_id(NUMBER, 6 * DESCRIPTOR_SERIALS_RESERVED)


@pytest.mark.parametrize("damage", [b"\0" * 4096, b'{"serial":', b"garbage\n\n{}\n[1,2]\n", b"\xff\xfe\n"])
def test_a_damaged_journal_keeps_what_is_whole(tmp_path: Path, damage: bytes) -> None:
    """A torn or overwritten end costs the lines it hit, and is counted."""
    files = make_files(tmp_path)
    kept = open_file(files, "kept")
    files.write(kept, b"data", 0)
    files.table.shut()
    with (tmp_path / "table/journal").open("ab") as journal:
        journal.write(damage)
    files = make_files(tmp_path)
    assert files.table.stats()["damaged_lines"] > 0
    assert files.read(kept, 10, 0) == b"data"
    second = open_file(files, "second")
    files.table.shut()
    files = make_files(tmp_path)
    assert files.table.stats()["damaged_lines"] == 0
    assert set(files.table.entries()) == {kept, second}
    files.table.shut()


def test_the_kernel_holds_only_so_many(tmp_path: Path) -> None:
    """Beyond the bound the least recently used are let go and come back on use, with their content."""
    files = make_files(tmp_path, live_max=4)
    opened = [open_file(files, f"file{index}") for index in range(20)]
    for index, descriptor in enumerate(opened):
        files.write(descriptor, b"%d" % index, 0)
        assert files.table.stats()["live"] <= 4
    for index, descriptor in enumerate(opened):
        assert files.read(descriptor, 10, 0) == b"%d" % index
    stats = files.table.stats()
    assert stats["open"] == 20
    assert stats["reopened"] >= 32
    files.table.shut()
    assert len(list(Path("/proc/self/fd").iterdir())) < 40


def test_too_many_descriptors_are_refused_before_anything_is_truncated(tmp_path: Path) -> None:
    """At the bound opening is Busy, the file is as it was, and closing makes room."""
    files = make_files(tmp_path, descriptors_max=2)
    first = open_file(files, "first")
    files.write(first, b"content", 0)
    open_file(files, "second")
    with pytest.raises(Busy, match="VIRGO_CLOSE"):
        open_file(files, "first", "w")
    assert (tmp_path / "root/first").read_bytes() == b"content"
    files.close(first)
    open_file(files, "first", "r")
    files.table.shut()


def test_a_removed_file_stays_readable_while_it_is_held(tmp_path: Path) -> None:
    """Unlinked files are let go last, since nothing could open them again."""
    files = make_files(tmp_path, live_max=4)
    removed = open_file(files, "removed")
    files.write(removed, b"still here", 0)
    files.remove(Spot("", "removed"), "removed")
    for index in range(20):
        open_file(files, f"file{index}")
    assert files.read(removed, 20, 0) == b"still here"
    files.table.shut()


@pytest.mark.parametrize("replace", [False, True])
def test_another_file_is_never_taken_for_the_open_one(tmp_path: Path, replace: bool) -> None:
    """If the file is gone or replaced while the node is down, its descriptor says so."""
    files = make_files(tmp_path)
    descriptor = open_file(files, "file")
    files.write(descriptor, b"mine", 0)
    files.table.shut()
    (tmp_path / "root/file").unlink()
    if replace:
        (tmp_path / "root/file").write_bytes(b"other")
    files = make_files(tmp_path)
    with pytest.raises(BadDescriptor if replace else FileMissing, match="replaced" if replace else "gone"):
        files.read(descriptor, 4, 0)
    with pytest.raises((BadDescriptor, FileMissing)):
        files.write(descriptor, b"evil", 0)
    files.close(descriptor)
    files.table.shut()


def test_open_files_follow_a_rename(tmp_path: Path) -> None:
    """A descriptor is found under the new name of its file, or of a directory above, also after a restart."""
    files = make_files(tmp_path)
    one, two = open_file(files, "old/a"), open_file(files, "old/deep/b")
    other = open_file(files, "older")
    files.write(two, b"two", 0)
    files.rename(Spot("", "old"), Spot("", "new/place"), "old")
    files.table.shut()
    files = make_files(tmp_path)
    assert {files.table.entries()[item].path for item in (one, two, other)} == {
        "new/place/a",
        "new/place/deep/b",
        "older",
    }
    assert files.read(two, 10, 0) == b"two"
    files.table.shut()


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Any bytes that the kernel takes as a name survive the journal."""
    files = make_files(tmp_path)
    name = os.fsdecode(b"caf\xe9 \x01\xff")
    descriptor = open_file(files, name)
    files.write(descriptor, b"x", 0)
    files.table.shut()
    files = make_files(tmp_path)
    assert files.read(descriptor, 1, 0) == b"x"
    assert files.table.entries()[descriptor].path == name
    files.table.shut()


def test_the_journal_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening and closing without end keeps the journal short, and what is open is kept."""
    monkeypatch.setattr(journal, "DESCRIPTOR_LINES_SPARE_MAX", 50)
    files = make_files(tmp_path)
    kept = open_file(files, "kept")
    for _ in range(300):
        files.close(open_file(files, "file"))
    assert files.table.stats()["journal_lines"] <= 60
    files.table.shut()
    files = make_files(tmp_path)
    assert set(files.table.entries()) == {kept}
    files.table.shut()


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def check_expired(files: LocalFiles, descriptor: int, idle_s: float) -> None:
    """Every use of it says that it has expired, and what to do."""
    for use in (
        lambda: files.read(descriptor, 1, 0),
        lambda: files.read_cached(descriptor, 1, 0),
        lambda: files.write(descriptor, b"x", 0),
        lambda: files.close(descriptor),
    ):
        with pytest.raises(BadDescriptor, match=f"has expired: nobody used it for {idle_s:g} s") as caught:
            use()
        assert "Open the path again" in caught.value.hint


def test_what_nobody_uses_for_a_day_expires(tmp_path: Path) -> None:
    """Open in the kernel or not, it is closed for good and says so; what was used meanwhile goes on."""
    clock = Clock()
    files = make_files(tmp_path, live_max=2, clock=clock)
    opened = [open_file(files, f"file{index}") for index in range(5)]
    for descriptor in opened:
        files.write(descriptor, b"content", 0)
    clock.now += DESCRIPTOR_IDLE_S - 1
    files.table.expire()
    assert set(files.table.entries()) == set(opened)
    for descriptor in (opened[0], opened[4]):  # one asleep, one live
        files.read(descriptor, 1, 0)
    clock.now += 2
    files.table.expire()
    assert set(files.table.entries()) == {opened[0], opened[4]}
    assert (files.table.stats()["expired"], files.table.stats()["live"]) == (3, 2)
    for descriptor in opened[1:4]:
        check_expired(files, descriptor, DESCRIPTOR_IDLE_S)
    assert files.read(opened[0], 9, 0) == b"content"
    assert held(tmp_path / "root") == 2
    assert (tmp_path / "root/file1").read_bytes() == b"content"
    files.table.shut()
    files = make_files(tmp_path, clock=clock)
    assert set(files.table.entries()) == {opened[0], opened[4]}
    clock.now += DESCRIPTOR_IDLE_S + 1
    files.table.expire()
    assert not files.table.entries()
    assert held(tmp_path / "root") == 0
    files.table.shut()


def held(directory: Path) -> int:
    """How many files below the directory this process has open in the kernel."""
    places = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            places.append(link.readlink())
    return sum(place.is_relative_to(directory) for place in places)


def test_a_full_table_gives_the_place_of_the_least_recently_used(tmp_path: Path) -> None:
    """Only of one that has been idle for ten minutes; before that, opening is Busy."""
    clock = Clock()
    files = make_files(tmp_path, descriptors_max=3, live_max=2, clock=clock)
    first, second, third = (open_file(files, name) for name in ("first", "second", "third"))
    clock.now += DESCRIPTOR_IDLE_FULL_S - 1
    files.read(first, 1, 0)
    with pytest.raises(Busy, match=r"used in the last 600 s"):
        open_file(files, "fourth")
    assert not (tmp_path / "root/fourth").exists()
    clock.now += 2
    fourth = open_file(files, "fourth")
    fifth = open_file(files, "fifth")
    assert set(files.table.entries()) == {first, fourth, fifth}
    for descriptor in (second, third):
        check_expired(files, descriptor, DESCRIPTOR_IDLE_FULL_S)
    with pytest.raises(Busy):
        open_file(files, "sixth")
    files.table.shut()


def test_what_is_being_used_does_not_expire(tmp_path: Path) -> None:
    """However long a read takes, its descriptor is in use."""
    clock = Clock()
    files = make_files(tmp_path, clock=clock)
    descriptor = open_file(files, "file")
    with files.table.use(descriptor):
        clock.now += 2 * DESCRIPTOR_IDLE_S
        files.table.expire()
    assert files.read(descriptor, 1, 0) == b""
    files.table.shut()


@pytest.mark.parametrize(
    "identifier", [0, -1, 1, 1 << 62, compose_id(NUMBER, 12345), compose_id(8, 1), -(1 << 63)]
)
def test_what_was_never_opened(tmp_path: Path, identifier: int) -> None:
    """Unknown numbers and those of other nodes are BadDescriptor for every use."""
    files = make_files(tmp_path)
    uses: list[Callable[[], object]] = [
        lambda: files.read(identifier, 1, 0),
        lambda: files.read_cached(identifier, 1, 0),
        lambda: files.write(identifier, b"x", 0),
        lambda: files.close(identifier),
        lambda: files.sync(identifier),
    ]
    for use in uses:
        with pytest.raises(BadDescriptor):
            use()
    files.table.shut()


def test_no_kernel_descriptor_is_closed_under_a_reader(tmp_path: Path) -> None:
    """Threads that read while others open, close and evict never see another file's bytes."""
    files = make_files(tmp_path, live_max=2)
    opened = [open_file(files, f"file{index}") for index in range(6)]
    for index, descriptor in enumerate(opened):
        files.write(descriptor, bytes([index]) * 5000, 0)
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for step in range(300):
                index = (seed * 31 + step * 7) % 6
                if set(files.read(opened[index], 5000, 0)) != {index}:
                    wrong.append(index)
                if step % 10 == 0:
                    files.close(open_file(files, f"other{seed}"))
        except Exception as error:  # noqa: BLE001 - shown by the assertion below
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert files.table.stats()["live"] <= 2
    files.table.shut()
