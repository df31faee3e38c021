"""A store whose free pages lie about in many pieces is written anew, and nobody loses or misreads a value."""

from __future__ import annotations

import mmap
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from virgo.errors import FileRefused
from virgo.limits import MiB
from virgo.memory import condense, heads, keyspace
from virgo.memory.guard import Guard
from virgo.memory.store import Store


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Condense with few records, and as often as asked."""
    monkeypatch.setattr(condense, "MEMORY_FREE_RECORDS_MAX", 500)
    monkeypatch.setattr(condense, "MEMORY_CONDENSE_AGAIN_S", 0.0)


def key(name: str) -> bytes:
    return keyspace.stored_key(name.encode())


def put(store: Store, name: str, value: bytes) -> None:
    with store.batching() as batch:
        batch.put_plain(key(name), value)


def get(store: Store, name: str) -> tuple[bytes, int]:
    """The value of a key and its version."""
    with store.batching() as batch:
        entry = keyspace.decode_entry(batch.key(key(name)) or b"")
        return entry.value, entry.version


def scatter(store: Store, changes: int = 1500) -> None:
    """Make changes while somebody looks at the state before them."""
    with store.env.begin():
        for number in range(changes):
            put(store, f"k{number % 50}", b"%d" % number * 50)


def records(store: Store) -> int:
    return heads.free_records(store.directory / "data.mdb")


def test_it_is_condensed_when_needed_and_keeps_what_counts(tmp_path: Path) -> None:
    """All values stay, versions go on upwards, the file gets shorter, and a long value is placed at once."""
    store = Store(tmp_path / "memory", capacity_bytes=64 * MiB)
    put(store, "first", b"x")
    assert not store.condenser.attend(store)
    scatter(store)
    assert records(store) > 500
    before = {name: get(store, name) for name in ("first", *(f"k{number}" for number in range(50)))}
    length, serial = store.file_bytes(), store.state.serial
    assert store.condenser.attend(store)
    assert records(store) < 10
    assert store.file_bytes() < length + 16 * MiB
    assert {name: get(store, name) for name in before} == before
    put(store, "first", b"y")
    assert get(store, "first")[1] > max(version for _value, version in before.values())
    assert store.state.open and store.state.serial == serial
    put(store, "long", bytes(16 * MiB))
    assert not store.condenser.attend(store)
    store.close()
    again = Store(tmp_path / "memory", capacity_bytes=64 * MiB)
    assert get(again, "first")[0] == b"y" and get(again, "k7")[0] == before["k7"][0]
    again.close()


def test_a_store_that_is_too_full_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take too long, and serves on."""
    store = Store(tmp_path / "memory", capacity_bytes=64 * MiB)
    scatter(store)
    monkeypatch.setattr(condense, "MEMORY_CONDENSE_BYTES_MAX", 100)
    assert not store.condenser.attend(store)
    put(store, "k", b"v")
    store.close()


def test_a_copy_that_fails_leaves_the_store_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there is there, it can be written, and nothing lies about."""

    def fail(*_arguments: Any, **_named: Any) -> None:
        raise OSError(5, "Input/output error")

    store = Store(tmp_path / "memory", capacity_bytes=64 * MiB)
    scatter(store)
    for step in ("renumber", "opening"):
        with monkeypatch.context() as changed:
            changed.setattr(condense, step, fail)
            with pytest.raises(FileRefused):
                store.condenser.attend(store)
            assert store.state.open and not (store.directory / "condensing").exists()
            store.attend()  # as the node's heart does, which must go on beating
        put(store, "k1", b"v")
        assert get(store, "k1")[0] == b"v"
    assert store.condenser.attend(store)
    assert get(store, "k1")[0] == b"v"
    store.close()


KILLED = """
import os, pathlib, signal, sys
from virgo.memory import condense, keyspace
from virgo.memory.store import Store
condense.MEMORY_FREE_RECORDS_MAX = 500
store = Store(pathlib.Path(sys.argv[1]), capacity_bytes=1 << 26)
with store.env.begin():
    for number in range(1500):
        with store.batching() as batch:
            batch.put_plain(keyspace.stored_key(b"n"), b"%d" % number)
def die(*_arguments, **_named):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "copied":
    condense.renumber = die
elif sys.argv[2] == "numbered":
    condense.opening = die
elif sys.argv[2] == "replaced":
    condense.finish = die
else:
    Store._use = die
