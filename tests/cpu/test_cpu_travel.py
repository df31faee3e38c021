"""What travels to a worker: coroutine functions, and regions of memory."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import cloudpickle
import numpy
import pytest

from conftest import RunningCloud
from virgo.aio import connect as aio_connect
from virgo.cloud import Cloud, connect
from virgo.cpu.apart import Apart, Hand
from virgo.cpu.client import by_node
from virgo.cpu.freight import Freight
from virgo.cpu.shipping import arguments_of
from virgo.cpu.tasks import task_of
from virgo.errors import BadArgument, CallFailed, UnknownId
from virgo.memory.client import Region

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


# --- regions ----------------------------------------------------------------------------------------


def turned(region: Region) -> tuple[int, int, bytes]:
    found = region.get()
    region.set(found[::-1])
    return region.id, region.size, found


def test_a_region_travels_as_its_id(cloud: Cloud) -> None:
    """A function on any node reads and writes the very region that it was given, wherever that lies."""
    for home, runs in (("n1", "n1"), ("n1", "n2"), ("n3", "n2")):
        with cloud.memory.malloc(16, node=home) as region:
            region.set(b"forwards")
            assert cloud.cpu.clone(turned, region, node=runs) == (region.id, 16, b"forwards")
            assert region.get() == b"sdrawrof"
    with pytest.raises(UnknownId):
        cloud.cpu.clone(turned, region, node="n2")


def test_a_region_travels_inside_of_what_a_function_holds(cloud: Cloud) -> None:
    """In a closure, in a list, to another worker from there, and from asyncio, where it is another class."""
    with cloud.memory.malloc(16, node="n2") as region:

        def outer(regions: list[Region]) -> bytes:
            from virgo.syscalls import cloud as local

            region.set(b"captured")
            _id, _size, found = local().cpu.clone(turned, regions[0], node="n3")
            return found

        assert cloud.cpu.clone(outer, [region], node="n1") == b"captured"
        assert region.get() == b"derutpac"


def test_a_region_of_asyncio_arrives_as_one_that_needs_no_loop(cloud3: RunningCloud) -> None:
    """Functions in workers are plain ones, so what arrives is a `Region`."""

    async def main() -> None:
        async with await aio_connect(f"unix:{cloud3.socket('n1')}", home=cloud3.home) as cloud:
            region = await cloud.memory.malloc(16)
            await region.set(b"forwards")
            assert await cloud.cpu.clone(turned, region, node="n3") == (region.id, 16, b"forwards")
            assert await region.get() == b"sdrawrof"
            await region.free()

    asyncio.run(main())


def test_a_copy_within_the_process_stays_with_its_connection(cloud: Cloud) -> None:
    """Only what goes elsewhere is bound anew."""
    with cloud.memory.malloc(16) as region:
        region.set(b"content")
        for other in (copy.copy(region), copy.deepcopy([region])[0]):
            assert (other.id, other.size, other.get()) == (region.id, 16, b"content")
            assert other._client is region._client


def test_a_region_connects_when_it_is_first_used(cloud: Cloud, cloud3: RunningCloud) -> None:
    """Unpickling asks nobody, so it works where no node is; another process finds the node by itself."""
    with cloud.memory.malloc(16) as region:
        region.set(b"content")
        program = (
            f"import pickle\nregion = pickle.loads({pickle.dumps(region)!r})\n"
            "assert region.size == 16\nprint('unpickled', flush=True)\nprint(region.get().decode())"
        )
        here = subprocess.run(
            [sys.executable, "-c", program],
            env=cloud3.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (here.returncode, here.stdout) == (0, "unpickled\ncontent\n"), here.stderr
        nowhere = subprocess.run(
            [sys.executable, "-c", program],
            env={**cloud3.environment, "VIRGO_URL": "unix:/no/such/socket"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "virgo.errors.NotRunning" in nowhere.stderr
        assert nowhere.stdout == "unpickled\n"


# --- arrays -----------------------------------------------------------------------------------------


def summed(array: Any, number: int) -> tuple[float, Any]:
    array[0] += number
    return float(array.sum()), array


BY_NODE: dict[str, Any] = {"memory": "1 GiB"}  # which leased workers do not promise


def test_arrays_travel_through_a_node(cloud: Cloud) -> None:
    """Many at once, each its own, to any node; what the worker writes does not reach the sender's."""
    arrays = [numpy.full(100_000, float(number)) for number in range(12)]
    futures = [
        cloud.cpu.submit_to(summed, (array, 5), node=f"n{number % 3 + 1}", **BY_NODE)
        for number, array in enumerate(arrays)
    ]
    for number, future in enumerate(futures):
        total, array = future.result(30)
        assert total == 100_000.0 * number + 5 and array[0] == number + 5.0 and arrays[number][0] == number
        array[1] = 1.0  # it may be written to
    assert cloud.cpu.clone(summed, arrays[3], 1, **BY_NODE)[0] == 300_001.0


