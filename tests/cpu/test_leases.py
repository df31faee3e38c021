"""Leased workers through a node: fair shares, losses, slow calls, clients that die."""

from __future__ import annotations

import concurrent.futures as cf
import contextlib
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy
import psutil
import pytest
import redis
from tests.conftest import RunningCloud
from tests.waiting import until

from virgo import context as contexts
from virgo.cloud import Cloud
from virgo.context import Context, Identity
from virgo.cpu.calls import Item
from virgo.cpu.segments import Segment
from virgo.errors import CallFailed, Denied, NodeLost, NotRunning
from virgo.limits import APART_SPARE_MAX

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def cpu(running: RunningCloud) -> dict[str, Any]:
    with running.connect() as connected:
        return dict(connected.stats()["stats"]["cpu"])


def double(number: int) -> int:
    return 2 * number


def note(path: str, number: int) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, b"%d\n" % number)
    os.close(descriptor)
    return number


def noted(path: Path) -> Counter[int]:
    return Counter(int(line) for line in path.read_text().split()) if path.exists() else Counter()


def test_workers_killed_under_a_map_cost_their_own_call_and_no_other(cloud: Cloud, tmp_path: Path) -> None:
    """Of ten thousand calls a few kill their worker: these fail with the signal, all others are run once."""
    path = str(tmp_path / "noted")

    def work(number: int) -> int:
        note(path, number)
        if number % 1111 == 500:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    futures = [cloud.cpu.submit(work, number) for number in range(10_000)]
    for number, future in enumerate(futures):
        if number % 1111 == 500:
            with pytest.raises(CallFailed) as caught:
                future.result(30)
            assert caught.value.cause == "signal" and "SIGKILL" in caught.value.message
        else:
            assert future.result(30) == number
    assert noted(Path(path)) == Counter(range(10_000))


def test_a_slow_call_among_quick_ones_holds_up_none_of_them(cloud: Cloud, tmp_path: Path) -> None:
    """What was sent to its worker goes to the other one; what it had finished comes at once."""
    gate = str(tmp_path / "gate")

    def work(number: int) -> int:
        while number == 100 and not Path(gate).exists():
            time.sleep(0.005)
        return number

    list(cloud.cpu.map(work, range(50)))  # they turn out to be quick
    futures = [cloud.cpu.submit(work, number) for number in range(3000)]
    others = [future for number, future in enumerate(futures) if number != 100]
    _, left = cf.wait(others, 20)
    assert not left and not futures[100].done()
    Path(gate).touch()
    assert [future.result(20) for future in futures] == list(range(3000))


def test_two_slow_calls_in_a_row_run_beside_each_other(cloud: Cloud) -> None:
    """Calls believed quick, sent to one worker together, do not wait for each other when they are slow."""
    list(cloud.cpu.map(double, range(50)))

    def work(seconds: float) -> float:
        time.sleep(seconds)
        return time.monotonic()

    list(cloud.cpu.map(work, [0.0] * 200))
    began = time.monotonic()
    list(cloud.cpu.map(work, [0.0, 1.0, 1.0, 0.0]))
    assert time.monotonic() - began < 1.8


def test_a_client_that_has_all_workers_shares_them(running: RunningCloud, cloud: Cloud) -> None:
    """A second client, and a call by name by RESP, are served while the first has work without end."""
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            list(cloud.cpu.map(double, range(20_000)))

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        until(lambda: cpu(running)["leases"] == 2)
        with running.connect() as second:
            for number in range(20):
                began = time.monotonic()
                assert second.cpu.clone(double, number) == 2 * number
                assert time.monotonic() - began < 2.0
        resp = redis.Redis(port=running.ports("n1")["cpu"], password=running.token)
        assert resp.execute_command("VIRGO_CLONE", "add", 2, 3) == 5
    finally:
        stop.set()
        thread.join()


def test_idle_leases_go_to_whoever_comes(running: RunningCloud) -> None:
    """Five clients with two workers, one call after another, without waiting for turns."""
    clients = [running.connect() for _ in range(5)]
    try:
        for client in clients:
            client.cpu.clone(double, 1)
        began = time.monotonic()
        for _ in range(4):
            for client in clients:
                time.sleep(0.003)
                assert client.cpu.clone(double, 2) == 4
        assert time.monotonic() - began < 4.0
    finally:
        for client in clients:
            client.close()