store.condenser.attend(store)
"""


@pytest.mark.parametrize("point", ["copied", "numbered", "replaced", "reopened"])
def test_a_kill_at_any_point_leaves_a_whole_store(tmp_path: Path, point: str) -> None:
    """The old file or the new one; what was acknowledged is in either."""
    directory = tmp_path / "memory"
    done = subprocess.run([sys.executable, "-c", KILLED, directory, point], timeout=60)
    assert done.returncode == -signal.SIGKILL
    store = Store(directory, capacity_bytes=64 * MiB)
    assert get(store, "n")[0] == b"1499"
    for number in range(20):
        put(store, "n", b"%d" % number)
        assert get(store, "n")[0] == b"%d" % number
    assert not (directory / "condensing").exists()
    store.close()


STOPPED = """
import os, signal, sys
from virgo.memory import keyspace
from virgo.memory.maps import open_mapped
mapped = open_mapped(sys.argv[1], sys.argv[2], int(sys.argv[3]))
def put(batch):
    batch.put_plain(keyspace.stored_key(b"client"), b"done")
    print("writing", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
mapped.change(put)
"""


def test_a_client_that_is_stopped_in_a_change_is_let_finish_it_first(tmp_path: Path) -> None:
    """Neither does it hold up the owner without end, nor is its change lost."""
    store = Store(tmp_path / "memory", capacity_bytes=64 * MiB)
    scatter(store)
    guard = Guard(store)
    guard.start()
    arguments = [str(store.directory), store.identity, str(store.map_bytes)]
    command = [sys.executable, "-c", STOPPED, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        try:
            assert client.stdout is not None and client.stdout.readline() == b"writing\n"
            assert store.condenser.attend(store)
            assert get(store, "client")[0] == b"done"
            assert guard.killed == 0
        finally:
            client.kill()
            guard.stop()
    store.close()


CLIENT = """
import mmap, sys, time
from virgo.errors import NotRunning
from virgo.memory import keyspace
from virgo.memory.maps import open_mapped
from virgo.memory.recall import Recall
mapped, recall = open_mapped(sys.argv[1], sys.argv[2], int(sys.argv[3])), Recall()
with open(sys.argv[4], "r+b") as file:
    shared = memoryview(mmap.mmap(file.fileno(), 24)).cast("Q")
owners, ours, number = keyspace.stored_key(b"owner"), keyspace.stored_key(b"client"), 0
while not shared[2]:
    least = shared[0]
    value = recall.get("owner")
    if value is None:
        value = mapped.key(owners, recall, "owner")
    assert int(value) >= least, (value, least)
    try:
        mapped.change(lambda batch: batch.put_plain(ours, b"%d" % (number + 1)))
    except NotRunning:
        continue
    number += 1
    shared[1] = number
"""


def test_clients_that_map_it_see_and_lose_nothing_old(tmp_path: Path) -> None:
    """One that reads and writes all the time reads no less than was acknowledged; its own changes stay."""
    store = Store(tmp_path / "memory", capacity_bytes=64 * MiB)
    put(store, "owner", b"0")
    (tmp_path / "shared").write_bytes(bytes(24))
    with (tmp_path / "shared").open("r+b") as file:
        shared = memoryview(mmap.mmap(file.fileno(), 24)).cast("Q")
    arguments = [str(store.directory), store.identity, str(store.map_bytes), str(tmp_path / "shared")]
    client = subprocess.Popen([sys.executable, "-c", CLIENT, *arguments])
    number = 0
    try:
        deadline = time.monotonic() + 20
        while not shared[1]:
            assert time.monotonic() < deadline, "the client does not begin"
            time.sleep(0.01)
        for _ in range(3):
            scatter(store, 800)
            deadline = time.monotonic() + 0.3
            while time.monotonic() < deadline:
                number += 1
                put(store, "owner", b"%d" % number)
                shared[0] = number
            acknowledged = shared[1]
            assert store.condenser.attend(store)
            assert int(get(store, "client")[0]) >= acknowledged > 0
            assert client.poll() is None
        until = shared[1] + 10
        deadline = time.monotonic() + 10
        while shared[1] < until:
            assert time.monotonic() < deadline, "the client writes no more"
            time.sleep(0.01)
    finally:
        shared[2] = 1
        status = client.wait(20)
    assert status == 0
    assert int(get(store, "client")[0]) == shared[1]
    store.close()
