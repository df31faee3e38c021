"""What travels to a worker: coroutine functions."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator

import cloudpickle
import pytest

from conftest import RunningCloud
from virgo.cloud import Cloud
from virgo.errors import CallFailed

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def cloud(cloud3: RunningCloud) -> Iterator[Cloud]:
    with cloud3.connect("n1") as connected:
        yield connected


async def doubled(value: int) -> int:
    halves = await asyncio.gather(*(asyncio.sleep(0, value) for _ in range(2)))
    return sum(halves)


async def failing() -> None:
    await asyncio.sleep(0)
    raise ZeroDivisionError("in a coroutine")


async def counting() -> AsyncIterator[int]:
    yield 1


def test_a_coroutine_function_runs_to_its_end_in_the_worker(cloud: Cloud) -> None:
    """By `clone`, `submit`, `map`, in chunks, published and called by name, twice on the same worker."""
    assert cloud.cpu.clone(doubled, 4) == 8
    assert [cloud.cpu.submit_to(doubled, (value,), node="n2").result(60) for value in (1, 2)] == [2, 4]
    assert list(cloud.cpu.map(doubled, range(5), chunksize=2)) == [0, 2, 4, 6, 8]
    cloud.cpu.publish(doubled, name="travel_doubled")
    try:
        assert cloud.cpu.clone("travel_doubled", 21) == 42
    finally:
        cloud.cpu.unpublish("travel_doubled")


def test_an_exception_of_a_coroutine_is_that_of_the_call(cloud: Cloud) -> None:
    """It arrives as itself, as from any function."""
    with pytest.raises(ZeroDivisionError, match="in a coroutine"):
        cloud.cpu.clone(failing)


def test_a_generator_cannot_be_a_result_and_the_error_says_so(cloud: Cloud) -> None:
    """An `async def` that yields has no one result; the hint names what can be returned."""
    with pytest.raises(CallFailed, match="cannot be sent back") as caught:
        cloud.cpu.clone(counting)
    assert "generators" in caught.value.hint