def test_leases_end_with_their_client(running: RunningCloud) -> None:
    """Closing gives them back at once; calls that run then are stopped."""
    client = running.connect()
    future = client.cpu.submit(time.sleep, 100)
    until(future.running)
    assert cpu(running)["leases"] >= 1
    client.close()
    assert future.cancelled()
    until(lambda: cpu(running)["leases"] == 0, within_s=5)


def who() -> tuple[str, str]:
    current = contexts.current()
    assert current is not None
    return current.identity.name, str(os.getpid())


def on_behalf(name: str, *roles: str) -> Context:
    return Context(id=contexts.new_id(), identity=Identity(name, frozenset(roles)))


def test_calls_run_for_whom_they_are_made(cloud: Cloud) -> None:
    """Those of several identities beside each other too, each with workers of its own."""
    waiting = cloud.cpu.submit(time.sleep, 60)
    with contexts.using(on_behalf("alice", "write", "exec")):
        assert cloud.cpu.clone(who)[0] == "alice"
        late = cloud.cpu.submit_to(who, timeout=30.0)
    with contexts.using(on_behalf("bob", "read", "write")), pytest.raises(Denied, match="exec"):
        cloud.cpu.clone(who)
    assert late.result(20)[0] == "alice"
    until(waiting.running)
    assert waiting.cancel() or waiting.cancelled()
    assert cloud.cpu.clone(who)[0] == f"uid:{os.getuid()}"


def test_a_client_has_one_crew_however_many_threads_begin(running: RunningCloud) -> None:
    """One that was made twice would hold workers that nobody uses, and give none of them back."""
    for _ in range(10):
        with running.connect() as client:
            begin = threading.Barrier(16)

            def first(client: Cloud = client, begin: threading.Barrier = begin) -> int:
                begin.wait()
                return int(client.cpu.submit(double, 4).result(20))

            with cf.ThreadPoolExecutor(16) as threads:
                assert [each.result() for each in [threads.submit(first) for _ in range(16)]] == [8] * 16
            assert cpu(running)["lessees"] == 1
        until(lambda: cpu(running)["lessees"] == 0, within_s=5)


def test_what_was_sent_is_let_go_at_once(cloud: Cloud) -> None:
    """Arrays of calls that have ended take no memory and no descriptors until something is collected."""
    array = numpy.arange(100_000, dtype=float)
    gc.disable()
    try:
        for _ in range(20):
            assert cloud.cpu.clone(numpy.sum, array) == array.sum()
            assert cloud.cpu.submit(numpy.max, array).result(20) == 99_999.0
        assert Segment.alive <= 2 * APART_SPARE_MAX
    finally:
        gc.enable()


def test_a_client_that_was_closed_leases_no_more(running: RunningCloud) -> None:
    """A call of it is refused, as any other request."""
    client = running.connect()
    assert client.cpu.clone(double, 1) == 2
    client.close()
    with pytest.raises(NotRunning, match="closed"):
        client.cpu.clone(double, 2)


def test_a_function_whose_loading_raises_key_error_says_so(cloud: Cloud) -> None:
    """It is not taken for a name that is not exported."""

    class Odd:
        def __reduce__(self) -> tuple[Any, ...]:
            return dict.pop, ({}, "absent")

    odd = Odd()
    with pytest.raises(CallFailed, match=r"cannot be loaded.*KeyError.*absent"):
        cloud.cpu.clone(lambda: odd)


