"""Writes by mapping: processes that change one node's store, and are killed, stopped, interrupted at it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conftest import stop_cloud
from virgo.errors import NotRunning, PoolFull, TooLarge, UnknownId
from virgo.limits import MiB
from virgo.memory import maps
from virgo.memory.writers import writers

if TYPE_CHECKING:
    from conftest import RunningCloud
    from virgo.cloud import Cloud

KILLS = int(os.environ.get("VIRGO_TEST_KILLS", "40"))

# A client that counts, and tells each number once it is acknowledged.
COUNTER = """
import sys, virgo
from virgo.errors import NodeLost, NotLoaded, NotRunning
memory = virgo.connect(embedded=False).memory
name = sys.argv[1]
region = memory.region(int(sys.argv[2]))
number = int(memory.get(name, b"0"))
assert memory.mapped
while True:
    number += 1
    value = b"%d" % number
    try:
        memory[name] = value
        memory[name + ":large"] = value + bytes([number % 256]) * (number * 37 % 20000)
        region.set(value)
    except (NodeLost, NotLoaded, NotRunning):  # it had to ask the node, which has just died
        number -= 1
        continue
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


class Watched:
    """A runner that remembers the commands which the node was asked for."""

    def __init__(self, cloud: Cloud) -> None:
        self.asked: list[Any] = []
        self._runner = cloud.client

    def run(self, call: Any) -> Any:
        self.asked.append(call.request[0])
        return self._runner.run(call)


def test_nobody_is_in_the_way_of_a_change(cloud: Cloud) -> None:
    """Once a key's place is known, set, get, delete and pop of it, and of a region, ask the node nothing."""
    memory = cloud.memory
    with memory.malloc(100) as region:
        region.set(b"x")
        memory["a"] = b"1"
        assert memory["a"] == b"1"  # from now on its place is known
        memory._reach._runner = watched = Watched(cloud)  # type: ignore[assignment]
        for number in range(10):
            memory["a"] = b"%d" % number
            assert memory["a"] == b"%d" % number
            region.set(b"%d" % number)
            assert region.get() == b"%d" % number
        assert memory.set("a", b"y", ttl_s=100) and not memory.set("a", b"z", only_if="absent")
        assert memory.pop("a") == b"y" and "a" not in memory
        memory["a"] = b"3"
        del memory["a"]
        assert watched.asked == []
        memory._reach._runner = cloud.client
        assert cloud.client.execute("GET", "a") is None


def test_the_node_and_others_see_it_at_once(one: RunningCloud, cloud: Cloud) -> None:
    """What one client has set, the node answers with, and another client reads; and the other way round."""
    with one.connect() as other:
        for number in range(200):
            value = b"%d" % number * (1 + number * 31 % 500)
            cloud.memory["seen"] = value
            assert cloud.client.execute("GET", "seen") == value
            assert other.memory["seen"] == value
            other.client.execute("SET", "seen", b"back")
            assert cloud.memory["seen"] == b"back"


def test_bounds_hold_without_the_node(cloud: Cloud) -> None:
    """Too much for a region, a freed region and too long a key are what they are through the node."""
    region = cloud.memory.malloc(4)
    region.set(b"abcd")
    with pytest.raises(TooLarge):
        region.set(b"abcde")
    assert region.get() == b"abcd"
    region.free()
    with pytest.raises(UnknownId):
        region.set(b"x")
    cloud.memory["k" * 500] = b"1"
    with pytest.raises(TooLarge):
        cloud.memory["k" * 501] = b"1"


def test_counters_of_many_processes_and_threads_are_exact(one: RunningCloud, cloud: Cloud) -> None:
    """Conditional sets by mapping and by the node, from processes and threads, exclude each other."""
    program = (
        "import sys, threading, virgo\n"
        "cloud = virgo.connect(embedded=False)\n"
        "def work():\n"
        "    for _ in range(int(sys.argv[1])):\n"
        "        while not cloud.memory.set('turn', b'x', only_if='absent'):\n"
        "            pass\n"
        "        cloud.memory['sum'] = b'%d' % (int(cloud.memory['sum']) + 1)\n"
        "        del cloud.memory['turn']\n"
        "threads = [threading.Thread(target=work) for _ in range(2)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
    )
    cloud.memory["sum"] = b"0"
    workers = [
        subprocess.Popen([sys.executable, "-c", program, "100"], env=one.environment) for _ in range(3)
    ]
    for _ in range(200):
        cloud.client.execute("INCR", "node's own")
    for worker in workers:
        assert worker.wait(60) == 0
    assert cloud.memory["sum"] == b"600"
    assert cloud.memory["node's own"] == b"200"


