"""What is remembered of a mapped store is what a look-up would find, whoever has changed it meanwhile."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from memory.owners import Owner
from virgo.errors import BadArgument, NotRunning
from virgo.limits import MEMORY_RECALL_BYTES_MAX, MEMORY_RECALL_VALUE_BYTES_MAX
from virgo.memory import keyspace
from virgo.memory.recall import Recall
from waiting import until

if TYPE_CHECKING:
    from conftest import RunningCloud
    from virgo.cloud import Cloud

A = keyspace.stored_key(b"a")


def test_what_was_read_is_remembered_until_something_changes(owner: Owner) -> None:
    """The very object comes back; after any change by another process it is looked up again."""
    mapped, recall = owner.map(), Recall()
    assert recall.get("a") is None
    for number in range(50):
        owner.do("set", "a" if number % 3 else "another", number)
        assert recall.get("a") is None
        value = mapped.key(A, recall, "a")
        if value is not None:
            assert recall.get("a") is value
            assert recall.get("b") is None


def test_values_of_regions_are_remembered_too(owner: Owner) -> None:
    """By their id, until the next change."""
    mapped, recall = owner.map(), Recall()
    owner.do("set", "a", "x")
    value = mapped.data(7, recall)
    assert value == b"x"
    assert recall.get(7) is value
    owner.do("set", "a", "y")
    assert recall.get(7) is None


def test_what_expires_is_not_remembered(owner: Owner) -> None:
    """For time passes without a change."""
    mapped, recall = owner.map(), Recall()
    owner.do("set", "a", "x", int(time.time() * 1000) + 60_000)
    assert mapped.key(A, recall, "a") == b"x"
    assert recall.get("a") is None


def test_nothing_is_remembered_of_a_store_that_is_closed_or_replaced(owner: Owner, tmp_path: Path) -> None:
    """Neither when the map is closed nor when another store lies at the path, if its numbers are the same."""
    mapped, recall = owner.map(), Recall()
    owner.do("set", "a", "x")
    assert mapped.key(A, recall, "a") == b"x" == recall.get("a")
    mapped.close()
    assert recall.get("a") is None
    assert mapped.key(A, recall, "a") == mapped.key(A, recall, "a") == b"x" == recall.get("a")
    owner.end()
    shutil.rmtree(owner.directory)
    other = Owner(tmp_path / "memory")
    try:
        other.do("set", "a", "y")
        deadline = time.monotonic() + 10
        while recall.get("a") is not None:  # until the files are looked at
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(NotRunning, match="another store"):
            mapped.key(A, recall, "a")
        assert other.map().key(A, recall, "a") == b"y" == recall.get("a")
    finally:
        other.end()


def test_its_room_is_bounded(owner: Owner) -> None:
    """Long values are not kept, and many short ones are forgotten before they are too many."""
    mapped = owner.map()
    owner.do("set", "a", "x")
    mapped.key(A, recall := Recall(), "a")
    clock, _place, number, _values = recall.last
    recall.note("long", bytes(MEMORY_RECALL_VALUE_BYTES_MAX + 1), number + 1, clock)  # type: ignore[arg-type]
    assert recall.get("long") is None
    for name in range(300):
        recall.note(name, bytes(MEMORY_RECALL_BYTES_MAX // 100), number + 1, clock)  # type: ignore[arg-type]
        assert recall.get(name) is not None
        assert sum(map(len, recall.last[3].values())) <= MEMORY_RECALL_BYTES_MAX
    for name in range(100_000):
        recall.note(name, b"", number + 1, clock)  # type: ignore[arg-type]
    assert len(recall.last[3]) < 100_000


def test_a_value_of_an_earlier_moment_is_never_given_for_a_later_one(owner: Owner) -> None:
    """Whoever was held up between reading and noting notes what was, and that is not given out."""
    mapped, recall = owner.map(), Recall()
    owner.do("set", "a", "x")
    mapped.key(A, recall, "a")
    clock, _place, number, _values = recall.last
    owner.do("set", "a", "y")
    recall.note("a", b"x", number + 1, clock)  # type: ignore[arg-type]
    assert recall.get("a") is None
    mapped.key(A, recall, "a")
    recall.note("a", b"x", number + 1, clock)  # type: ignore[arg-type]
    assert recall.get("a") is None


WRITER = """
import mmap, os, random, sys, time, virgo
memory = virgo.connect(embedded=False).memory
assert memory.mapped
region = memory.region(int(sys.argv[2]))
with open(sys.argv[1], "r+b") as file:
    acknowledged = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")
