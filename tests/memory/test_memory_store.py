"""One node's store: batches, room, serials, and what it survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from virgo.errors import Busy, DiskFull, PoolFull
from virgo.limits import MEMORY_SERIALS_BLOCK, MiB
from virgo.memory import keyspace
from virgo.memory.batch import Batch
from virgo.memory.core import Region
from virgo.memory.keyspace import Entry
from virgo.memory.life import LifeFile
from virgo.memory.store import Store

CAPACITY = 16 * MiB


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store(tmp_path / "memory", capacity_bytes=CAPACITY)
    yield found
    found.close()


def reopen(store: Store) -> Store:
    store.close()
    return Store(store.directory, capacity_bytes=CAPACITY)


def key(name: str) -> bytes:
    return keyspace.stored_key(name.encode())


def put(store: Store, name: str, value: bytes, expires_ms: int = 0) -> None:
    with store.batching() as batch:
        batch.put_entry(key(name), Entry(value, expires_ms))


def value(batch: Batch, name: str) -> bytes | None:
    record = batch.key(key(name))
    return None if record is None else keyspace.decode_entry(record).value


def get(store: Store, name: str) -> bytes | None:
    with store.batching() as batch:
        return value(batch, name)


def test_a_batch_sees_its_own_changes(store: Store) -> None:
    """A get after a set in the same chunk sees the set; others see it only after close."""
    batch = store.batch()
    assert batch.key(key("a")) is None
    batch.put_plain(key("a"), b"1")
    assert value(batch, "a") == b"1"
    assert get(store, "a") is None
    batch.close()
    assert get(store, "a") == b"1"


def test_an_aborted_batch_leaves_nothing(store: Store) -> None:
    """Neither values, nor serials, nor declared bytes of a failed block remain."""
    with pytest.raises(ZeroDivisionError), store.batching() as batch:
        batch.put_plain(key("a"), b"1")
        batch.declare(100)
        batch.next_serial()
        raise ZeroDivisionError
    assert get(store, "a") is None
    assert (store.state.serial, store.state.declared_bytes) == (0, 0)


def test_declared_bytes_are_reserved(store: Store) -> None:
    """What is declared counts though nothing was set; beyond the capacity it is PoolFull."""
    with store.batching() as batch:
        batch.declare(CAPACITY)
        batch.put_region(1, Region(CAPACITY))
    with store.batching() as batch:
        assert batch.room_bytes() <= 0
        with pytest.raises(PoolFull):
            batch.declare(1)
    with pytest.raises(PoolFull):
        put(store, "a", b"x" * 10_000)
    with store.batching() as batch:
        batch.delete_region(1, Region(CAPACITY))
    put(store, "a", b"x" * 10_000)


def test_a_full_pool_takes_values_that_are_no_longer(store: Store) -> None:
    """A key may be replaced by one of its size in a full pool; a longer one is PoolFull, the old stays."""
    with pytest.raises(PoolFull):
        for number in range(10_000):
            put(store, f"k{number}", b"x" * 8000)
    put(store, "k0", b"y" * 8000)
    with pytest.raises(PoolFull):
        put(store, "k0", b"z" * 80_000)
    assert get(store, "k0") == b"y" * 8000
    with store.batching() as batch:
        for number in range(100):
            batch.delete_key(key(f"k{number}"))
    put(store, "k0", b"z" * 80_000)


def test_a_full_map_fails_the_whole_batch_and_nothing_else(tmp_path: Path) -> None:
    """When LMDB has no page left every change of the chunk fails, and what was there is intact."""
    store = Store(tmp_path / "memory", capacity_bytes=CAPACITY, map_bytes=1 * MiB)
    put(store, "before", b"kept")
    batch = store.batch()
    with pytest.raises(PoolFull):
        for number in range(1000):
            batch.put_plain(key(f"k{number}"), b"x" * 10_000)
    with pytest.raises(PoolFull):
        batch.put_plain(key("small"), b"x")
    assert value(batch, "before") == b"kept"
    with pytest.raises(PoolFull):
        batch.close()
    assert get(store, "before") == b"kept"
    assert get(store, "k0") is None
    put(store, "after", b"works")
    store.close()


@pytest.mark.skipif(os.getuid() != 0 and not os.environ.get("CI"), reason="mounting needs root")
def test_a_full_disk_is_an_error_and_keeps_what_was_there(tmp_path: Path) -> None:
    """On a file system without room a set is DiskFull, earlier values are intact, and freeing helps."""
    mount = tmp_path / "tiny"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mount], check=True)
    try:
        store = Store(mount / "memory", capacity_bytes=64 * MiB)
        stored = 0
        with pytest.raises(DiskFull):
            for number in range(1000):
                put(store, f"k{number}", bytes([number % 256]) * 50_000)
                stored = number + 1
        assert stored > 20
        assert get(store, f"k{stored}") is None
        store = reopen_as_after_kill(store)
        assert all(get(store, f"k{number}") == bytes([number % 256]) * 50_000 for number in range(stored))
        with store.batching() as batch:
            for number in range(10):
                batch.delete_key(key(f"k{number}"))
        for number in range(5):
            put(store, f"again{number}", b"y" * 50_000)
        assert get(store, "again4") == b"y" * 50_000
        store.env.close()
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)


def reopen_as_after_kill(store: Store) -> Store:
    """Without the orderly close."""
    store.env.close()
    os.close(store._owner)
    return Store(store.directory, capacity_bytes=store.state.capacity_bytes)


def test_serials_are_never_given_twice(store: Store) -> None:
    """Not after a freed region, nor a restart, nor the loss of the pool."""
    given = []
    for _ in range(3):
        with store.batching() as batch:
            given += [batch.next_serial(), batch.next_serial()]
        store = reopen(store)
    store.close()
    (store.directory / "data.mdb").unlink()
    store = Store(store.directory, capacity_bytes=CAPACITY)
    with store.batching() as batch:
        given.append(batch.next_serial())
    assert len(set(given)) == len(given)
    assert given[:-1] == [1, 2, 3, 4, 5, 6]
    assert given[-1] > MEMORY_SERIALS_BLOCK
    store.close()


def test_a_second_owner_is_refused(store: Store) -> None:
    """Two processes must not both believe that they own the counters."""
    code = (
        "import sys, pathlib\n"
        "from virgo.memory.store import Store\n"
        "from virgo.errors import Busy\n"
        "try: Store(pathlib.Path(sys.argv[1]), capacity_bytes=1 << 24)\n"
        "except Busy: sys.exit(7)\n"
    )
    found = subprocess.run([sys.executable, "-c", code, store.directory], timeout=30)
    assert found.returncode == 7
    assert issubclass(Busy, Exception)


def test_what_cannot_be_trusted_is_not_read(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """After a reboot without an orderly stop the pool begins empty and says so; after an orderly one not."""
    put(store, "a", b"1")
    store.close()
    LifeFile(store.directory).change(boot="another")
    store = Store(store.directory, capacity_bytes=CAPACITY)
    assert get(store, "a") == b"1"
    store.env.close()
    os.close(store._owner)
    LifeFile(store.directory).change(boot="another")
    store = Store(store.directory, capacity_bytes=CAPACITY)
    assert get(store, "a") is None
    assert "begins empty" in caplog.text
    store.close()


def test_half_a_record_of_life_is_not_believed(tmp_path: Path) -> None:
    """If a power loss tears the newer of the two files the older one counts."""
    file = LifeFile(tmp_path)
    file.change(serial_ceiling=5)
    file.change(serial_ceiling=6)
    newer = tmp_path / f"life-{file.life.turn % 2}"
    newer.write_bytes(newer.read_bytes()[:40])
    assert LifeFile(tmp_path).life.serial_ceiling == 5


def test_keys_expire_once(store: Store) -> None:
    """Due keys are removed; one that was set anew meanwhile keeps its new time or none."""
    now = 1_000_000
    for name in ("gone", "renewed", "kept"):
        put(store, name, b"1", now)
    put(store, "renewed", b"2", now + 100)
    put(store, "kept", b"3")
    with store.batching() as batch:
        assert batch.expire_keys(now - 1, 100) == 0
        assert batch.expire_keys(now, 100) == 3
    assert (get(store, "gone"), get(store, "renewed"), get(store, "kept")) == (None, b"2", b"3")
    with store.batching() as batch:
        assert batch.expire_keys(now + 100, 100) == 1
    assert (get(store, "renewed"), get(store, "kept")) == (None, b"3")


def test_a_scan_gives_whole_slots(store: Store) -> None:
    """Going on from each answer one meets every key once."""
    names = {f"key-{number}".encode() for number in range(500)}
    with store.batching() as batch:
        for name in names:
            batch.put_plain(keyspace.stored_key(name), b"")
        found: list[bytes] = []
        slot, turns = 0, 0
        while slot < 4096:
            slot, some = batch.scan(slot, 50, None)
            found += some
            turns += 1
        assert batch.scan(0, 10_000, keyspace.glob(b"key-1?"))[1].__len__() == 10
    assert sorted(found) == sorted(names)
    assert turns >= 8


WRITER = """
import pathlib, sys
from virgo.memory import keyspace
from virgo.memory.store import Store
store = Store(pathlib.Path(sys.argv[1]), capacity_bytes=1 << 26)
number = 0
while True:
    number += 1
    with store.batching() as batch:
        for name in range(number % 5 + 1):
            value = b"%d:" % number + bytes([number % 256]) * (number * 37 % 20000)
            batch.put_plain(keyspace.stored_key(b"k%d" % name), value)
        batch.put_plain(keyspace.stored_key(b"last"), b"%d" % number)
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("after_s", [0.05, 0.11, 0.23])
def test_kill_9_loses_nothing_acknowledged(tmp_path: Path, after_s: float) -> None:
    """A writer that is killed between any two instructions leaves all that it had acknowledged, whole."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path / "memory"], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    deadline = time.monotonic() + after_s
    acknowledged = 1
    while time.monotonic() < deadline:
        acknowledged = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    rest = writer.stdout.read().split("\n")
    writer.wait()
    writer.stdout.close()
    acknowledged = max([acknowledged, *(int(line) for line in rest[:-1] if line)])
    store = Store(tmp_path / "memory", capacity_bytes=64 * MiB)
    last = int(get(store, "last") or b"0")
    assert last in (acknowledged, acknowledged + 1)
    newest = get(store, "k0")
    assert newest is not None
    assert newest == b"%d:" % last + bytes([last % 256]) * (last * 37 % 20000)
    put(store, "works", b"1")
    store.close()
