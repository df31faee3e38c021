"""What calls ask for: processors, GPUs, memory, a place near their data, priority, repetitions."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from tests.conftest import RunningCloud, a_cloud
from tests.waiting import until

from virgo.cloud import Cloud
from virgo.cpu.needs import Needs, needs_of, size_of
from virgo.errors import BadArgument, CallFailed, NoNode

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def running() -> Iterator[RunningCloud]:
    """A node that runs four calls at once and has three GPUs, or says so."""
    with a_cloud(environment={"VIRGO_CPU_WORKERS": "4", "VIRGO_CPU_GPUS": "3"}) as started:
        yield started


def during(path: str, seconds: float = 0.3) -> tuple[float, float]:
    """From when to when it ran, in monotonic time; noted by its file while it runs."""
    began = time.monotonic()
    Path(path).touch()
    time.sleep(seconds)
    return began, time.monotonic()


def until_gone(path: Path) -> None:
    """Notes by a file of its own that it runs; ends when the path is gone."""
    path.with_name(f"held{os.getpid()}").touch()
    while path.exists():
        time.sleep(0.01)


def gpus(seconds: float = 0.0) -> str | None:
    time.sleep(seconds)
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def hold(size: int) -> int:
    return len(bytearray(size))


def most_at_once(spans: list[tuple[float, float]], weights: list[int]) -> int:
    """The greatest sum of weights of spans that share a moment."""
    return max(
        sum(weight for (began, ended), weight in zip(spans, weights, strict=True) if began <= moment < ended)
        for moment, _ in spans
    )


# --- as they are said -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("100", 100), ("1k", 1000), ("2 KiB", 2048), ("1.5GB", 1_500_000_000), ("3gib", 3 << 30), ("7 b", 7)],
)
def test_sizes_have_units(text: str, size: int) -> None:
    """Those of SI and the binary ones, in any case."""
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "1.2.3", "-1", "1 XB", "1e9", "1 G B"])
def test_what_is_no_size_is_said(text: str) -> None:
    """With a hint that shows one."""
    with pytest.raises(BadArgument, match="no size") as caught:
        size_of(text)
    assert "512 MiB" in caught.value.hint


@pytest.mark.parametrize(
    "wrong",
    [(0, 0, 0), (1, -1, 0), (1, 0, 1), (1.5, 0, 0), ("2", 0, 0), (True, 0, 0), (1, 0, None), (257, 0, 0)],
)
def test_needs_that_no_node_can_have_are_said(wrong: tuple[Any, Any, Any]) -> None:
    """They are BadArgument before anything is sent."""
    with pytest.raises(BadArgument):
        needs_of(*wrong)


def test_options_are_checked_by_the_client(cloud: Cloud) -> None:
    """Each names what is wrong."""
    for options, named in (
        ({"cpus": 0}, "cpus"),
        ({"gpus": 0.5}, "gpus"),
        ({"memory": "much"}, "much"),
        ({"priority": 1001}, "priority"),
        ({"near": 5}, "near"),
        ({"retries": -1}, "retries"),
    ):
        with pytest.raises(BadArgument, match=named):
            cloud.cpu.clone(abs, 1, **options)


def test_a_need_reads_as_a_sentence() -> None:
    """For messages."""
    assert str(Needs(2, 1, 5)) == "2 processors, 1 GPU, 5 bytes of memory"
    assert str(Needs()) == "1 processor"


# --- hard limits ----------------------------------------------------------------------------------


def test_no_more_processors_are_given_than_there_are(cloud: Cloud, tmp_path: Path) -> None:
    """Calls that take several wait until so many are free, beside those that take one."""
    weights = [3, 1, 2, 2, 4, 1, 3, 1]
    futures = [
        cloud.cpu.submit_to(during, (str(tmp_path / f"{number}"),), cpus=weight)
        for number, weight in enumerate(weights)
    ]
    spans = [future.result(30) for future in futures]
    assert 3 <= most_at_once(spans, weights) <= 4
    assert cloud.cpu.clone(os.getenv, "OMP_NUM_THREADS", cpus=3) == "3"
    assert cloud.cpu.clone(os.getenv, "OMP_NUM_THREADS") is None


def test_calls_that_need_many_are_not_passed_by_for_ever(cloud: Cloud, tmp_path: Path) -> None:
    """A flood of small ones, by leases too, does not keep a large one from running."""
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            list(cloud.cpu.map(time.sleep, [0.01] * 50))

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        until(lambda: cloud.cpu.stats()["outstanding"] > 10)
        began, _ = cloud.cpu.submit_to(during, (str(tmp_path / "x"), 0.05), cpus=4).result(20)
        assert began
    finally:
        stop.set()
        thread.join(20)


def test_what_no_node_has_is_no_node(cloud: Cloud) -> None:
    """At once, and not after a wait for it."""
    began = time.monotonic()
    for options in ({"cpus": 5}, {"gpus": 4}, {"memory": "900 TiB"}, {"gpus": 4, "node": "n1"}):
        with pytest.raises(NoNode, match="needs"):
            cloud.cpu.clone(abs, 1, **options)
    assert time.monotonic() - began < 5


def test_calls_see_the_gpus_that_they_asked_for_and_no_others(cloud: Cloud) -> None:
    """Three at once have one each; one that asks for none sees none."""
    seen = [cloud.cpu.submit_to(gpus, (0.3,), gpus=1) for _ in range(6)]
    assert sorted(str(future.result(30)) for future in seen) == ["0", "0", "1", "1", "2", "2"]
    assert cloud.cpu.clone(gpus, gpus=3) == "0,1,2"
    assert cloud.cpu.clone(gpus) == cloud.cpu.clone(gpus, cpus=2) == ""


def test_gpus_come_back_from_calls_that_die_or_are_cancelled(cloud: Cloud) -> None:
    """And from those that wait for some and are cancelled."""
    for _ in range(2):
        with pytest.raises(CallFailed):
            cloud.cpu.clone(lambda: os.kill(os.getpid(), signal.SIGKILL), gpus=3)
    held = cloud.cpu.submit_to(gpus, (60.0,), gpus=2)
    until(held.running)
    waiting = cloud.cpu.submit_to(gpus, (60.0,), gpus=2)
    until(lambda: cloud.stats()["stats"]["cpu"]["unplaced"] == 1)
    waiting.cancel()
    held.cancel()
    assert cloud.cpu.submit_to(gpus, gpus=3).result(20) == "0,1,2"


def test_calls_that_wait_for_gpus_let_others_pass(cloud: Cloud) -> None:
    """They do not stand in the way of calls that need none, by leases or placed by the node."""
    held = cloud.cpu.submit_to(gpus, (60.0,), gpus=3)
    until(held.running)
    waiting = [cloud.cpu.submit_to(gpus, (0.0,), gpus=1) for _ in range(5)]
    until(lambda: cloud.stats()["stats"]["cpu"]["unplaced"] == 5)
    for options in ({}, {"cpus": 2}):
        assert cloud.cpu.submit_to(abs, (-3,), **options).result(5) == 3
    assert not any(future.done() for future in waiting)
    held.cancel()
    assert {future.result(20) for future in waiting} <= {"0", "1", "2"}


def test_beyond_its_memory_a_call_gets_memory_error(cloud: Cloud) -> None:
    """The very exception, with a hint; the worker goes on, and the next call has its own ceiling."""
    assert cloud.cpu.clone(hold, 150 << 20, memory="200 MiB") == 150 << 20
    with pytest.raises(MemoryError) as caught:
        cloud.cpu.clone(hold, 250 << 20, memory="200 MiB")
    assert isinstance(caught.value.__cause__, CallFailed)
    assert caught.value.__cause__.cause == "memory" and "memory=" in caught.value.__cause__.hint
    assert cloud.cpu.clone(hold, 250 << 20, cpus=2) == 250 << 20


def test_the_configured_ceiling_holds_for_all_calls() -> None:
    """Those of leased workers too; a call may ask for more."""
    with (
        a_cloud(environment={"VIRGO_CPU_MEMORY_BYTES": str(100 << 20)}) as running,
        running.connect() as cloud,
    ):
        assert cloud.cpu.clone(hold, 60 << 20) == 60 << 20
        for call in (cloud.cpu.clone, lambda *args: list(cloud.cpu.map(*args[:1], [args[1]]))):
            with pytest.raises(MemoryError):
                call(hold, 200 << 20)
        assert cloud.cpu.clone(hold, 200 << 20, memory="300 MiB") == 200 << 20


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cpus": 2}])
def test_the_greatest_priority_goes_first(cloud: Cloud, tmp_path: Path, options: dict[str, Any]) -> None:
    """Of calls of a client, leased or placed by the node, in the order in which they came among equals."""
    first, second = tmp_path / "first", tmp_path / "second"
    places = options.get("cpus", 1)  # what one call takes, so that they run one after the other
    for path in (first, second):
        path.touch()
    held = [cloud.cpu.submit(until_gone, first if number < places else second) for number in range(4)]
    until(lambda: len(list(tmp_path.glob("held*"))) == 4)
    priorities = [0, 5, -3, 5, 9, 0]
    futures = [
        cloud.cpu.submit_to(during, (str(tmp_path / f"{number}"), 0.02), priority=priority, **options)
        for number, priority in enumerate(priorities)
    ]
    until(lambda: all(future.item.id or not options for future in futures))  # the node has them all
    first.unlink()
    spans = [future.result(30) for future in futures]
    assert sorted(range(len(spans)), key=lambda number: spans[number][0]) == [4, 1, 3, 0, 5, 2]
    second.unlink()
    for future in held:
        future.result(10)


# --- near the data --------------------------------------------------------------------------------


def where(*_args: Any) -> str:
    return os.environ["VIRGO_NODE"]


def test_a_call_runs_near_what_it_is_told(cloud3: RunningCloud) -> None:
    """A node's name, or a region; unknown names are nowhere in particular."""
    with cloud3.connect("n1") as cloud, cloud.memory.malloc(100, node="n3") as region:
        assert [cloud.cpu.clone(where, near="n2") for _ in range(5)] == ["n2"] * 5
        assert cloud.cpu.clone(where, near="nowhere") in ("n1", "n2", "n3")
        assert region.__virgo_node__() == 3
        assert cloud.cpu.clone(where, near=region) in ("n1", "n2", "n3")  # all are of one machine
        assert cloud.cpu.clone(where, region) in ("n1", "n2", "n3")


