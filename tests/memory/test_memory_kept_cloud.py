"""Keys on two nodes and on disk, with real nodes that are killed and stopped."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from conftest import RunningCloud, stop_cloud
from virgo.errors import NodeLost, VirgoError
from virgo.limits import MEMORY_SLOTS, MEMORY_SLOTS_ALL, NODE_LOST_S
from virgo.memory import calls, keyspace
from virgo.memory.life import LifeFile
from virgo.node import control
from virgo.node.supervisor import UpOptions

if TYPE_CHECKING:
    from virgo.memory.client import Namespace

KILLS = int(os.environ.get("VIRGO_TEST_KILLS", "40")) // 10


@pytest.fixture
def three(make_cloud: Callable[..., RunningCloud]) -> Iterator[RunningCloud]:
    """Three nodes to be killed."""
    yield make_cloud(3)


def who_has(cloud: RunningCloud, key: bytes, asked: str) -> tuple[str, str]:
    """Names of the nodes with a key and with its copy."""
    with cloud.connect(asked) as connection:
        table = connection.client.run(calls.SLOTS)
    slot = keyspace.slot_of(key)
    names = {node["number"]: node["name"] for node in cloud.status()["nodes"]}
    return names[table[slot]], names.get(table[slot + MEMORY_SLOTS], "")


def eventually(work: Callable[[], Any], seconds: float) -> Any:
    """The first result that is no NodeLost, within the time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return work()
        except NodeLost:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_a_stopped_owner(three: RunningCloud) -> None:
    """Reads go on within the promised time, writes after the take-over; what comes back is not believed."""
    with three.connect("n1") as cloud:
        space = cloud.memory.namespace("orders", copies=2)
        space["7"] = b"seven"
        assert cloud.memory.get("{*2}orders:7") == b"seven"
    owner, mirror = who_has(three, b"{*2}orders:7", "n1")
    [third] = {"n1", "n2", "n3"} - {owner, mirror}
    pid = three.node(owner)["pid"]
    with three.connect(third) as cloud, three.connect(owner) as near:
        local = near.memory.namespace("orders", copies=2)
        assert local["7"] == b"seven"
        space = cloud.memory.namespace("orders", copies=2)
        os.kill(pid, signal.SIGSTOP)
        try:
            begun = time.monotonic()
            assert space["7"] == b"seven"
            assert time.monotonic() - begun < NODE_LOST_S + 1
            eventually(lambda: space.set("8", b"eight"), 15)
            eventually(lambda: space.set("7", b"changed"), 15)
            assert who_has(three, b"{*2}orders:7", third)[0] != owner
        finally:
            os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + 10
        while local["7"] != b"changed":  # its own machine may see the past for a moment
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for name in three.names:
            with three.connect(name) as each:
                assert each.memory.namespace("orders", copies=2).get_many(["7", "8"]) == {
                    "7": b"changed",
                    "8": b"eight",
                }
                assert len(each.memory) == 2


class Raising(threading.Thread):
    """Raises counters through one node, and counts what was acknowledged and what is unknown."""

    def __init__(self, cloud: RunningCloud, name: str, seed: int) -> None:
        super().__init__()
        self._cloud, self._name, self._draw = cloud, name, random.Random(seed)
        self.acknowledged = [0] * 10
        self.unknown = [0] * 10
        self.over = False

    def run(self) -> None:
        while not self.over:
            try:
                with self._cloud.connect(self._name, timeout_s=15) as cloud:
                    self._raise(cloud.memory.namespace("counters", copies=2))
            except VirgoError:
                time.sleep(0.05)

    def _raise(self, space: Namespace) -> None:
        while not self.over:
            number = self._draw.randrange(10)
            self.unknown[number] += 1
            space.increment(str(number))
            self.unknown[number] -= 1
            self.acknowledged[number] += 1


def test_nodes_killed_at_random_lose_nothing_acknowledged(three: RunningCloud) -> None:
    """Counters raised from all nodes while these are killed: no sum is too small or too great."""
    draw = random.Random(3)
    writers = [Raising(three, name, seed) for seed, name in enumerate(three.names)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(max(3, KILLS)):
            time.sleep(1 + 2 * draw.random())
            node = three.node(draw.choice(three.names))
            if node["state"] == "up":
                os.kill(node["pid"], signal.SIGKILL)
        time.sleep(1)
    finally:
        for writer in writers:
            writer.over = True
        for writer in writers:
            writer.join(60)
    assert sum(sum(writer.acknowledged) for writer in writers) > 50
    deadline = time.monotonic() + 30
    while any(node["state"] != "up" for node in three.status()["nodes"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for name in three.names:
        with three.connect(name) as cloud:
            space = cloud.memory.namespace("counters", copies=2)
            for number in range(10):
                count = sum(writer.acknowledged[number] for writer in writers)
                unknown = sum(writer.unknown[number] for writer in writers)
                found = int(eventually(functools.partial(space.get, str(number), b"0"), 15))
                assert count <= found <= count + unknown, (name, number, count, found, unknown)


WRITER = """
import sys, virgo
space = virgo.connect(embedded=False).memory.namespace("ledger", durable=True)
for number in range(1_000_000):
    space[str(number % 50)] = b"%d" % number
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


def test_power_loss(make_cloud: Callable[..., RunningCloud]) -> None:
    """After the loss of all else the pool has what was acknowledged as durable."""
    cloud = make_cloud(1)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER], env=cloud.environment, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(200)]
    with cloud.connect() as connection:
        connection.memory["volatile"] = b"lost"
    writer.kill()
    acknowledged += [int(line) for line in writer.stdout.read().split()]
    writer.stdout.close()
    writer.wait()
    directory = cloud.home / "nodes" / "n1" / "memory"
    stop_cloud(cloud.home)
    # As the disk is after a reboot: what was not flushed may be anything, so the pool does not trust it.
    LifeFile(directory).change(boot="another", clean=False)
    control.start_detached(cloud.home, UpOptions(nodes=["n1"]))
    with cloud.connect() as connection:
        memory = connection.memory
        assert "volatile" not in memory
        space = memory.namespace("ledger", durable=True)
        last = {number % 50: number for number in acknowledged}
        found = {int(key): int(space[key]) for key in space}
        newest = max(acknowledged) + 1
        assert found.keys() >= last.keys()
        assert all(found[key] in (number, newest) for key, number in last.items())


def test_slots_of_both_kinds_fit_the_table(three: RunningCloud) -> None:
    """What a client is told of the slots has the mirrors behind the owners."""
    with three.connect() as cloud:
        cloud.memory["{*2}k"] = b"v"
        table = cloud.client.run(calls.SLOTS)
        assert len(table) == MEMORY_SLOTS_ALL + MEMORY_SLOTS
        slot = keyspace.slot_of(b"{*2}k")
        assert table[slot] and table[slot + MEMORY_SLOTS] not in (0, table[slot])
