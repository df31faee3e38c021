"""Segments: processes that read, write and lease one file, and are killed, stopped, forked at it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from virgo.errors import Busy, DiskFull, NotRunning
from virgo.limits import MiB
from virgo.memory import segments
from virgo.memory.leases import Lease, View
from virgo.memory.segments import Segment, total_bytes

KILLS = int(os.environ.get("VIRGO_TEST_KILLS", "15"))
IDENTITY = uuid.uuid4().hex
SIZE = 300_000


@pytest.fixture
def segment(tmp_path: Path) -> Segment:
    made = Segment(str(tmp_path), IDENTITY, 7, SIZE)
    made.create()
    return made


def pattern(number: int) -> bytes:
    """A value that tells, at any place, which one it is, and how long it has to be."""
    return (b"%07d," % number * (SIZE // 8))[: 8 + number * 7919 % (SIZE - 8)]


PATTERN = f"""
SIZE = {SIZE}
def pattern(number):
    return (b"%07d," % number * (SIZE // 8))[: 8 + number * 7919 % (SIZE - 8)]
"""
WRITER = f"""
import sys
from virgo.errors import Busy
from virgo.memory.segments import Segment
{PATTERN}
segment = Segment(sys.argv[1], {IDENTITY!r}, 7, SIZE)
number, step = int(sys.argv[2]), int(sys.argv[3])
while True:
    number += step
    segment.write(pattern(number))
    sys.stdout.write(f"{{number}}\\n")
    sys.stdout.flush()
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_new_one_is_empty_and_has_all_its_pages(tmp_path: Path) -> None:
    """It reads as b"", or if made full as zeros; its blocks are there; another of its name is refused."""
    for identifier, full in ((1, False), (2, True)):
        made = Segment(str(tmp_path), IDENTITY, identifier, 10_000)
        made.create(full=full)
        assert made.read() == (bytes(10_000) if full else b"")
        found = Path(made.path).stat()
        assert found.st_size == total_bytes(10_000) and found.st_blocks * 512 >= found.st_size
        assert found.st_mode & 0o777 == 0o600
        with pytest.raises(OSError, match="EEXIST"):
            made.create()
        for other in (
            Segment(str(tmp_path), uuid.uuid4().hex, identifier, 10_000),
            Segment(str(tmp_path), IDENTITY, identifier, 9_999),
            Segment(str(tmp_path), IDENTITY, 3, 10_000),
        ):
            with pytest.raises(NotRunning):
                other.read()


def test_gets_are_never_torn(segment: Segment) -> None:
    """While processes set it as fast as they can, each read is the whole of one of the values."""
    segment.write(pattern(0))
    writers = [start(WRITER, Path(segment.path).parent, base, 2) for base in (0, 1)]
    try:
        seen: set[int] = set()
        began = time.monotonic()
        while time.monotonic() - began < 2 or (len(seen) < 20 and time.monotonic() - began < 20):
            value = segment.read()
            number = int(value[:7])
            assert value == pattern(number), "torn"
            seen.add(number)
        assert {number % 2 for number in seen} == {0, 1}, "both get their turn"
        assert len(seen) >= 20
    finally:
        end(*writers)


def test_kill_9_of_writers_leaves_whole_values(segment: Segment) -> None:
    """Killed at any moment, a writer leaves its last acknowledged value or the next, whole; others go on."""
    chance = random.Random(7)
    last = 0
    segment.write(pattern(0))
    for _ in range(KILLS):
        writer = start(WRITER, Path(segment.path).parent, last, 1)
        assert writer.stdout is not None and writer.stdout.readline()
        time.sleep(chance.random() * 0.02)
        writer.kill()
        acknowledged = [int(line) for line in writer.stdout if line.endswith("\n")]
        end(writer)
        value = segment.read()
        number = int(value[:7])
        assert value == pattern(number), "torn"
        assert number >= (acknowledged or [last])[-1]
        last = number + 1
        segment.write(pattern(last))
    segment.finish()
    assert list(Path(segment.path).parent.iterdir()) == [Path(segment.path)]


@contextlib.contextmanager
def dying(step: int) -> Iterator[None]:
    """Die by SIGKILL in the middle of the write, or before the removal, of that number."""
    counts = 0
    really = os.pwrite, os.unlink

    def die(work: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal counts
        counts += 1
        if counts == step:
            if work is really[0]:
                descriptor, data, offset = arguments
                # What is within a page is written as one, so the kernel writes all or nothing of it.
                whole = offset % 4096 + len(data) <= 4096
                work(descriptor, bytes(data)[: 0 if whole else len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*arguments)

    os.pwrite = lambda *arguments: die(really[0], *arguments)  # type: ignore[assignment]
    os.unlink = lambda *arguments: die(really[1], *arguments)  # type: ignore[assignment]
    try:
        yield
    finally:
        os.pwrite, os.unlink = really


OLD = b"old" * 5000
CHANGES: dict[str, tuple[bytes, int | None]] = {
    "a longer value": (b"new" * 50_000, None),
    "a shorter value": (b"new" * 50, None),
    "no value": (b"", None),
    "a part": (b"new" * 5000, 1500),
    "a part of a page": (b"new", 5000),
    "behind the end": (b"new" * 1000, 200_000),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_kill_9_at_each_step(segment: Segment, kind: str) -> None:
    """After a kill at any step the value is the old or the new one, for the next reader and writer."""
    data, offset = CHANGES[kind]
    front = OLD[:offset].ljust(offset or 0, b"\0")
    new = data if offset is None else front + data + OLD[offset + len(data) :]
    segment.write(b"before" * 40_000)
    for step in range(1, 30):
        segment.write(OLD)
        child = os.fork()
        if child == 0:
            with dying(step):
                segment.write(data, offset)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = segment.read()
        assert found in (OLD, new), f"torn at step {step}"
        if ended == 0:
            assert found == new
            break
        segment.write(b"x", len(found) - 1 if found else 0)  # the next writer gets its turn at once
        assert segment.read()[:-1] == found[:-1]
    assert step > 1


def test_a_mapping_shows_no_half_of_what_a_killed_writer_wrote(segment: Segment) -> None:
    """After a kill at any step what is mapped then is the old or the new value, whoever looks first."""
    new = b"new" * 50_000
    for step in range(1, 10):
        segment.write(OLD)
        child = os.fork()
        if child == 0:
            with dying(step):
                segment.write(new)
            os._exit(0)
        os.waitpid(child, 0)
        assert bytes(View(segment, write=False, timeout_s=0).hold()) in (OLD, new), f"torn at step {step}"


def test_a_stopped_writer_is_busy_and_no_hang(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is stopped in the middle of a write makes others Busy in bounded time; then it goes on."""
    monkeypatch.setattr(segments, "MEMORY_SEGMENT_WAIT_S", 0.2)
    segment.write(OLD)
    stop = "import os, signal, virgo.memory.segments as s; s._fill = lambda *_: os.kill(os.getpid(), 19)"
    program = WRITER.replace("while True:", f"{stop}\nwhile True:")
    writer = start(program, Path(segment.path).parent, 0, 1)
    try:
        os.waitid(os.P_PID, writer.pid, os.WSTOPPED)
        for work in (segment.read, lambda: segment.write(b"x"), lambda: segment.lease(0.0)):
            began = time.monotonic()
            with pytest.raises(Busy) as caught:
                work()
            assert time.monotonic() - began < 2 and caught.value.hint
        writer.send_signal(signal.SIGCONT)
        assert writer.stdout is not None and writer.stdout.readline() == "1\n"
        os.waitid(os.P_PID, writer.pid, os.WSTOPPED)
        writer.kill()
        writer.wait()
        assert segment.read() in (pattern(1), pattern(2))
    finally:
        end(writer)


HOLDER = f"""
import sys, time
from virgo.memory.leases import Lease
from virgo.memory.segments import Segment
segment = Segment(sys.argv[1], {IDENTITY!r}, 7, {SIZE})
lease = Lease(segment)
lease.acquire()
memory = segment.map(write=True)
print("held", flush=True)
number = 0
while True:
    number = (number + 1) % 256
    memory[:] = bytes([number]) * {SIZE}
"""


def test_kill_9_of_a_writer_in_place_frees_its_lease_at_once(segment: Segment) -> None:
    """In the middle of writing in place it is killed: the next one has the lease, and the others go on."""
    lease = Lease(segment)
    for _ in range(5):
        holder = start(HOLDER, Path(segment.path).parent)
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            with pytest.raises(Busy, match=str(holder.pid)):
                lease.acquire()
            with pytest.raises(Busy):
                segment.write(b"x")
            assert len(segment.read()) == SIZE, "reading needs no lease"
            holder.kill()
            holder.wait()
            began = time.monotonic()
            lease.acquire()
            assert time.monotonic() - began < 0.1
            lease.release()
            segment.write(b"whole")
            assert segment.read() == b"whole"
        finally:
            end(holder)


def test_leases_exclude_threads_too(segment: Segment) -> None:
    """Of threads with a lease object each, one holds it at a time; a waiting one gets it in its time."""
    inside, most, done = 0, 0, 0
    mutex = threading.Lock()

    def work() -> None:
        nonlocal inside, most, done
        lease = Lease(segment)
        for _ in range(20):
            lease.acquire(20)
            with mutex:
                inside += 1
                most = max(most, inside)
            time.sleep(0.001)
            with mutex:
                inside, done = inside - 1, done + 1
            lease.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, done) == (1, 80)


def test_one_lease_of_two_threads_is_no_two(segment: Segment) -> None:
    """A second `acquire` of one object waits for its release, and is Busy if that does not come."""
    lease = Lease(segment)
    lease.acquire()
    with pytest.raises(Busy):
        lease.acquire(0.05)
    threading.Timer(0.1, lease.release).start()
    lease.acquire(5)
    lease.release()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_no_lease(segment: Segment) -> None:
    """A child of the holder is not one, and does not keep the lease when the holder lets go."""
    lease = Lease(segment)
    lease.acquire()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        verdict = b"held" if lease.held else b"free"
        try:
            Lease(segment).acquire()
            verdict += b" taken"
        except Busy:
            verdict += b" busy"
        os.write(write, verdict)
        time.sleep(60)
    try:
        assert os.read(read, 100) == b"free busy"
        assert lease.held
        lease.release()
        other = Lease(segment)
        other.acquire()
        other.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_children_forked_during_writes_keep_nobody_out(segment: Segment) -> None:
    """Forks while another thread writes leave children without its locks."""
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            segment.write(pattern(number))

    thread = threading.Thread(target=write)
    thread.start()
    children = []
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                time.sleep(60)
            children.append(child)
            time.sleep(0.002)
    finally:
        stop.set()
        thread.join()
    try:
        segment.write(b"nobody is in the way")
        Lease(segment).acquire()
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")
def test_another_user_does_not_get_at_it(segment: Segment) -> None:
    """What is not ours to open is for the node to decide."""
    segment.write(b"private")
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            segment.read()
        except NotRunning:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_who_has_it_mapped_keeps_the_pages(segment: Segment) -> None:
    """Removed under a mapping and a view, it is still there for these, and for nobody else."""
    memory = segment.map(write=True)
    memory[:3] = b"abc"
    segment.remove()
    memory[SIZE - 1] = 7
    assert memory[:3] == b"abc" and memory[SIZE - 1] == 7
    for work in (segment.read, segment.map, lambda: segment.write(b"x"), lambda: segment.lease(1.0)):
        with pytest.raises(NotRunning):
            work()
    segment.remove()


@pytest.mark.skipif(os.getuid() != 0 and not os.environ.get("CI"), reason="mounting needs root")
def test_a_full_file_system_is_an_error_and_leaves_all_as_it_was(tmp_path: Path) -> None:
    """No room for another one, or for what is written: DiskFull, nothing half made, no SIGBUS in place."""
    mount = tmp_path / "tiny"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mount], check=True)
    try:
        first = Segment(str(mount), IDENTITY, 1, 2 * MiB)
        first.create()
        first.write(b"first" * 200_000)
        with pytest.raises(DiskFull) as caught:
            Segment(str(mount), IDENTITY, 2, 3 * MiB).create()
        assert "memory.shared_directory" in caught.value.hint
        assert list(mount.iterdir()) == [Path(first.path)]
        filler = mount / "filler"  # somebody else fills it under us
        with contextlib.suppress(OSError), filler.open("wb") as file:
            file.write(bytes(4 * MiB))
        with pytest.raises(DiskFull):
            first.write(b"second" * 200_000)
        assert first.read() == b"first" * 200_000
        lease = Lease(first)
        lease.acquire()
        memory = first.map(write=True)
        memory[:] = b"x" * (2 * MiB)
        assert first.read() == b"x" * (2 * MiB)
        lease.release()
        filler.unlink()
        first.write(b"second" * 200_000)
        assert first.read() == b"second" * 200_000
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)