def test_a_busy_node_is_not_waited_for_because_the_data_are_there(cloud3: RunningCloud) -> None:
    """It is preferred and no more; `node` insists."""
    with cloud3.connect("n1") as cloud:
        held = cloud.cpu.submit_to(time.sleep, (20,), node="n2")
        until(held.running)
        time.sleep(0.5)  # so that all nodes know
        for _ in range(3):
            assert cloud.cpu.submit_to(where, near="n2").result(10) in ("n1", "n3")
        held.cancel()


def test_a_call_is_sent_on_by_a_node_that_has_just_become_busy(cloud3: RunningCloud) -> None:
    """Before anybody else can know of it; the call does not wait there while other nodes are idle."""
    with cloud3.connect("n1") as cloud:
        for _ in range(30):
            held = cloud.cpu.submit_to(time.sleep, (20,), node="n2")
            until(held.running)
            assert cloud.cpu.submit_to(where, near="n2").result(10) in ("n1", "n3")
            held.cancel()


def test_placement_may_be_random() -> None:
    """As in the reference system: by nothing, so that an idle node at hand is one of many."""
    with a_cloud(3, environment={"VIRGO_CPU_PLACEMENT": "random"}) as running, running.connect() as cloud:
        until(lambda: len(cloud.nodes) == 3)
        assert {cloud.cpu.clone(where, near="nowhere") for _ in range(60)} == {"n1", "n2", "n3"}


