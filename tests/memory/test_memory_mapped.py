"""Reading a node's store by mapping it: whole values, forks, and stores that are not what they seem."""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from memory.owners import Owner
from virgo.errors import NotRunning
from virgo.memory import keyspace
from virgo.memory.mapped import Mapped
from virgo.memory.maps import open_mapped


def key(name: bytes) -> bytes:
    return keyspace.stored_key(name)


def test_what_was_set_is_read_at_once(owner: Owner) -> None:
    """Each acknowledged set is what the next read sees; absent is None; a process has one map."""
    mapped = owner.map()
    assert mapped.key(key(b"a")) is None
    for number in range(20):
        owner.do("set", "a", number)
        assert mapped.key(key(b"a")) == b"%d" % number
        assert mapped.data(7) == b"%d" % number
    assert mapped.data(8) is None
    assert owner.map() is mapped


def test_expired_keys_are_absent(owner: Owner) -> None:
    """A reader does not wait for the owner to remove a key whose time has passed."""
    mapped = owner.map()
    owner.do("set", "a", "x", int(time.time() * 1000) + 60_000)
    assert mapped.key(key(b"a")) == b"x"
    owner.do("set", "a", "x", int(time.time() * 1000) - 1)
    assert mapped.key(key(b"a")) is None


KILLS = int(os.environ.get("VIRGO_TEST_KILLS", "40"))

READER = """
import sys, time
from virgo.memory import keyspace
from virgo.memory.mapped import Mapped
from virgo.memory.maps import open_mapped
mapped = open_mapped(sys.argv[1], sys.argv[2], int(sys.argv[3]))
end, seen, last = time.monotonic() + float(sys.argv[4]), set(), 0
stored = keyspace.stored_key(b"torn")
while time.monotonic() < end:
    for value in (mapped.key(stored), mapped.data(7)):
        if value is None:
            continue
        number = int(value[:9])
        assert value == (b"%09d" % number) * (1 + number * 7919 % 3000), "torn"
        assert number >= last, "backwards"
        last = number
        seen.add(number)
print(len(seen))
"""


def test_no_reader_sees_a_torn_value(owner: Owner) -> None:
    """While the owner rewrites a value of changing length, readers in two processes see whole values only."""
    arguments = [owner.directory, owner.identity, str(owner.map_bytes), "0.7"]
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, *arguments], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    owner.do("churn", "1.3")
    for reader in readers:
        out, _ = reader.communicate(timeout=30)
        assert reader.returncode == 0
        assert int(out) > 10


