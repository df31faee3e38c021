"""The loss of nodes and of workers, as callers see it."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import contextlib
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cloudpickle
import pytest
from tests.cpu.noting import note_and_sleep, noted
from tests.waiting import alive, until

from virgo.aio import connect as aio_connect
from virgo.errors import CallFailed, NodeLost, NotLoaded, NotRunning

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def slow(number: int) -> int:
    time.sleep(0.05)
    return number


def test_the_loss_of_a_node_is_an_error_unless_the_call_may_be_repeated(make_cloud, tmp_path):
    """At most once by default; with retries= the call is run on another node; pinned, it is NodeLost."""
    running = make_cloud(2, environment={"VIRGO_CPU_WORKERS": "2"})
    with running.connect("n1") as cloud:
        once = cloud.cpu.submit_to(note_and_sleep, (str(tmp_path / "once"),), node="n2")
        pid = noted(tmp_path / "once")

        def again(path: str) -> str:
            if not Path(path).exists():
                Path(path).write_text(str(os.getpid()))
                time.sleep(100)
            return os.environ["VIRGO_NODE"]

        blockers = [cloud.cpu.submit_to(time.sleep, (3,), node="n1") for _ in range(2)]
        repeated = cloud.cpu.submit_to(again, (str(tmp_path / "again"),), retries=1)
        first = noted(tmp_path / "again")
        os.kill(running.node("n2")["pid"], signal.SIGKILL)
        with pytest.raises(NodeLost):
            once.result(10)
        assert repeated.result(30) in ("n1", "n2")
        until(lambda: not alive(pid) and not alive(first))
        for blocker in blockers:
            blocker.result(10)


def test_calls_that_may_be_repeated_survive_the_loss_of_the_connected_node(make_cloud):
    """Through the node and by leased workers, of either client: it is started again, and so are they."""
    running = make_cloud(1)

    async def main() -> list[int]:
        async with await aio_connect(f"unix:{running.socket('n1')}", home=running.home) as cloud:
            options = {"retries": 1, "memory": "64 MiB"}
            tasks = [cloud.cpu.submit_to(slow, (number,), **options) for number in range(20)]
            return list(await asyncio.gather(*tasks))

    with running.connect("n1") as cloud, ThreadPoolExecutor(2) as threads:
        futures = [
            cloud.cpu.submit_to(slow, (number,), **options)
            for number in range(40)
            for options in ({"retries": 1, "memory": "64 MiB"}, {"retries": 1})
        ]
        waited = threads.submit(cloud.cpu.clone, slow, 7, retries=1, memory="64 MiB")
        tasks = threads.submit(asyncio.run, main())
        assert futures[0].result(30) == 0
        os.kill(running.node("n1")["pid"], signal.SIGKILL)
        assert [future.result(60) for future in futures] == [n for n in range(40) for _ in range(2)]
        assert waited.result(60) == 7
        assert tasks.result(60) == list(range(20))


def test_the_loss_of_the_connected_node_fails_every_future(make_cloud):
    """Futures of a killed node end with NodeLost in bounded time, and later calls reach it restarted."""
    running = make_cloud(1)
    with running.connect("n1") as cloud:
        futures = [cloud.cpu.submit(time.sleep, 100) for _ in range(200)]
        until(futures[0].running)
        os.kill(running.node("n1")["pid"], signal.SIGKILL)
        for future in futures:
            with pytest.raises((NodeLost, NotRunning)):
                future.result(10)

        def back() -> bool:
            try:
                return cloud.cpu.submit(abs, -7).result(10) == 7
            except (NodeLost, NotRunning, NotLoaded):
                return False

        until(back, within_s=30)
        last = cloud.cpu.submit(time.sleep, 100)
        until(last.running)
        os.kill(running.node("n1")["pid"], signal.SIGKILL)
    assert last.done()  # closing a connection to a dead node is no error
    with pytest.raises((NodeLost, NotRunning, cf.CancelledError)):
        last.result()


def test_workers_killed_at_random_lose_no_future_and_mix_up_no_result(make_cloud):
    """While workers are killed, each call gives its own result or says that it was killed."""
    running = make_cloud(1, environment={"VIRGO_CPU_WORKERS": "3"})
    with running.connect("n1") as cloud:
        pids = [cloud.cpu.submit("pid") for _ in range(20)]
        victims = {future.result(10) for future in pids}
        futures = {
            value: cloud.cpu.submit(lambda value=value: (time.sleep(0.01), value)[1]) for value in range(300)
        }
        killed = 0
        while not all(future.done() for future in futures.values()):
            for pid in victims:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
            with contextlib.suppress(CallFailed):  # its worker may be the one that was just killed
                victims = {cloud.cpu.clone("pid")}
        failed = 0
        for value, future in futures.items():
            try:
                assert future.result(10) == value
            except CallFailed as error:
                assert error.cause == "signal"
                failed += 1
        assert killed and failed < len(futures) / 2


def test_calls_of_a_node_that_is_stopped_are_lost_and_not_cancelled(make_cloud):
    """Who waits for a call when its node is shut down is told NodeLost: nobody has cancelled it."""
    own = make_cloud(1)
    with own.connect() as connected:
        future = connected.cpu.submit(time.sleep, 60.0)
        until(future.running)
        os.kill(own.node("n1")["pid"], signal.SIGTERM)
        with pytest.raises(NodeLost):
            future.result(30)
