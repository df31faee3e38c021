"""Calls ended by somebody else than their caller: who is told what, and that only these are ended."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
from tests.conftest import RunningCloud
from tests.waiting import alive, until

from virgo import context as contexts
from virgo.aio import connect as aio_connect
from virgo.cloud import Cloud
from virgo.context import Context, Identity
from virgo.cpu.core import Ledger
from virgo.cpu.kills import Kills
from virgo.cpu.seen import TaskInfo
from virgo.errors import BadArgument, CallFailed, Denied

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def noted(path: str, seconds: float) -> int:
    """Say that it runs, by its process."""
    with Path(path).open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(seconds)
    return os.getpid()


def stubborn(path: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    noted(path, 100)


def the_one(cloud: Cloud, label: str, state: str = "running") -> TaskInfo:
    """The call of that name, once it is there."""
    return until(
        lambda: next((one for one in cloud.cpu.tasks() if (one.label, one.state) == (label, state)), None)
    )


@pytest.mark.parametrize("function", [noted, stubborn])
def test_who_waits_is_told_by_whom_it_was_ended(
    running: RunningCloud, cloud: Cloud, tmp_path: Path, options: dict[str, Any], function: Any
) -> None:
    """It is dead then, and is not repeated; calls behind it run."""
    path = str(tmp_path / "runs")
    arguments = (path,) if function is stubborn else (path, 100.0)
    future = cloud.cpu.submit_to(function, arguments, retries=3, **options)
    behind = [cloud.cpu.submit_to(abs, (-number,), **options) for number in range(20)]
    task = the_one(cloud, function.__name__)
    until(lambda: Path(path).exists())
    with running.connect() as other:
        other.cpu.kill(task.task)
    pids = list(map(int, Path(path).read_text().split()))
    assert len(pids) == 1 and not alive(pids[0])
    with pytest.raises(CallFailed, match=f"cancelled by {task.owner}") as caught:
        future.result(20)
    assert (caught.value.cause, caught.value.attempts, caught.value.node) == ("cancelled", 1, "n1")
    assert [one.result(20) for one in behind] == list(range(20))
    assert Path(path).read_text().split() == [str(pids[0])]
    with pytest.raises(BadArgument, match="runs or waits"):
        cloud.cpu.kill(task.task)


def test_a_call_that_waits_is_ended_before_it_begins(cloud: Cloud, tmp_path: Path) -> None:
    """And those before and behind it are not."""
    path = str(tmp_path / "runs")
    held = cloud.cpu.submit_to(time.sleep, (100,), cpus=2)
    the_one(cloud, "sleep")
    waiting = cloud.cpu.submit_to(noted, (path, 0.0), cpus=2, node="n1")
    behind = cloud.cpu.submit_to(abs, (-5,), cpus=2)
    cloud.cpu.kill(the_one(cloud, "noted", "waiting").task)
    with pytest.raises(CallFailed, match=r"cancelled by .* before it began"):
        waiting.result(20)
    held.cancel()
    assert behind.result(20) == 5 and not Path(path).exists()


def test_only_the_call_itself_is_ended(running: RunningCloud, cloud: Cloud, tmp_path: Path) -> None:
    """A leased worker goes from call to call meanwhile: what is killed is what was seen to run."""
    results: list[Any] = []
    ids: list[str] = []

    def own_id() -> str:
        current = contexts.current()
        assert current is not None
        time.sleep(0.002)
        return current.id

    def call() -> None:
        for _ in range(300):
            try:
                results.append(cloud.cpu.clone(own_id))
            except CallFailed as error:
                results.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    with running.connect() as other:
        while caller.is_alive():
            time.sleep(0.02)
            for task in other.cpu.tasks():
                if task.label.endswith("own_id") and task.state == "running":
                    try:
                        other.cpu.kill(task.task)
                    except BadArgument:
                        continue
                    ids.append(task.task)
    caller.join()
    failed = [one for one in results if isinstance(one, CallFailed)]
    assert len(results) == 300 and len(failed) == len(ids) > 5
    assert all(error.cause == "cancelled" for error in failed)
    assert not set(ids) & {one for one in results if isinstance(one, str)}


def test_a_worker_that_is_held_goes_on_if_whoever_kills_goes_away(tmp_path: Path) -> None:
    """The client that asks for a kill dies just then: the worker is not left stopped."""
    sent: list[signal.Signals] = []

    async def main() -> None:
        with subprocess.Popen(["sleep", "60"]) as process:
            worker: Any = SimpleNamespace(pid=process.pid, signal=sent.append)  # so that it does not stop
            ledger, call = Ledger(target=1), SimpleNamespace(number=1, hiring=True, label="x", task="y")
            ledger.warm(1)
            ledger.ready(1)
            ledger.submit(1)
            killing = asyncio.create_task(Kills("n1", ledger, {}, {1: worker}).kill(call, "y", "me"))  # type: ignore[arg-type]
            while not sent:
                await asyncio.sleep(0)
            killing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await killing
            process.kill()

    asyncio.run(main())
    assert sent == [signal.SIGSTOP, signal.SIGCONT]


def test_calls_are_ended_by_their_owner_or_an_admin(cloud: Cloud, tmp_path: Path) -> None:
    """Others are denied, and it runs on."""

    def on_behalf(name: str, *roles: str) -> Context:
        return Context(id=contexts.new_id(), identity=Identity(name, frozenset(roles)))

    path = str(tmp_path / "runs")
    with contexts.using(on_behalf("alice", "read", "write", "exec")):
        future = cloud.cpu.submit(noted, path, 100.0)
    task = the_one(cloud, "noted")
    assert task.owner == "alice"
    until(lambda: Path(path).exists())
    with contexts.using(on_behalf("bob", "read", "write", "exec")), pytest.raises(Denied):
        cloud.cpu.kill(task.task)
    assert not future.done()
    with contexts.using(on_behalf("carol", "read", "write", "admin")):
        cloud.cpu.kill(task.task)
    with pytest.raises(CallFailed, match="cancelled by carol"):
        future.result(20)
    for unknown in ("", "nonsense", "\n"):
        with pytest.raises(BadArgument):
            cloud.cpu.kill(unknown)


def test_a_call_is_ended_from_any_node_and_from_asyncio(cloud3: RunningCloud, tmp_path: Path) -> None:
    """Wherever it runs."""

    async def end(task: str) -> None:
        async with await aio_connect(f"unix:{cloud3.socket('n2')}") as connected:
            await connected.cpu.kill(task)

    with cloud3.connect("n1") as cloud:
        future = cloud.cpu.submit_to(noted, (str(tmp_path / "runs"), 100.0), node="n3")
        asyncio.run(end(the_one(cloud, "noted").task))
        with pytest.raises(CallFailed, match="node n3 was cancelled by"):
            future.result(20)