def test_arrays_that_a_worker_keeps_stay_what_they_were(cloud: Cloud) -> None:
    """Whatever is sent later."""

    def keep(array: Any) -> list[float]:
        import builtins

        kept = builtins.__dict__.setdefault("kept_by_the_test", [])
        kept.append(array)
        return [float(one[-1]) for one in kept]

    found = [
        cloud.cpu.clone(keep, numpy.full(100_000, float(number)), node="n2", **BY_NODE)
        for number in range(10)
    ]
    for number, values in enumerate(found):
        assert values[-1] == number and values == sorted(values)


def test_arrays_travel_by_asyncio_and_over_tcp(cloud3: RunningCloud) -> None:
    """From asyncio by the same memory; over TCP, where nobody says what is of this machine, with the call."""
    array = numpy.ones(100_000)

    async def main() -> None:
        async with await aio_connect(f"unix:{cloud3.socket('n1')}", home=cloud3.home) as connected:
            assert (await connected.cpu.clone(summed, array, 2, node="n3", **BY_NODE))[0] == 100_002.0

    asyncio.run(main())
    address = f"127.0.0.1:{cloud3.ports('n1')['cpu']}"
    with connect(address, token=cloud3.token, home=cloud3.home) as connected:
        assert connected.cpu.clone(summed, array, 3, node="n3")[0] == 100_003.0


def test_memory_that_is_gone_is_an_error_of_the_call(cloud: Cloud) -> None:
    """Of a sender who does not wait any more; nothing else that he has open by then is taken for it."""
    task = task_of(summed, (numpy.ones(100_000), 1), **BY_NODE)
    apart = arguments_of(task, (numpy.ones(100_000), 1), {})
    assert isinstance(apart, Apart)
    sent = apart.at_hand()
    assert Hand("/no/such/socket").carry(apart) == apart.along()  # who sends it says that nobody is there
    del apart
    with pytest.raises(CallFailed, match="cannot be loaded"):
        cloud.cpu._runner.run(by_node(task, sent, Hand("")))
    for wrong in (sent, b"H", b"Hnonsense"):
        with pytest.raises(BadArgument, match="cannot be read"):
            Freight(SimpleNamespace(name="n1", number=1)).sent("summed", [wrong]).__enter__()


def doubled_twice(data: Any, *, count: int = 2) -> Any:
    assert type(data) in (bytes, bytearray)
    return data * count


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_long_bytes_arrive_as_they_were(
    cloud3: RunningCloud, cloud: Cloud, kind: Callable[[Any], Any]
) -> None:
    """Of the same type, both ways, by a leased worker, through a node, over TCP, in a map."""
    data = kind(os.urandom(400_000))
    for options in ({}, BY_NODE, {"node": "n3", **BY_NODE}):
        found = cloud.cpu.clone(doubled_twice, data, count=3, **options)
        assert type(found) is kind and found == data * 3
    assert list(cloud.cpu.map(doubled_twice, [data, kind(b"short"), data])) == [
        data * 2,
        b"short" * 2,
        data * 2,
    ]
    address = f"127.0.0.1:{cloud3.ports('n1')['cpu']}"
    with connect(address, token=cloud3.token, home=cloud3.home) as connected:
        assert connected.cpu.clone(doubled_twice, data) == data * 2