def test_a_killed_reader_blocks_nobody(owner: Owner) -> None:
    """A reader that dies in a transaction leaves the owner writing and other readers reading."""
    arguments = [owner.directory, owner.identity, str(owner.map_bytes), "30"]
    reader = subprocess.Popen([sys.executable, "-c", READER, *arguments])
    owner.do("churn", "0.4")
    reader.kill()
    reader.wait()
    owner.do("churn", "0.2")
    owner.do("set", "a", "after")
    assert owner.map().key(key(b"a")) == b"after"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_threads_and_forks_keep_reading(owner: Owner) -> None:
    """While threads read, the process forks: child and parent read on, and values stay whole."""
    mapped = owner.map()
    owner.do("set", "a", "x" * 1000)
    stop, failures = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            if mapped.key(key(b"a")) != b"x" * 1000 or mapped.data(7) != b"x" * 1000:
                failures.append("wrong")

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                right = mapped.key(key(b"a")) == b"x" * 1000
                os._exit(0 if right else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    owner.do("set", "a", "y")
    assert mapped.key(key(b"a")) == b"y"


def test_a_map_that_nobody_uses_can_be_made_anew(owner: Owner) -> None:
    """Whatever still refers to a transaction on it, a traceback for example; but not under a view."""
    owner.do("set", "a", "x")
    mapped = owner.map()
    kept = mapped._env.begin()
    del mapped
    gc.collect()
    mapped = owner.map()
    assert mapped.key(key(b"a")) == b"x"
    del kept
    held = mapped.view_data(7)
    del mapped
    gc.collect()
    assert held is not None
    with held as memory:
        assert bytes(memory) == b"x"
    del held
    assert owner.map().key(key(b"a")) == b"x"


def test_another_store_at_the_path_is_refused(owner: Owner) -> None:
    """The path alone is not believed: a store of another identity is not mapped."""
    with pytest.raises(NotRunning, match="another store"):
        open_mapped(str(owner.directory), "0" * 32, owner.map_bytes)
    with pytest.raises(NotRunning):
        open_mapped(str(owner.directory / "nowhere"), owner.identity, owner.map_bytes)
    assert not (owner.directory / "nowhere").exists()


def test_a_store_that_was_made_anew_is_noticed(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the files of the path are replaced, a reader says so instead of showing the old ones for ever."""
    monkeypatch.setattr("virgo.memory.mapped.CHECK_S", 0.0)
    mapped = owner.map()
    owner.do("set", "a", "old")
    assert mapped.key(key(b"a")) == b"old"
    owner.end()
    shutil.rmtree(owner.directory)
    with pytest.raises(NotRunning):
        mapped.key(key(b"a"))
    anew = Owner(owner.directory)
    try:
        anew.do("set", "a", "new")
        with pytest.raises(NotRunning):
            mapped.key(key(b"a"))
        assert anew.map().key(key(b"a")) == b"new"
    finally:
        anew.end()


def test_reads_go_on_over_a_restart_of_the_owner(owner: Owner) -> None:
    """A killed and restarted owner goes on with the same files, and the reader sees its new values."""
    mapped = owner.map()
    owner.do("set", "a", "before")
    owner.end()
    assert mapped.key(key(b"a")) == b"before"
    again = Owner(owner.directory)
    try:
        assert again.identity == owner.identity
        again.do("set", "a", "after")
        assert mapped.key(key(b"a")) == b"after"
    finally:
        again.end()


WRITER = """
import itertools, sys, time
from virgo.memory import keyspace
from virgo.memory.mapped import Mapped
from virgo.memory.maps import open_mapped
mapped = open_mapped(sys.argv[1], sys.argv[2], int(sys.argv[3]))
stored = [keyspace.stored_key(name) for name in (b"client", b"client:large")]
def put(batch):
    batch.put_plain(stored[0], value)
    batch.put_plain(stored[1], value + bytes(number * 37 % 20000))
for number in itertools.count(1):
    value = b"%d" % number
    mapped.change(put)
    print(number, flush=True)
"""


def both(mapped: Mapped, name: bytes) -> int:
    """The number under both keys of a counter, as of one moment, 0 if there is none; a torn change fails."""
    stored = key(name), key(name + b":large")
    small, large = mapped.change(lambda batch: [batch.key(each) for each in stored])
    number = int(small[keyspace.HEAD_BYTES :]) if small else 0
    assert number == 0 or large[keyspace.HEAD_BYTES :] == b"%d" % number + bytes(number * 37 % 20000)
    return number


def test_kill_9_of_the_owner_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """An owner that is killed at any point of its changes leaves what it had acknowledged, and whole changes.

    A client writes on over all of it.
    """
    chance, kills = random.Random(11), max(10, KILLS // 2)
    owner = Owner(tmp_path / "memory")
    mapped = owner.map()
    arguments = [str(owner.directory), owner.identity, str(owner.map_bytes)]
    with (tmp_path / "acknowledged").open("w+b") as log:
        client = subprocess.Popen([sys.executable, "-c", WRITER, *arguments], stdout=log)
        try:
            last = counted = 0
            for _ in range(kills):
                last = owner.count(last + 1, chance.random() * 0.02)
                owner.end()
                owner = Owner(tmp_path / "memory")
                owners, clients = (both(mapped, name) for name in (b"owner", b"client"))
                assert last <= owners <= last + 1
                assert counted <= clients
                counted = clients
                assert int(mapped.data(7) or b"") >= last
                assert client.poll() is None
        finally:
            client.kill()
            client.wait()
            owner.end()
        log.seek(0)
        acknowledged = int(log.read().split(b"\n")[-2])
        assert acknowledged > kills and int(mapped.key(key(b"client"))) >= acknowledged
