"""The cloud's processors under what others have written: joblib, Dask; and maps of all kinds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import count, islice
from operator import add, mul

import cloudpickle
import dask
import dask.array
import joblib
import numpy
import pytest
from tests.conftest import RunningCloud

from virgo.cloud import Cloud
from virgo.cpu.joblib_backend import register

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def cloud(cloud3: RunningCloud) -> Iterator[Cloud]:
    with cloud3.connect("n1") as connected:
        yield connected


def where(number: int) -> tuple[int, str]:
    import os

    time.sleep(0.02)
    return number, os.environ["VIRGO_NODE"]


def sleepy(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


# --- joblib ---------------------------------------------------------------------------------------


def test_joblib_runs_on_the_cloud(cloud: Cloud) -> None:
    """Results in order, from all nodes; by name of the backend."""
    register(cloud.cpu)
    taken_part: set[str] = set()
    for _ in range(3):  # workers that another client has just left are free a moment later
        with joblib.parallel_config(backend="virgo"):
            results = joblib.Parallel()(joblib.delayed(where)(number) for number in range(60))
        assert [number for number, _ in results] == list(range(60))
        taken_part |= {node for _, node in results}
    assert taken_part == {"n1", "n2", "n3"}


def test_joblib_gives_results_as_a_generator_and_raises_what_was_raised(cloud: Cloud) -> None:
    """`return_as="generator"` yields them in order; after an exception nothing is outstanding."""
    register(cloud.cpu)
    with joblib.parallel_config(backend="virgo", n_jobs=2):
        generator = joblib.Parallel(return_as="generator")(joblib.delayed(abs)(-n) for n in range(20))
        assert list(generator) == list(range(20))
        with pytest.raises(ZeroDivisionError):
            joblib.Parallel()(joblib.delayed(divmod)(1, n) for n in (1, 1, 0, 1))
    assert cloud.cpu.stats()["outstanding"] == 0


def test_joblib_asks_how_many_calls_run_at_once(cloud: Cloud) -> None:
    """All by default, so many less with negative numbers, never none."""
    register(cloud.cpu)
    workers = cloud.cpu.workers()
    assert workers == 3
    for asked, expected in ((-1, workers), (-2, workers - 1), (5, 5), (-100, 1)):
        with joblib.parallel_config(backend="virgo", n_jobs=asked):
            assert joblib.effective_n_jobs(asked) == expected


# --- Dask -----------------------------------------------------------------------------------------


def test_dask_computes_on_the_cloud(cloud: Cloud) -> None:
    """An array's sum and a delayed graph, with `cloud.cpu` as the scheduler."""
    array = dask.array.arange(1_000_000, chunks=100_000)
    assert (array**2).sum().compute(scheduler=cloud.cpu) == (numpy.arange(1_000_000) ** 2).sum()
    double = dask.delayed(mul)
    total = dask.delayed(sum)([double(number, 2) for number in range(30)])
    assert dask.compute(total, scheduler=cloud.cpu) == (870,)
    with dask.config.set(scheduler=cloud.cpu):
        assert array.mean().compute() == 499_999.5


# --- maps -----------------------------------------------------------------------------------------


def test_starmap_takes_rows(cloud: Cloud) -> None:
    """All arguments of a call are one row; chunks change nothing."""
    rows = [(number, 2 * number) for number in range(50)]
    assert list(cloud.cpu.starmap(add, rows)) == [3 * number for number in range(50)]
    assert list(cloud.cpu.starmap(add, rows, chunksize=7)) == [3 * number for number in range(50)]
    assert list(cloud.cpu.starmap("add", [(1, 2)])) == [3]


def test_map_unordered_gives_results_as_they_come(cloud: Cloud) -> None:
    """The quick one before the slow one that was begun first; an exception ends it."""
    assert list(cloud.cpu.map_unordered(sleepy, [0.6, 0.0, 0.1])) == [0.0, 0.1, 0.6]
    assert sorted(cloud.cpu.map_unordered(abs, range(-300, 0))) == list(range(1, 301))
    with pytest.raises(TypeError):
        list(cloud.cpu.map_unordered(abs, [1, "x", 2]))
    with pytest.raises(TimeoutError):
        list(cloud.cpu.map_unordered(sleepy, [5.0], timeout=0.1))


def test_maps_take_endless_arguments_a_few_at_a_time(cloud: Cloud) -> None:
    """With a buffersize arguments are taken as results are."""
    taken = []

    def numbers() -> Iterator[int]:
        for number in count():
            taken.append(number)
            yield number

    assert list(islice(cloud.cpu.map(abs, numbers(), buffersize=5), 20)) == list(range(20))
    assert len(taken) <= 26
    assert len(list(islice(cloud.cpu.map_unordered(abs, numbers(), buffersize=5), 20))) == 20


def test_progress_is_shown_on_standard_error(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    """A bar with the text that was given; results are the same, and standard output stays clean."""
    assert list(cloud.cpu.map(abs, range(30), progress="resizing")) == list(range(30))
    captured = capsys.readouterr()
    assert "resizing" in captured.err and "100%" in captured.err and captured.out == ""
