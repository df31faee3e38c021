"""The ground of a store: blocks are there before pages are used, and a file is never cut off."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from virgo.errors import DiskFull
from virgo.limits import MiB
from virgo.memory.ground import Ground, opening
from virgo.memory.keyspace import stored_key
from virgo.memory.store import Store

ROOT = pytest.mark.skipif(os.getuid() != 0 and not os.environ.get("CI"), reason="mounting needs root")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", mount], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)


def put(store: Store, key: str, value: bytes) -> None:
    with store.batching() as batch:
        batch.put_plain(stored_key(key.encode()), value)


def get(store: Store, key: str) -> bytes | None:
    with store.batching() as batch:
        record = batch.key(stored_key(key.encode()))
    return None if record is None else record[9:]


@ROOT
@pytest.mark.parametrize("size", [100, 5_000, 1 * MiB])
def test_a_disk_that_fills_up_is_an_error_and_no_signal(small: Path, size: int) -> None:
    """Whatever is set: DiskFull, all earlier values whole; it goes on with what is freed, and with room."""
    store = Store(small / "memory", capacity_bytes=512 * MiB)
    assert store.ground is not None, "it is written through the map"
    (small / "other").write_bytes(bytes(4 * MiB))
    stored = 0
    with pytest.raises(DiskFull):
        while True:
            with store.batching() as batch:
                for number in range(stored, stored + 20):
                    batch.put_plain(stored_key(b"k%d" % number), b"%020d" % number + bytes(size - 20))
            stored += 20
    assert stored * size > 10 * MiB
    for number in range(0, stored, max(1, stored // 500)):
        assert get(store, f"k{number}") == b"%020d" % number + bytes(size - 20)
    with pytest.raises(DiskFull):
        put(store, "large", bytes(60 * MiB))
    for number in range(stored // 2):
        with store.batching() as batch:
            assert batch.delete_key(stored_key(b"k%d" % number))
    for number in range(stored // 4 if size < MiB else 0):
        put(store, f"again{number}", bytes(size))
    store.attend()
    if size == MiB:  # by system calls freed pages serve for long values, too
        for number in range(stored // 4):
            put(store, f"again{number}", bytes(size))
    (small / "other").unlink()
    store.attend()
    put(store, "after", b"v" * size)
    assert get(store, "after") == b"v" * size
    assert get(store, f"k{stored - 1}") == b"%020d" % (stored - 1) + bytes(size - 20)
    store.close()


@ROOT
def test_a_disk_that_fills_up_under_a_client(small: Path) -> None:
    """A process that writes by mapping gets the error too; what it did before is whole."""
    store = Store(small / "memory", capacity_bytes=512 * MiB)
    code = (
        "import sys; from virgo.memory.mapped import Mapped; from virgo.errors import DiskFull\n"
        "from virgo.memory.keyspace import stored_key\n"
        "mapped = Mapped(sys.argv[1], sys.argv[2], int(sys.argv[3])); number = 0\n"
        "try:\n"
        "    while True:\n"
        "        mapped.change(lambda batch: batch.put_plain(stored_key(b'k%d' % number), bytes(30_000)))\n"
        "        number += 1\n"
        "except DiskFull: print(number)\n"
    )
    arguments = [str(store.directory), store.identity, str(store.map_bytes)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    count = int(done.stdout)
    assert count * 30_000 > 10 * MiB
    assert all(get(store, f"k{number}") == bytes(30_000) for number in range(count))
    store.close()


def test_ground_is_taken_in_steps_and_known_again(tmp_path: Path) -> None:
    """What was taken is there as blocks, also for who looks later; never more than the file may have."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    ground = Ground(path, 30 * MiB)
    assert ground.taken == 0
    ground.take(1)
    assert 8 * MiB < ground.taken < 10 * MiB
    ground.take(20 * MiB)
    assert path.stat().st_blocks * 512 >= ground.taken >= 20 * MiB
    later = Ground(path, 30 * MiB)
    assert ground.taken - 2 * MiB <= later.taken <= ground.taken
    later.take(100 * MiB)
    assert later.taken == 30 * MiB == path.stat().st_size


def test_many_small_changes_take_no_more_ground_than_they_need(tmp_path: Path) -> None:
    """A batch of many keys is not taken for as many new pages."""
    store = Store(tmp_path / "memory", capacity_bytes=512 * MiB)
    with store.batching() as batch:
        for number in range(50_000):
            batch.put_plain(stored_key(b"k%d" % number), b"v" * 20)
    for _ in range(3):
        for number in range(0, 50_000, 50):
            put(store, f"k{number}", b"w" * 20)
    assert store.file_bytes() < 64 * MiB
    store.close()


def test_a_file_is_never_cut_off(tmp_path: Path) -> None:
    """A smaller pool, or a client that knows a smaller one, opens it as long as it is."""
    store = Store(tmp_path / "memory", capacity_bytes=64 * MiB)
    put(store, "k", b"v" * 1000)
    identity, long = store.identity, (tmp_path / "memory" / "data.mdb").stat().st_size
    store.close()
    code = (
        "import sys; from virgo.memory.mapped import Mapped\n"
        "from virgo.memory.keyspace import stored_key\n"
        "print(len(Mapped(sys.argv[1], sys.argv[2], 1 << 20).key(stored_key(b'k'))))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "memory"), identity]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "1000\n"
    assert (tmp_path / "memory" / "data.mdb").stat().st_size == long
    store = Store(tmp_path / "memory", capacity_bytes=16 * MiB)
    assert (tmp_path / "memory" / "data.mdb").stat().st_size == long == store.map_bytes
    store.close()


def test_who_opens_waits_for_the_owner(tmp_path: Path) -> None:
    """The length that a client sees is the one with which the owner opens."""
    with opening(tmp_path, alone=False), opening(tmp_path, alone=False) as length:
        assert length == 0
        code = (
            "import fcntl, os, sys\n"
            "descriptor = os.open(sys.argv[1], os.O_RDWR)\n"
            "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "opening")]
        assert subprocess.run(command, capture_output=True).returncode == 1