chance = random.Random(5)
number, end = 0, time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    number += 1
    memory["k"] = b"%d" % number
    region.set(b"%d" % number)
    acknowledged[0] = number
    if chance.random() < 0.3:
        time.sleep(chance.random() * 0.002)
"""


def test_an_acknowledged_change_is_read_by_all_from_then_on(one: RunningCloud, cloud: Cloud) -> None:
    """While another process writes, no read shows less than what was acknowledged when it began."""
    memory = cloud.memory
    memory["k"] = b"0"
    reads, seen = 0, set()
    with memory.malloc(100) as region, tempfile.NamedTemporaryFile() as file:
        region.set(b"0")
        file.write(bytes(8))
        file.flush()
        acknowledged = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")
        environment = {**os.environ, "VIRGO_HOME": str(one.home)}
        arguments = [sys.executable, "-c", WRITER, file.name, str(region.id), "4"]
        with subprocess.Popen(arguments, env=environment) as writer:
            while writer.poll() is None:
                for read in (lambda: memory["k"], region.get, lambda: memory.get(b"k")):
                    before = acknowledged[0]
                    value = int(read())
                    assert value >= before
                    seen.add(value)
                    reads += 1
        assert writer.returncode == 0
        assert int(memory["k"]) == int(region.get()) == acknowledged[0]
        del acknowledged
    assert len(seen) > 100
    assert reads > 2 * len(seen), "most reads found nothing changed"


def test_every_door_ends_what_is_remembered(one: RunningCloud, cloud: Cloud) -> None:
    """A change by the wire, a deletion, a dropped namespace and an emptied pool are seen by the next read."""
    memory = cloud.memory
    space = memory.namespace("s")
    with one.connect() as other:
        for number in range(30):
            value = b"%d" % number
            assert other.client.execute("SET", "k", value) == b"OK"
            assert memory["k"] == value
            until(lambda: memory["k"] is memory["k"])  # unless the store is looked for again in between
            memory["k"] = value + b"!"
            assert memory["k"] == value + b"!"
            space["x"] = value
            assert space["x"] == memory["s:x"] == value
            until(lambda: space["x"] is space["x"])
            other.memory.drop("s")
            assert space.get("x") is None is memory.get("s:x")
            other.memory.delete("k")
            assert memory.get("k") is None
        memory["k"] = b"v"
        assert memory["k"] == b"v"
        other.memory.clear()
        assert "k" not in memory
        assert memory.get("k") is None


def test_keys_of_every_kind(cloud: Cloud) -> None:
    """Text, bytes and what is like bytes name the same key; a number none, though it is a region's id."""
    memory = cloud.memory
    memory["k"] = b"v"
    for _ in range(2):
        for name in ("k", b"k", bytearray(b"k"), memoryview(b"k"), memoryview(bytearray(b"k"))):
            assert memory.get(name) == b"v"
    with memory.malloc(10) as region:
        region.set(b"data")
        assert region.get() is region.get()
        with pytest.raises(BadArgument):
            memory.get(region.id)  # type: ignore[arg-type]


def test_a_closed_client_remembers_nothing(one: RunningCloud) -> None:
    """Not even what it has just read."""
    cloud = one.connect()
    cloud.memory["k"] = b"v"
    assert cloud.memory["k"] == b"v"
    cloud.close()
    with pytest.raises(NotRunning):
        cloud.memory.get("k")


def test_after_a_fork_both_see_what_is(cloud: Cloud) -> None:
    """A child that was forked off with a memory sees its parent's changes, and the parent the child's."""
    memory = cloud.memory
    for number in range(20):
        memory["p"], memory["c"] = b"%d" % number, b""
        assert memory["p"] == memory["p"] == b"%d" % number
        assert memory["c"] == memory["c"] == b""
        pid = os.fork()
        if not pid:
            right = memory["p"] == memory["p"] == b"%d" % number
            memory["c"] = b"child %d" % number
            os._exit(0 if right and memory["c"] == b"child %d" % number else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert memory["c"] == b"child %d" % number


def test_what_is_remembered_agrees_with_the_node(cloud: Cloud) -> None:
    """Over random changes and reads by two clients, mapped and not, all agree with a dictionary."""
    chance, model = random.Random(3), dict[str, bytes]()
    memory = cloud.memory
    for step in range(3000):
        name = f"k{chance.randrange(6)}"
        match chance.randrange(12):
            case 0:
                memory[name] = model[name] = b"%d" % step
            case 1:
                cloud.client.execute("SET", name, model.setdefault(name, b"%d" % step))
            case 2:
                assert memory.delete(name) == (model.pop(name, None) is not None)
            case _:
                assert memory.get(name) == model.get(name)
