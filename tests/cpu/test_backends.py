"""The same calls by VIRGO's own workers, by Dask and by Ray: results and errors alike."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cloudpickle
import numpy
import pytest
from tests.conftest import RunningCloud, a_cloud
from tests.cpu.engines import dask_cluster, ray_cluster, ray_environment, settings
from tests.waiting import until

import virgo
from virgo import aio
from virgo.cloud import Cloud
from virgo.cpu.backends.claims import Claims
from virgo.cpu.backends.remote import LOST
from virgo.cpu.messages import TAKEN
from virgo.errors import (
    BadArgument,
    BadConfig,
    CallFailed,
    DeadlineExceeded,
    NoNode,
    NotRunning,
)
from virgo.testing.executor_contract import CLAIMS, Claim

cloudpickle.register_pickle_by_value(sys.modules[__name__])

OTHERS = ("dask", "ray")


@pytest.fixture(scope="module")
def running() -> Iterator[RunningCloud]:
    """A node that runs two calls at once."""
    with a_cloud(environment={"VIRGO_CPU_WORKERS": "2"}) as found:
        yield found


@pytest.fixture(scope="module")
def dask() -> Iterator[dict[str, str]]:
    """The settings for a Dask cluster."""
    with dask_cluster() as (address, _):
        yield settings("dask", address)


@pytest.fixture(scope="module")
def ray(running: RunningCloud) -> Iterator[dict[str, str]]:
    """The settings for a Ray cluster, to which this process stays connected."""
    secret = ray_environment()
    with ray_cluster(secret) as (address, _), pytest.MonkeyPatch.context() as patch:
        found = {**settings("ray", address), **secret}
        for name, value in found.items():
            patch.setenv(name, value)
        with running.connect() as cloud:
            cloud.cpu.clone(abs, -1)
            for name in settings("", ""):
                patch.delenv(name)
            yield found


@pytest.fixture(params=("virgo", "dask", "ray"), scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where `virgo.connect()` has calls run."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "virgo":
            for name, value in request.getfixturevalue(request.param).items():
                patch.setenv(name, value)
        yield request.param


@pytest.fixture
def cloud(engine: str, running: RunningCloud) -> Iterator[Cloud]:
    with running.connect() as connected:
        yield connected


# --- what is run ----------------------------------------------------------------------------------


class Odd(Exception):
    """Does not unpickle."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def square(number: int) -> int:
    return number * number


def named(first: Any, *, second: Any = 0) -> tuple[Any, Any]:
    return first, second


async def awaited(number: int) -> int:
    await asyncio.sleep(0.01)
    return number + 1


def fail(text: str) -> None:
    raise ZeroDivisionError(text)


def fail_oddly() -> None:
    raise Odd(1, 2)


def leave(status: int) -> None:
    sys.exit(status)


def unpicklable() -> Any:
    return (number for number in range(3))


def die(path: str, how: str) -> None:
    with Path(path).open("a") as file:
        file.write("x")
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


def work(path: str, go: str = "/nowhere") -> str:
    """Make a file longer again and again, in small steps, until another file is there."""
    while not Path(go).exists():
        with Path(path).open("ab") as file:
            file.write(b"x")
        time.sleep(0.01)
    return go


def sleep(path: str, seconds: float) -> None:
    """Sleep in one piece, between two marks."""
    Path(path).touch()
    try:
        time.sleep(seconds)
    finally:
        Path(path).write_text("ended")


def fill(size: int) -> int:
    return len(bytearray(size))


def context() -> tuple[str, float | None]:
    current = virgo.context.current()
    assert current is not None
    return current.id, current.remaining_s()