class Counting:
    """A client process that counts, and what it has acknowledged."""

    def __init__(self, one: RunningCloud, name: str, region: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", COUNTER, name, str(region)],
            env=one.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.acknowledged = 0
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):
                self.acknowledged = int(line)

    def go_on(self, count: int = 3) -> None:
        """Wait for so many further acknowledgements."""
        wanted, deadline = self.acknowledged + count, time.monotonic() + 30
        while self.acknowledged < wanted:
            assert time.monotonic() < deadline, "it does not go on"
            assert self.process.poll() is None, "it has ended"
            time.sleep(0.001)

    def kill(self) -> int:
        """kill -9; returns what it had acknowledged."""
        self.process.kill()
        self.process.wait()
        self.thread.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.acknowledged


def whole(memory: Any, name: str) -> tuple[int, int]:
    """The numbers in both values of a counter; a torn value fails."""
    large = memory[f"{name}:large"]
    number = int(memory[name])
    digits = large[: len(str(number))] if large.startswith(str(number).encode()) else str(number - 1).encode()
    found = int(digits)
    assert large == digits + bytes([found % 256]) * (found * 37 % 20000), "torn"
    return number, found


def test_kill_9_of_writers_loses_nothing_acknowledged_and_blocks_nobody(
    one: RunningCloud, cloud: Cloud
) -> None:
    """Clients killed at any point leave what they had acknowledged, whole; others and the node write on."""
    chance = random.Random(7)
    region = cloud.memory.malloc(100)
    killed, other = Counting(one, "killed", region.id), Counting(one, "other", region.id)
    try:
        for _ in range(KILLS):
            killed.go_on()
            time.sleep(chance.random() * 0.01)
            last = killed.kill()
            number, large = whole(cloud.memory, "killed")
            assert number >= last and large >= last, (number, large, last)
            other.go_on()
            cloud.client.execute("SET", "node", b"x")
            killed = Counting(one, "killed", region.id)
    finally:
        killed.kill()
        other.kill()


