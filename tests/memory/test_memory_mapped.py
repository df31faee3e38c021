"""Reading a node's store by mapping it: whole values, forks, and stores that are not what they seem."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from virgo.errors import NotRunning
from virgo.memory import keyspace
from virgo.memory.mapped import Mapped, open_mapped

# A store in a process of its own that does what its standard input says, as a node would.
OWNER = """
import pathlib, sys, time
from virgo.memory import keyspace
from virgo.memory.keyspace import Entry
from virgo.memory.store import Store
store = Store(pathlib.Path(sys.argv[1]), capacity_bytes=1 << 26)
print(store.identity, store.map_bytes, flush=True)
for line in sys.stdin:
    words = line.split()
    if words[0] == "set":
        with store.batching() as batch:
            entry = Entry(words[2].encode(), int(words[3]) if len(words) > 3 else 0)
            batch.put_entry(keyspace.stored_key(words[1].encode()), entry)
            batch.put_data(7, words[2].encode())
    if words[0] == "churn":
        end = time.monotonic() + float(words[1])
        number = 0
        while time.monotonic() < end:
            number += 1
            value = (b"%09d" % number) * (1 + number * 7919 % 3000)
            with store.batching() as batch:
                batch.put_plain(keyspace.stored_key(b"torn"), value)
                batch.put_data(7, value)
    if words[0] == "close":
        store.close()
    print("done", flush=True)
"""


class Owner:
    """The process, and what is needed to map its store."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        identity, map_bytes = self._line().split()
        self.identity, self.map_bytes = identity, int(map_bytes)

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def start(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def do(self, *words: object) -> None:
        self.start(*words)
        assert self._line() == "done\n"

    def map(self) -> Mapped:
        return open_mapped(str(self.directory), self.identity, self.map_bytes)

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    found = Owner(tmp_path / "memory")
    yield found
    found.end()


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


READER = """
import sys, time
from virgo.memory import keyspace
from virgo.memory.mapped import open_mapped
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


def test_another_store_at_the_path_is_refused(owner: Owner) -> None:
    """The path alone is not believed: a store of another identity is not mapped."""
    with pytest.raises(NotRunning, match="another store"):
        open_mapped(str(owner.directory), "0" * 32, owner.map_bytes)
    with pytest.raises(NotRunning):
        open_mapped(str(owner.directory / "nowhere"), owner.identity, owner.map_bytes)
    assert not (owner.directory / "nowhere").exists()


def test_a_store_that_was_made_anew_is_noticed(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the files of the path are replaced, a reader says so instead of showing the old ones for ever."""
    monkeypatch.setattr("virgo.memory.mapped._CHECK_S", 0.0)
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