@contextlib.contextmanager
def client(running: RunningCloud, begins: str) -> Iterator[subprocess.Popen[str]]:
    """A program that has begun calls of `cloud`, and waits."""
    program = f"""
import os, sys, time, virgo
cloud = virgo.connect("unix:{running.socket("n1")}")
{begins}
print("begun", flush=True)
sys.stdin.read()
"""
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(command, env=running.environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        yield process


def test_a_client_killed_with_many_calls_leaves_nothing(running: RunningCloud, tmp_path: Path) -> None:
    """The workers are free again within seconds, and what they ran is dead."""
    begins = f"""
def work(number):
    open("{tmp_path}/" + str(os.getpid()), "w").close()
    time.sleep(0.5)
calls = [cloud.cpu.submit(work, number) for number in range(10_000)]
"""
    with client(running, begins) as process:
        until(lambda: len(list(tmp_path.iterdir())) == 2)
        process.kill()
    until(lambda: cpu(running)["leases"] == 0, within_s=5)
    until(lambda: not any(psutil.pid_exists(int(path.name)) for path in tmp_path.iterdir()) or idle(running))
    with running.connect() as other:
        assert list(other.cpu.map(double, range(100))) == [2 * number for number in range(100)]


def test_calls_through_the_node_of_a_client_that_is_killed_end_with_it(running: RunningCloud) -> None:
    begins = """
calls = [cloud.cpu.submit_to(time.sleep, (0.1,), memory="64 MiB") for _ in range(1000)]
calls[0].result()
"""
    with client(running, begins) as process:
        process.kill()
    with running.connect() as other:
        until(lambda: not [task for task in other.cpu.tasks() if task.state != "leased"], within_s=5)


def slates() -> int:
    """Descriptors of leases that this process has."""
    found = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += "virgo-lease" in str(path.readlink())
    return found


def test_no_descriptors_of_dead_workers_are_kept(cloud: Cloud) -> None:
    """Also while nothing is collected that refers to itself."""
    gc.collect()
    gc.disable()
    try:
        failures = [cloud.cpu.submit(os._exit, 1) for _ in range(10)]
        assert all(isinstance(one.exception(30), CallFailed) for one in failures)
        until(lambda: slates() <= 2)
    finally:
        gc.enable()


def test_a_map_keeps_nothing_of_calls_whose_results_were_taken(cloud: Cloud) -> None:
    """Nor does it keep the calls, so that it may go on for ever."""
    gc.collect()
    for results in (
        cloud.cpu.map(double, itertools.count(), buffersize=20),
        cloud.cpu.map_unordered(double, itertools.count(), buffersize=20),
    ):
        next(results)
        for _ in range(2000):
            next(results)
        assert sum(isinstance(one, Item) for one in gc.get_objects()) < 200
        results.close()


def idle(running: RunningCloud) -> bool:
    return bool(cpu(running)["busy"] == 0)


def test_a_worker_that_dies_between_calls_is_replaced_unnoticed(cloud: Cloud) -> None:
    """The call that finds it dead has not begun, and is run by another."""
    for _ in range(5):
        pid = cloud.cpu.clone(os.getpid)
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: not psutil.pid_exists(pid))
        assert cloud.cpu.clone(double, 4) == 8


def test_calls_wait_no_longer_than_seconds_for_a_node_that_is_stopped(running: RunningCloud) -> None:
    """SIGSTOP of the node: NodeLost for who needs a worker of it; who has one goes on."""
    with running.connect() as first, running.connect() as second:
        assert first.cpu.clone(double, 1) == 2
        node = running.node("n1")["pid"]
        os.kill(node, signal.SIGSTOP)
        try:
            assert first.cpu.clone(double, 2) == 4
            began = time.monotonic()
            with pytest.raises(NodeLost):
                second.cpu.submit(double, 3).result(20)
            assert time.monotonic() - began < 7
        finally:
            os.kill(node, signal.SIGCONT)
        until(lambda: second.cpu.submit(double, 4).exception() is None)


def test_cancelling_one_of_many_leaves_the_others(cloud: Cloud, tmp_path: Path) -> None:
    """One that runs dies with its process; one that waits is dropped; the rest is run once."""
    path, gate = tmp_path / "noted", tmp_path / "gate"

    def work(number: int) -> int:
        note(str(path), number)
        while number < 2 and not gate.exists():
            time.sleep(0.005)
        return number

    futures = [cloud.cpu.submit(work, number) for number in range(200)]
    until(lambda: noted(path).keys() >= {0, 1})
    assert futures[1].cancel() and futures[150].cancel()
    gate.touch()
    results = [future.result(20) for future in futures if not future.cancelled()]
    assert results == [number for number in range(200) if number not in (1, 150)]
    assert noted(path) == Counter(number for number in range(200) if number != 150)


def test_a_cloud_left_alone_gives_its_workers_back(running: RunningCloud) -> None:
    """Without anybody waiting the node takes a lease back that has not been used for ten seconds."""
    with running.connect() as client:
        client.cpu.clone(double, 1)
        assert cpu(running)["leases"] == 1
        until(lambda: cpu(running)["leases"] == 0, within_s=15)
        assert client.cpu.clone(double, 2) == 4
