"""Workers killed at random under threads that clone, submit, map and cancel: nothing is lost or run twice.

Five seconds of it in each run; VIRGO_TEST_CHAOS_S=3600 makes an hour of it.
"""

from __future__ import annotations

import concurrent.futures as cf
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
from tests.conftest import RunningCloud, a_cloud

from virgo.cloud import Cloud
from virgo.errors import CallFailed
from virgo.limits import POOL_IDLE_MAX

cloudpickle.register_pickle_by_value(sys.modules[__name__])

CHAOS_S = float(os.environ.get("VIRGO_TEST_CHAOS_S", "5"))


def work(path: str, number: int, seconds: float) -> int:
    """Note that it is run, in one system call; take a while."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, b"%d\n" % number)
    os.close(descriptor)
    if seconds:
        time.sleep(seconds)
    return number


class User:
    """One thread of a program, with numbers of its own for its calls."""

    def __init__(self, cloud: Cloud, directory: Path, seed: int) -> None:
        self.cloud = cloud
        self.path = str(directory / f"noted{seed}")
        self.chance = random.Random(seed)
        self.next = 0
        self.begun: set[int] = set()
        self.ended: set[int] = set()
        self.ends: Counter[str] = Counter()

    def take(self, count: int) -> list[int]:
        numbers = list(range(self.next, self.next + count))
        self.next += count
        return numbers

    def expect(self, number: int, result: Callable[[], int]) -> None:
        """A call ends with its own result, or says that its worker was killed, or was cancelled."""
        try:
            assert result() == number
            self.ended.add(number)
            self.ends["result"] += 1
        except cf.CancelledError:
            self.ends["cancelled"] += 1
        except CallFailed as error:
            assert error.cause == "signal" and "SIGKILL" in error.message, error
            self.ends["killed"] += 1

    def clone(self) -> None:
        (number,) = self.take(1)
        self.expect(number, lambda: self.cloud.cpu.clone(work, self.path, number, self.pause()))

    def submit(self) -> None:
        numbers = self.take(self.chance.randrange(1, 60))
        futures = [self.cloud.cpu.submit(work, self.path, number, self.pause()) for number in numbers]
        for future in self.chance.sample(futures, self.chance.randrange(0, 2)):
            future.cancel()
        for number, future in zip(numbers, futures, strict=True):
            self.expect(number, lambda future=future: future.result(60))  # type: ignore[misc]

    def map(self) -> None:
        numbers = self.take(200)
        results = self.cloud.cpu.map(work, [self.path] * 200, numbers, [0.0] * 200)
        for number in numbers:
            before = self.ends["result"]
            self.expect(number, lambda: next(results))
            if self.ends["result"] == before:  # a map ends with its first failure
                return

    def pause(self) -> float:
        return self.chance.choice([0.0, 0.0, 0.0, 0.0, 0.001, 0.02])

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            self.chance.choice([self.clone, self.submit, self.map])()

    def check(self) -> None:
        """Each call was run at most once, and each with a result was run."""
        runs = Counter(int(line) for line in Path(self.path).read_text().split())
        assert max(runs.values()) == 1
        assert self.ended <= runs.keys()


def workers(running: RunningCloud) -> list[psutil.Process]:
    """All workers: what the templates of the nodes have forked."""
    found = []
    for name in running.names:
        for process in psutil.Process(running.node(name)["pid"]).children():
            if "virgo.cpu.template" in process.cmdline():
                found += process.children()
    return found


def kill_at_random(running: RunningCloud, until: float, kills: list[int]) -> None:
    chance = random.Random(9)
    nodes = workers(running)
    while time.monotonic() < until:
        time.sleep(chance.random() / 5)
        nodes = workers(running) or nodes
        victim = chance.choice(nodes)
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
        kills.append(victim.pid)


@pytest.mark.timeout(CHAOS_S + 100)
def test_workers_killed_at_random_lose_nothing(tmp_path: Path) -> None:
    """Every future ends, with its result or with what became of it; nothing is left behind."""
    kills: list[int] = []
    failures: list[BaseException] = []
    with a_cloud(2, environment={"VIRGO_CPU_WORKERS": "2"}) as running:
        with running.connect() as cloud:
            cloud.cpu.clone(work, str(tmp_path / "warm"), 0, 0.0)
            descriptors = len(list(Path("/proc/self/fd").iterdir()))
            until = time.monotonic() + CHAOS_S
            users = [User(cloud, tmp_path, seed) for seed in range(8)]

            def guarded(run: Callable[..., Any], *arguments: Any) -> None:
                try:
                    run(*arguments)
                except BaseException as error:  # noqa: BLE001 - the test shows it
                    failures.append(error)

            threads = [threading.Thread(target=guarded, args=(user.run, until)) for user in users]
            threads.append(threading.Thread(target=guarded, args=(kill_at_random, running, until, kills)))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not failures
            assert cloud.cpu.stats()["outstanding"] == 0
            for user in users:
                user.check()
            ends = sum((user.ends for user in users), Counter())
            assert (
                len(kills) > CHAOS_S
                and ends["killed"]
                and ends["cancelled"]
                and ends["result"] > 100 * CHAOS_S
            )
            assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 3 * POOL_IDLE_MAX
        deadline = time.monotonic() + 20
        while any(node["leases"] or node["busy"] for node in map(cpu_stats, running.names, [running] * 2)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(workers(running)) <= 4


def cpu_stats(name: str, running: RunningCloud) -> dict[str, Any]:
    with running.connect(name) as connected:
        return dict(connected.stats()["stats"]["cpu"])