def test_kill_9_of_the_node_loses_nothing_that_clients_acknowledged(
    make_cloud: Callable[..., RunningCloud],
) -> None:
    """Clients write on over the node's death, and what they had acknowledged is there when it is back."""
    own = make_cloud(1)
    with own.connect() as cloud:
        region = cloud.memory.malloc(100)
        writer = Counting(own, "a", region.id)
        try:
            writer.go_on()
            for _ in range(max(5, KILLS // 100)):  # a node that dies often is started ever later
                pid = own.node("n1")["pid"]
                os.kill(pid, signal.SIGKILL)
                seen = writer.acknowledged
                deadline = time.monotonic() + 60
                while own.node("n1")["state"] != "up" or own.node("n1")["pid"] == pid:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                assert int(cloud.client.execute("GET", "a")) >= seen
                writer.go_on()
        finally:
            last = writer.kill()
        assert int(cloud.client.execute("GET", "a")) >= last
        assert int(cloud.client.execute("VIRGO_GET", region.id)) >= last


def test_all_who_may_be_writing_are_known_whatever_their_pids(tmp_path: Path) -> None:
    """Pids are given anew from the lowest on, so that who comes later may have a lower one."""
    code = "from virgo.memory.writers import *; input(); one = Announcement(Path({!r})); print(1); input()"
    started = [
        subprocess.Popen(
            [sys.executable, "-uc", code.format(str(tmp_path))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(4)
    ]
    try:
        by_pid = sorted(started, key=lambda process: process.pid)
        for place in (2, 0, 3, 1):
            process = by_pid[place]
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"1\n"
        assert sorted(writers(tmp_path)) == [process.pid for process in by_pid]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert writers(tmp_path) == []


def until_stopped(pid: int) -> None:
    """Wait until a process does nothing, which is a moment after the signal."""
    deadline = time.monotonic() + 2
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.001)


def helps(cloud: Cloud) -> int:
    """How many stopped writers were let go on until the node had changed something."""
    cloud.client.execute("SET", "node", b"x")
    return int(cloud.memory.stats()["writers_helped"])


def test_a_stopped_writer_holds_up_nobody(one: RunningCloud, cloud: Cloud) -> None:
    """A client that is stopped in the middle of a change is let finish it, and is stopped again."""
    region = cloud.memory.malloc(100)
    writer = Counting(one, "stopped", region.id)
    slowest, before = 0.0, helps(cloud)
    try:
        for _ in range(30):
            writer.go_on()
            writer.process.send_signal(signal.SIGSTOP)
            began = time.monotonic()
            cloud.client.execute("SET", "node", b"x")
            cloud.memory["mapped"] = b"x"
            slowest = max(slowest, time.monotonic() - began)
            until_stopped(writer.process.pid)
            helped = [helps(cloud) for _ in range(5)]
            assert len(set(helped)) == 1, "it stood in the middle of its next change"
            writer.process.send_signal(signal.SIGCONT)
        assert slowest < 2
        assert helped[0] > before
        assert cloud.memory.stats()["writers_killed"] == 0
    finally:
        writer.kill()


def test_a_signal_handler_may_change_what_it_interrupts(cloud: Cloud) -> None:
    """Handlers that come in the middle of a change make one of their own, and both take place once."""
    memory = cloud.memory
    memory["n"] = memory["handled"] = b"0"
    assert memory["n"] == memory["handled"] == b"0"
    handled = 0

    def handler(_number: int, _frame: object) -> None:
        nonlocal handled
        handled += 1
        memory["handled"] = b"%d" % handled
        assert memory.set("n", b"never", only_if="absent") is False
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.00005, 0.0005))

    chance = random.Random(7)
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0003)
    try:
        deadline = time.monotonic() + 3
        count = 0
        while time.monotonic() < deadline:
            count += 1
            for store in maps._maps.values():
                if store._tables is not None:
                    store._tables.pressed = True  # as at first, and after room had run out
            memory["n"] = b"%d" % count
            assert memory["n"] == b"%d" % count
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert handled > 500
    assert int(memory["handled"]) == handled
    assert cloud.client.execute("GET", "n") == b"%d" % count


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_of_a_signal_handler_leaves_nothing_behind(cloud: Cloud) -> None:
    """Whatever Ctrl-C interrupts, the map is not taken for in use afterwards, and all goes on."""

    class Interrupt(Exception):
        pass

    armed = False

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Interrupt

    def view() -> None:
        with memory.view("large") as data:
            assert data[0] == 7

    memory, count = cloud.memory, 0
    memory["n"], memory["large"] = b"0", bytes([7]) * 60_000
    assert memory.set("due", b"1", ttl_s=100)
    works = (lambda: memory.get("due"), lambda: memory.get("large"), lambda: memory.update(n=b"1"), view)
    store = maps._maps[next(iter(maps._maps))]
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.000211)
    try:
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            work = works[count % len(works)]
            try:
                armed = True
                while armed:  # what is raised in a finalizer is not raised outside of it
                    work()
            except Interrupt:
                pass
            count += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert count > 500
    assert store._idle(0)
    memory["n"] = b"2"
    assert memory["n"] == b"2" == cloud.client.execute("GET", "n")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forks_while_threads_write(cloud: Cloud) -> None:
    """Parent and child both write after a fork, and no change of a thread is lost."""
    memory = cloud.memory
    counts = [0, 0]
    stop = threading.Event()

    def write(index: int) -> None:
        while not stop.is_set():
            memory[f"t{index}"] = b"%d" % (counts[index] + 1)
            counts[index] += 1

    memory["t0"] = memory["t1"] = b"0"
    threads = [threading.Thread(target=write, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    try:
        for number in range(10):
            child = os.fork()
            if child == 0:
                memory["child"] = b"%d" % number
                os._exit(0 if memory["child"] == b"%d" % number else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert [int(memory[f"t{index}"]) for index in (0, 1)] == counts


def test_nobody_writes_to_a_pool_that_is_closed(make_cloud: Callable[..., RunningCloud]) -> None:
    """After the node has stopped in order a client's change is refused: it would be lost with the power."""
    own = make_cloud(1)
    with own.connect() as cloud:
        cloud.memory["a"] = b"1"
        assert cloud.memory["a"] == b"1"
        cloud.memory["a"] = b"2"
        stop_cloud(own.home)
        with pytest.raises(NotRunning):
            cloud.memory["a"] = b"3"


def test_a_full_pool_is_the_nodes_business(make_cloud: Callable[..., RunningCloud]) -> None:
    """A client that finds no room asks the node, whose answer counts; earlier values stay whole."""
    own = make_cloud(1, environment={"VIRGO_MEMORY_CAPACITY_BYTES": str(16 * MiB)})
    with own.connect() as cloud:
        kept = 0
        with pytest.raises(PoolFull):
            for number in range(100):
                cloud.memory[f"{{full}}{number}"] = bytes([number]) * MiB
                kept += 1
        assert 10 <= kept <= 16
        assert all(cloud.memory[f"{{full}}{number}"] == bytes([number]) * MiB for number in range(kept))
        del cloud.memory["{full}0"]
        cloud.memory["{full}0"] = b"there is room again"