def total(array: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    array += 1
    return array


def fork() -> str:
    if os.fork() == 0:
        return "child"
    os.wait()
    return "parent"


def still(path: Path) -> bool:
    """Whether a file has stopped growing."""
    size = path.stat().st_size
    time.sleep(0.1)
    return path.stat().st_size == size


# --- results --------------------------------------------------------------------------------------


def test_all_ways_to_call_give_results(cloud: Cloud) -> None:
    """clone, submit, map, starmap, map_unordered, as_completed; what is called by name goes to the nodes."""
    cpu = cloud.cpu
    assert cpu.clone(square, 7) == 49
    assert cpu.clone(named, [1], second={"two": 2}) == ([1], {"two": 2})
    assert cpu.submit(awaited, 1).result(30) == 2
    assert list(cpu.map(square, range(60))) == [number**2 for number in range(60)]
    assert list(cpu.map(square, range(20), chunksize=6)) == [number**2 for number in range(20)]
    assert list(cpu.map(square, range(20), buffersize=3)) == [number**2 for number in range(20)]
    assert list(cpu.starmap(pow, [(2, 3), (3, 2)])) == [8, 9]
    assert sorted(cpu.map_unordered(square, range(5))) == [0, 1, 4, 9, 16]
    futures = {cpu.submit(lambda base=base: base * 2): base for base in range(5)}
    assert {futures[done]: done.result() for done in cf.as_completed(futures, 30)} == {
        base: base * 2 for base in range(5)
    }
    assert cpu.clone("add", 2, 3) == 5
    assert cpu.workers() == 2
    assert cpu.stats()["outstanding"] == 0


def test_large_arrays_go_and_come(cloud: Cloud) -> None:
    """20 MB there and back, as its own to write to."""
    array = numpy.arange(2_500_000, dtype=numpy.float64)
    assert (cloud.cpu.clone(total, array) == array + 1).all()


def test_a_call_has_a_context(cloud: Cloud) -> None:
    """An id of its own, and the time that is left to it."""
    first, second = cloud.cpu.clone(context, timeout=50), cloud.cpu.clone(context)
    assert first[0] and second[0] and first[0] != second[0]
    assert first[1] is not None and 20 < first[1] <= 50 and second[1] is None


# --- errors ---------------------------------------------------------------------------------------


def test_the_exception_itself_is_raised(cloud: Cloud) -> None:
    """Caused by a CallFailed that has the remote traceback, and nothing of VIRGO's own frames."""
    for run in (cloud.cpu.clone, lambda *what: cloud.cpu.submit(*what).result(30)):
        with pytest.raises(ZeroDivisionError, match="none") as caught:
            run(fail, "none")
        cause = caught.value.__cause__
        assert isinstance(cause, CallFailed) and (cause.cause, cause.attempts) == ("exception", 1)
        assert "in fail" in cause.remote_traceback and "outcomes.py" not in cause.remote_traceback
        assert "remote.py" not in cause.remote_traceback
    results = cloud.cpu.map(lambda number: 1 / number, [1, 2, 0, 4])
    assert [next(results), next(results)] == [1.0, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_what_does_not_pickle_is_named(cloud: Cloud) -> None:
    """A result or an exception that cannot travel is CallFailed with its text; so is sys.exit."""
    with pytest.raises(CallFailed, match="1 and 2") as caught:
        cloud.cpu.clone(fail_oddly)
    assert "fail_oddly" in caught.value.remote_traceback
    with pytest.raises(CallFailed, match="cannot be sent back") as caught:
        cloud.cpu.clone(unpicklable)
    assert caught.value.cause == "result"
    with pytest.raises(CallFailed, match=r"sys\.exit\(4\)") as caught:
        cloud.cpu.clone(leave, 4)
    assert caught.value.cause == "exit"


def test_a_call_that_kills_its_worker_runs_once(cloud: Cloud, engine: str, tmp_path: Path) -> None:
    """CallFailed with the cause, as far as it is known; what waits is run; nothing is run twice.

    VIRGO tells an exit from a signal; Dask and Ray only say that the worker is gone.
    """
    for how in ("exit", "kill"):
        path = tmp_path / how
        deadly = cloud.cpu.submit(die, str(path), how)
        others = [cloud.cpu.submit(square, number) for number in range(6)]
        with pytest.raises(CallFailed, match="die") as caught:
            deadly.result(30)
        assert caught.value.cause == ("exit" if (how, engine) == ("exit", "virgo") else "signal")
        assert [other.result(30) for other in others] == [number**2 for number in range(6)]
        assert path.read_text() == "x"


def test_a_call_is_repeated_if_it_may_be(cloud: Cloud, tmp_path: Path) -> None:
    """With `retries=2` it is run three times, and the error says so."""
    path = tmp_path / "ran"
    with pytest.raises(CallFailed) as caught:
        cloud.cpu.clone(die, str(path), "kill", retries=2)
    assert (caught.value.cause, caught.value.attempts) == ("signal", 3)
    assert path.read_text() == "xxx"


def test_a_deadline_stops_a_call(cloud: Cloud, tmp_path: Path) -> None:
    """DeadlineExceeded, and the call does nothing more; what has not begun does not begin."""
    path, never = tmp_path / "late", tmp_path / "never"
    busy = _busy(cloud, tmp_path)
    with pytest.raises(DeadlineExceeded, match="not begun"):
        cloud.cpu.clone(work, str(never), timeout=0.2)
    assert all(future.cancel() for future in busy)
    assert cloud.cpu.clone(square, 2) == 4  # a worker is there again
    with pytest.raises(DeadlineExceeded, match="stopped"):
        cloud.cpu.clone(work, str(path), timeout=1.5)
    assert still(path) and path.stat().st_size > 0 and not never.exists()


def _busy(cloud: Cloud, directory: Path) -> list[cf.Future[Any]]:
    """Two calls that run, so that others wait."""
    futures = [cloud.cpu.submit(work, str(directory / f"busy{number}")) for number in range(2)]
    until(lambda: len(list(directory.iterdir())) == 2, within_s=30)
    assert all(future.running() for future in futures)
    return futures


def test_cancelling_ends_what_runs_and_what_waits(cloud: Cloud, tmp_path: Path) -> None:
    """`cancel` is True for both, and returns when they have ended; what waited is never run."""
    busy = _busy(cloud, tmp_path)
    waiting = [cloud.cpu.submit(work, str(tmp_path / f"waiting{number}")) for number in range(4)]
    for futures in (waiting, busy):
        assert all(future.cancel() for future in futures) and all(future.cancelled() for future in futures)
    assert all(still(path) for path in tmp_path.iterdir())
    assert cloud.cpu.clone(square, 2) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["busy0", "busy1"]


def test_a_call_inside_c_is_killed_but_for_dask(cloud: Cloud, engine: str, tmp_path: Path) -> None:
    """Dask cannot end a thread: the future is cancelled in time, the call ends when it is back in Python."""
    path = tmp_path / "slept"
    future = cloud.cpu.submit(sleep, str(path), 3.0)
    until(path.exists, within_s=30)
    began = time.monotonic()
    assert future.cancel() and time.monotonic() - began < 2.9
    assert path.read_text() == ""
    time.sleep(max(0.0, began + 3.5 - time.monotonic()))
    assert path.read_text() == ("ended" if engine == "dask" else "")


def test_shutdown_drops_what_waits_and_lets_the_rest_end(cloud: Cloud, tmp_path: Path) -> None:
    """`cancel_futures` ends no call that runs; after it nothing is taken."""
    go = tmp_path / "go"
    busy = [cloud.cpu.submit(work, str(tmp_path / str(number)), str(go)) for number in range(2)]
    until(lambda: len(list(tmp_path.iterdir())) == 2, within_s=30)
    waiting = [cloud.cpu.submit(square, number) for number in range(20)]
    cloud.cpu.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in waiting)
    go.touch()
    assert [future.result(20) for future in busy] == [str(go)] * 2
    with pytest.raises(RuntimeError):
        cloud.cpu.submit(square, 1)


def test_a_child_that_a_call_forks_does_not_answer(cloud: Cloud) -> None:
    """What returns in a process that the call has forked is not its result."""
    assert [cloud.cpu.clone(fork) for _ in range(3)] == ["parent"] * 3


# --- options --------------------------------------------------------------------------------------


def test_what_nobody_has_is_refused(cloud: Cloud) -> None:
    """NoNode, at once."""
    with pytest.raises(NoNode, match="60 GPUs"):
        cloud.cpu.clone(square, 1, gpus=60)
    assert cloud.cpu.submit_to(square, (3,), cpus=2).result(30) == 9


def test_memory_is_a_ceiling_where_a_worker_runs_one_call(cloud: Cloud, engine: str) -> None:
    """MemoryError beyond it; Dask takes it as one of its resources, of which these workers declare none."""
    if engine == "dask":
        with pytest.raises(NoNode, match="67108864 bytes"):
            cloud.cpu.clone(fill, 1, memory="64 MiB")
        return
    assert cloud.cpu.clone(fill, 1_000_000, memory="64 MiB") == 1_000_000
    with pytest.raises(MemoryError):
        cloud.cpu.clone(fill, 200_000_000, memory="64 MiB")


def test_options_that_only_nodes_know_are_refused(cloud: Cloud, engine: str) -> None:
    """Names of nodes mean nothing to other engines, priorities nothing to Ray: BadArgument with a hint."""
    options: list[dict[str, Any]] = [{"node": "n1"}, {"near": "n1"}, {"priority": 5}, {"output": print}]
    for option in options:
        if engine == "virgo" or (engine, option) == ("dask", {"priority": 5}):
            assert cloud.cpu.clone(square, 3, **option) == 9
        else:
            with pytest.raises(BadArgument) as caught:
                cloud.cpu.clone(square, 3, **option)
            assert caught.value.hint and next(iter(option)) in caught.value.message
    assert cloud.cpu.clone("add", 1, 2, node="n1", priority=5) == 3


# --- asyncio --------------------------------------------------------------------------------------


def test_asyncio_gives_the_same(engine: str, running: RunningCloud, tmp_path: Path) -> None:
    """Results, the exception itself, deadlines, maps; cancelling a task ends its call."""

    async def main() -> None:
        async with await aio.connect(f"unix:{running.socket('n1')}", home=running.home) as cloud:
            cpu = cloud.cpu
            assert await cpu.clone(square, 7) == 49
            assert await cpu.clone("add", 2, 3) == 5
            assert [result async for result in cpu.map(square, range(20))] == [n * n for n in range(20)]
            assert await cpu.workers() == 2
            with pytest.raises(ZeroDivisionError, match="none") as caught:
                await cpu.clone(fail, "none")
            assert isinstance(caught.value.__cause__, CallFailed)
            with pytest.raises(DeadlineExceeded):
                await cpu.clone(work, str(tmp_path / "late"), timeout=1.0)
            path = tmp_path / "cancelled"
            task = cpu.submit(work, str(path))
            while not path.exists():
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert still(path)
            assert await cpu.clone(square, 3) == 9

    asyncio.run(asyncio.wait_for(main(), 50))


# --- the contract of executors --------------------------------------------------------------------


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
@pytest.mark.parametrize("engine", OTHERS, indirect=True)
def test_contract(claim: Claim, engine: str, running: RunningCloud) -> None:
    """Each claim of the kit holds for calls at Dask and Ray, as it does for VIRGO's workers."""
    with ExitStack() as stack:

        def make() -> Executor:
            return stack.enter_context(running.connect()).cpu

        claim(make)


# --- engines that are not there -------------------------------------------------------------------


@pytest.mark.parametrize("engine", OTHERS, indirect=True)
def test_an_engine_that_is_not_installed_is_named(
    engine: str, running: RunningCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BadConfig says which extra has it; calls by nodes go on without it."""
    package = {"dask": "distributed", "ray": "ray"}[engine]
    monkeypatch.setitem(sys.modules, package, None)  # what Python takes for a package that is not there
    with running.connect() as cloud:
        with pytest.raises(BadConfig, match="not installed") as caught:
            cloud.cpu.clone(square, 1)
        assert f"virgo-os[{engine}]" in caught.value.hint
        assert len(cloud.memory) >= 0


_PLACES = {
    "dask": [("tcp://127.0.0.1:9", NotRunning), ("nonsense://x:1", BadConfig), ("", BadConfig)],
    "ray": [("127.0.0.1:9", NotRunning), ("nonsense", BadConfig), ("ray://127.0.0.1:9", BadConfig)],
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_engine_that_does_not_answer_is_named(name: str, running: RunningCloud) -> None:
    """NotRunning for a place where nothing is, BadConfig for what is no place; soon, and with a hint."""
    text = """
import os, sys, virgo
for address in sys.argv[1:]:
    os.environ["VIRGO_CPU_BACKEND_ADDRESS"] = address
    with virgo.connect() as cloud:
        try:
            cloud.cpu.submit(pow, 2, 3).result(20)
        except virgo.errors.VirgoError as error:
            print(type(error).__name__, bool(error.hint))
"""
    addresses = [address for address, _ in _PLACES[name]]
    printed = _script(text, running, settings(name, ""), *addresses).splitlines()
    assert printed == [f"{kind.__name__} True" for _, kind in _PLACES[name]]


# --- claims ---------------------------------------------------------------------------------------


def test_a_claim_and_a_withdrawal_exclude_each_other() -> None:
    """Whoever is first has the call; what is forgotten is as if it had never been."""
    claims = Claims()
    assert claims.claim("ran", 1, "w1") == (b"", True)
    assert claims.withdraw(["ran", "waits"]) == ["waits"]
    assert claims.claim("waits", 1, "w1") == (TAKEN, True)
    assert claims.begun(["ran", "waits"]) == {"ran": "w1"}
    claims.forget("waits")
    assert claims.claim("waits", 1, "w2") == (b"", True)


def test_a_call_is_claimed_as_often_as_it_may_run() -> None:
    """Beyond that its outcome is lost; the last time is said, so that its death ends it."""
    claims = Claims()
    assert [claims.claim("call", 2, where) for where in ("w1", "w2", "w3")] == [
        (b"", False), (b"", True), (LOST, True),
    ]  # fmt: skip
    assert claims.begun(["call"]) == {"call": "w2"} and claims.runs("call") == 2


def _script(text: str, running: RunningCloud, environment: dict[str, str], *words: str) -> str:
    """What a program of its own prints that uses the cloud in this way."""
    done = subprocess.run(
        [sys.executable, "-c", text, *words],
        env={**running.environment, **environment, "PYTHONWARNINGS": "error"},
        text=True, capture_output=True, timeout=50,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_an_engine_none_is_imported(running: RunningCloud) -> None:
    """Who configures nothing pays nothing: nothing for them is loaded by calls."""
    text = """
import sys, virgo
with virgo.connect() as cloud:
    cloud.cpu.submit(pow, 2, 3).result()
print([name for name in ("ray", "dask", "distributed", "virgo.cpu.backends.base") if name in sys.modules])
"""
    assert _script(text, running, settings("", "")) == "[]\n"


@pytest.mark.parametrize("name", OTHERS)
def test_a_lost_cluster_is_node_lost(name: str, running: RunningCloud) -> None:
    """When its processes are killed, calls that run and calls that wait end in seconds, and so does closing.

    In a program of its own, since Ray ends the program too, a minute later.
    """
    text = """
import os, signal, time, virgo
def nap(): time.sleep(60)
with virgo.connect() as cloud:
    futures = [cloud.cpu.submit(nap) for _ in range(4)]
    while not any(future.running() for future in futures):
        time.sleep(0.01)
    os.killpg(int(os.environ["CLUSTER"]), signal.SIGKILL)
    def tell(future):
        try:
            future.result(20)
        except virgo.errors.VirgoError as error:
            print(error.code)
    for future in futures:
        tell(future)
    tell(cloud.cpu.submit(nap))
"""
    secret, after = ray_environment(), {"ray": "NODELOST", "dask": "NOTRUNNING"}[name]
    with ray_cluster(secret) if name == "ray" else dask_cluster() as (address, process):
        environment = {**secret, **settings(name, address), "CLUSTER": str(process.pid)}
        assert _script(text, running, environment).split() == ["NODELOST"] * 4 + [after]


def test_a_forked_process_has_its_own_way_or_none(engine: str, running: RunningCloud) -> None:
    """It connects to Dask anew; Ray cannot be used after a fork, which is said; the parent goes on."""
    text = """
import os, virgo
def attempt(number):
    try:
        print(cloud.cpu.submit(abs, number).result(20), flush=True)
    except virgo.errors.VirgoError as error:
        print(error.code, flush=True)
with virgo.connect() as cloud:
    attempt(-1)
    child = os.fork()
    if not child:
        attempt(-2)
        os._exit(0)
    os.waitpid(child, 0)
    attempt(-3)
"""
    environment = {name: os.environ.get(name, "") for name in settings("", "")}
    in_child = "NOTRUNNING" if engine == "ray" else "2"
    assert _script(text, running, environment).split() == ["1", in_child, "3"]


def test_dask_repeats_no_call_of_a_worker_that_is_retired(running: RunningCloud, tmp_path: Path) -> None:
    """Dask would run it again elsewhere; its claim is refused there, and the call is CallFailed: lost."""
    text = """
import os, sys, time
import distributed, virgo
path = sys.argv[1]
def note():
    with open(path, "a") as file:
        file.write("x")
    time.sleep(60)
with virgo.connect() as cloud, distributed.Client(os.environ["VIRGO_CPU_BACKEND_ADDRESS"]) as client:
    future = cloud.cpu.submit(note)
    while not os.path.exists(path):
        time.sleep(0.01)
    [at] = [worker for worker, keys in client.processing().items() if keys]
    client.retire_workers([at])
    try:
        future.result(20)
    except virgo.errors.CallFailed as error:
        print(error.cause)
    print(cloud.cpu.clone(pow, 2, 3))
"""
    path = tmp_path / "ran"
    with dask_cluster() as (address, _):
        printed = _script(text, running, settings("dask", address), str(path)).split()
    assert printed == ["lost", "8"]
    assert path.read_text() == "x"
