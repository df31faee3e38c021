"""An embedded engine that runs but cannot serve is started anew; nothing acknowledged is lost by it.

Each look at the engine takes its time before it counts as failed, so these tests wait for half a minute.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from conftest import RunningCloud, a_cloud
from node.test_faults import attempt, until
from virgo.cloud import Cloud
from virgo.kernel.process import ProcessMark
from virgo.limits import ENGINE_ROOM_BYTES

HEALED_S = 120.0  # thrice what it takes on an idle machine
pytestmark = pytest.mark.timeout(4 * HEALED_S)


def servers(running: RunningCloud) -> list[int]:
    """Process ids of the engine's servers."""
    return [one["pid"] for one in running.status()["engine"]["embedded"]]


def write(cloud: Cloud, tag: str) -> bool:
    """Whether keys in slots that nobody has taken so far find a place, which needs the engine to write.

    They are few, since with each new one its node takes 64 of the 4096 slots, and some have to be left.
    """
    return attempt(lambda: cloud.memory.update({f"{tag}-{i}".encode(): b"x" for i in range(40)})) is None


def limit_file_size(pid: int, size: int) -> None:
    """Let a running process write no file beyond that size, as if its disk were full."""
    _soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


def log_of(running: RunningCloud) -> str:
    return (running.home / "log" / "up.log").read_text()


def stopped(running: RunningCloud) -> None:
    with running.connect(timeout_s=60) as cloud:
        assert write(cloud, "before")
        (old,) = servers(running)
        os.kill(old, signal.SIGSTOP)
        until(lambda: servers(running)[0] not in (0, old), within_s=HEALED_S, what="another server runs")
        until(lambda: write(cloud, "after"), within_s=HEALED_S, what="the engine writes")
        assert cloud.memory[b"before-39"] == b"x"
        assert running.status()["engine"]["restarts"] >= 1
    assert not Path(f"/proc/{old}").exists()


def unwritable(running: RunningCloud) -> None:
    supervisor = running.status()["up"]
    with running.connect(timeout_s=60) as cloud:
        assert write(cloud, "before")
        (old,) = servers(running)
        limit_file_size(supervisor, ENGINE_ROOM_BYTES // 2)
        limit_file_size(old, 100)
        assert not write(cloud, "refused")
        until(lambda: "does not help" in log_of(running), within_s=HEALED_S, what="that it is left alone")
        assert servers(running) == [old]
        assert not write(cloud, "refused")
        limit_file_size(supervisor, resource.RLIM_INFINITY)
        until(lambda: servers(running)[0] not in (0, old), within_s=HEALED_S, what="another server runs")
        until(lambda: write(cloud, "after"), within_s=HEALED_S, what="the engine writes")
        assert cloud.memory[b"before-39"] == b"x"


def one_of_three(running: RunningCloud) -> None:
    with running.connect(timeout_s=60) as cloud:
        first, *others = servers(running)
        os.kill(first, signal.SIGSTOP)
        until(lambda: write(cloud, "meanwhile"), within_s=HEALED_S, what="the others write")
        until(lambda: servers(running)[0] not in (0, first), within_s=HEALED_S, what="another server runs")
        assert servers(running)[1:] == others
        assert cloud.memory[b"meanwhile-39"] == b"x"


@pytest.fixture(scope="module")
def scenarios() -> Iterator[dict[str, Future[None]]]:
    """Those that mostly wait, each with a cloud of its own, side by side."""
    with ExitStack() as clouds, ThreadPoolExecutor() as threads:
        places = [(work, clouds.enter_context(a_cloud(engines=engines))) for work, engines in _SCENARIOS]
        yield {work.__name__: threads.submit(work, running) for work, running in places}


_SCENARIOS = ((stopped, 1), (unwritable, 1), (one_of_three, 3))


def test_a_stopped_engine_is_replaced(scenarios: dict[str, Future[None]]) -> None:
    """SIGSTOP of the only server, which SIGTERM does not end: it is killed and started anew."""
    scenarios["stopped"].result()


def test_an_engine_that_could_not_write_is_replaced_when_the_disk_takes_writes_again(
    scenarios: dict[str, Future[None]],
) -> None:
    """While the disk takes nothing the server is left alone, since it answers reads; then it is replaced."""
    scenarios["unwritable"].result()


def test_a_stopped_server_of_a_cluster_is_replaced(scenarios: dict[str, Future[None]]) -> None:
    """SIGSTOP of one server of three: the others serve on, and it is replaced before a second may fail."""
    scenarios["one_of_three"].result()


def test_an_engine_that_cannot_be_started_is_tried_until_it_can(
    make_cloud: Callable[..., RunningCloud],
) -> None:
    """A fault of the file system at the restart ends neither the watch over the engine nor the cloud."""
    running = make_cloud(1)
    (old,) = servers(running)
    configuration = running.home / "engine" / "1" / "engine.conf"
    configuration.unlink()
    configuration.mkdir()
    os.kill(old, signal.SIGKILL)
    until(lambda: "cannot be started" in log_of(running), within_s=HEALED_S, what="the refusal is logged")
    configuration.rmdir()
    until(lambda: servers(running)[0] not in (0, old), within_s=HEALED_S, what="another server runs")
    with running.connect(timeout_s=60) as cloud:
        until(lambda: write(cloud, "after"), within_s=HEALED_S, what="the engine writes")


@pytest.mark.parametrize("state", ["serving", "stopping"])
def test_a_record_that_cannot_be_written_stops_nobody(
    make_cloud: Callable[..., RunningCloud], state: str
) -> None:
    """Where the supervisor's record finds no room, restarts and the end of the cloud go on."""
    running = make_cloud(1)
    record = running.status()
    (old,), node = servers(running), running.node("n1")["pid"]
    supervisor = ProcessMark.of(record["up"])
    blocked = running.home / "run" / f".up.json.{record['up']}"
    blocked.mkdir()  # what the record is written to before it takes its place
    try:
        if state == "serving":
            os.kill(old, signal.SIGKILL)
            until(lambda: "could not be recorded" in log_of(running), within_s=HEALED_S, what="it is logged")
            with running.connect(timeout_s=60) as cloud:
                until(lambda: write(cloud, "after"), within_s=HEALED_S, what="the engine writes")
        else:
            os.kill(record["up"], signal.SIGTERM)
            until(lambda: not supervisor.alive(), within_s=HEALED_S, what="the supervisor ended")
            assert not Path(f"/proc/{node}").exists()
            assert not Path(f"/proc/{old}").exists()
    finally:
        blocked.rmdir()
