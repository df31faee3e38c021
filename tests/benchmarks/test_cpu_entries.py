"""The benchmarks of the processors: what workers run, what clients share, which processes are counted."""

from __future__ import annotations

import inspect
import mmap
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cpu_clients, pools, tasks
from benchmarks.apart import measure, run_apart
from benchmarks.cpu_arguments import Sender
from benchmarks.cpu_first import first_s
from benchmarks.cpu_idle import worker_pids
from benchmarks.crowd import Crowd, Operations
from benchmarks.entries import ENTRIES
from benchmarks.held import held_bytes, private_bytes
from benchmarks.timing import latencies

MiB = 1024**2
CPU = ["cpu_calls", "cpu_clients", "cpu_arguments", "cpu_first", "cpu_idle"]


def test_tasks_are_plain_functions() -> None:
    """Ray takes nothing else, a cached function for instance."""
    named = [
        value for name, value in vars(tasks).items() if getattr(value, "__module__", "") == tasks.__name__
    ]
    assert named and all(inspect.isfunction(one) for one in named if not one.__name__.startswith("_"))


def test_a_millisecond_is_one_and_a_processor_works() -> None:
    """The busy call lasts what it is told, by the clock, and is no sleep: it reads the clock all the time."""
    start = time.perf_counter()
    reads = tasks.busy(0.02)
    assert time.perf_counter() - start >= 0.02
    assert reads > 100


def test_made_bytes_are_the_same_in_every_process() -> None:
    """Whoever asks for the bytes can tell a wrong result."""
    there = pools.PROCESS_POOL
    with ExitStack() as running:
        assert there.make(running).one(tasks.made, 1000) == tasks.made(1000)
    assert len(tasks.made(1000)) == 1000 and tasks.ends(tasks.made(1000)) == (1000, tasks.made(1000)[-8:])


def test_latencies_are_quantiles_of_single_calls() -> None:
    """Of calls of known length p50 is at least that length, p99 no less than p50."""
    p50_s, p99_s = latencies(lambda: tasks.busy(0.001), time_s=0.05)
    assert 0.001 <= p50_s <= p99_s


@pytest.mark.parametrize("ran", [[1, 1, 1, 1], [1, 2, 3, 1]], ids=["too few", "too many"])
def test_workers_are_those_that_ran_calls(ran: list[int]) -> None:
    """Two workers are two processes that ran calls; another number is an error, not a figure."""

    def many(pids: Iterable[int]) -> Callable[[Any, Iterable[Any]], list[Any]]:
        return lambda _function, _values: list(pids)

    assert worker_pids(many([5, 6, 5, 6]), 2) == {5, 6}
    with pytest.raises(RuntimeError, match="workers ran calls instead of 2"):
        worker_pids(many(ran), 2)


def test_private_bytes_are_a_part_of_the_share() -> None:
    """Pages that a process alone has count in full in its share too, and grow with what it takes."""
    before = private_bytes(os.getpid())
    with mmap.mmap(-1, 16 * MiB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        for page in range(0, 16 * MiB, mmap.PAGESIZE):  # freed buffers of MiB would change what malloc keeps
            area[page] = 1
        after = private_bytes(os.getpid())
        assert 14 * MiB < after - before < 20 * MiB
        assert after <= held_bytes([os.getpid()])


def waits_for_another(directory: Path, _running: ExitStack, number: int) -> Operations:
    """Clients of which the second's first call waits until the first one has made several."""

    def call() -> None:
        if number == 0:
            time.sleep(0.001)
            with (directory / "calls").open("a") as stream:
                stream.write(".")
        while number == 1 and not _several(directory / "calls"):
            time.sleep(0.001)

    return {"call": call}


def _several(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 20


def test_nobody_in_a_crowd_is_idle_until_all_have_made_a_call(tmp_path: Path) -> None:
    """Whoever made its first call goes on calling while another one's takes longer; then all are counted."""
    with Crowd(partial(waits_for_another, tmp_path), 2, ()) as crowd:
        rate, p99_s = crowd.rate_and_p99_s("call", clients=2, time_s=0.05)
        assert rate > 0 and p99_s > 0
        assert crowd.rate("call", clients=1, time_s=0.02) < 1000


def fails(_running: ExitStack, number: int) -> Operations:
    """Clients of which one fails."""
    if number == 1:
        raise ValueError("this client does not begin")
    return {}


def test_a_client_that_fails_ends_the_crowd() -> None:
    """It is an error, and no client is left, though none is a daemon."""
    with pytest.raises(EOFError):
        Crowd(fails, 2, ())
    assert not multiprocessing.active_children()


def test_peers_that_cannot_be_shared_are_said_to_be_so() -> None:
    """Each client of a ProcessPoolExecutor has its own; of Ray fewer clients are compared, and it says so."""
    sides = {one.name: one.promises for one in ENTRIES["cpu_clients"].contenders(True)}
    assert "of its own" in sides["ProcessPoolExecutor"] and "of its own" in sides["loky"]
    assert "share it" in sides["virgo"] and "share it" in sides["Dask"]
    assert "up to 4 of them" in sides["Ray"]
    assert cpu_clients.counts("Ray") == (1, 2, 4) and cpu_clients.counts("Dask") == cpu_clients.CLIENTS


def test_wrong_bytes_are_an_error() -> None:
    """A pool that loses the end of an argument is not measured."""
    wrong = pools.Pool(
        name="wrong",
        promises="nothing",
        libraries=(),
        make=lambda _: pools.Calls(lambda function, data: function(data[:-1]), lambda *_: [b""]),
        serve=lambda _: lambda _: pools.Calls(max, lambda *_: []),
    )
    with pytest.raises(RuntimeError, match="wrong gives wrong results"):
        measure(Sender(wrong, quick=True))


def test_the_first_call_is_one_of_a_process_begun_afresh() -> None:
    """A program that makes its pool is timed from before it to the result."""
    taken_s = first_s(pools.PROCESS_POOL.make, pools.PROCESS_POOL.libraries)
    assert 0 < taken_s < 60


@pytest.mark.parametrize("side", ["virgo", "ProcessPoolExecutor"])
@pytest.mark.parametrize("name", CPU)
def test_sides_without_peers_of_the_cpu_entries_run(name: str, side: str) -> None:
    """A change of ours that breaks a benchmark is seen here, where only the standard library's peer is."""
    entry = ENTRIES[name]
    contender = next(one for one in entry.contenders(True) if one.name == side)
    figures = run_apart(entry, contender, quick=True)
    wanted = {
        one
        for comparison in entry.comparisons
        if side in (comparison.ours, comparison.peer)
        for one in comparison.measures
    }
    assert wanted <= figures.keys() and all(figures[one] > 0 for one in wanted)