# --- repetitions ----------------------------------------------------------------------------------


def die_at_first(path: str, times: int) -> int:
    with Path(path).open("a") as file:
        file.write("x")
    count = Path(path).stat().st_size
    if count <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return count


@pytest.mark.parametrize("options", [{}, {"cpus": 2}])
def test_what_may_be_repeated_is_run_again_when_its_worker_dies(
    cloud: Cloud, tmp_path: Path, options: dict[str, Any]
) -> None:
    """As often as it may, and then the failure says how often it was run; without `retries`, once."""
    path = str(tmp_path / "runs")
    assert cloud.cpu.clone(die_at_first, path, 2, retries=2, **options) == 3
    Path(path).unlink()
    with pytest.raises(CallFailed, match="3 attempts") as caught:
        cloud.cpu.clone(die_at_first, path, 9, retries=2, **options)
    assert (caught.value.cause, caught.value.attempts) == ("signal", 3)
    assert Path(path).stat().st_size == 3
    Path(path).unlink()
    with pytest.raises(CallFailed) as caught:
        cloud.cpu.clone(die_at_first, path, 1, **options)
    assert caught.value.attempts == 1 and Path(path).stat().st_size == 1


def test_what_raises_is_not_run_again(cloud: Cloud, tmp_path: Path) -> None:
    """An exception is an outcome, MemoryError too."""
    path = tmp_path / "runs"

    def fail(kind: type[Exception]) -> None:
        with path.open("a") as file:
            file.write("x")
        raise kind("no")

    for kind in (ValueError, MemoryError):
        with pytest.raises(kind):
            cloud.cpu.clone(fail, kind, retries=5)
    assert path.stat().st_size == 2
