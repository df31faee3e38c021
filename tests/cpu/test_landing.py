"""Large results that come through a node: laid where they are waited for, and nowhere else."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

import cloudpickle
import numpy
import pytest

from conftest import RunningCloud
from virgo.aio import connect as aio_connect
from virgo.cloud import Cloud
from virgo.cpu import landing, messages
from virgo.cpu.apart import ALONG, LANDED, dumps
from virgo.cpu.landing import Landing, Place
from virgo.errors import CallFailed
from waiting import until

cloudpickle.register_pickle_by_value(sys.modules[__name__])
BY_NODE: dict[str, Any] = {"memory": "256 MiB"}


@pytest.fixture
def cloud(cloud3: RunningCloud) -> Iterator[Cloud]:
    with cloud3.connect("n1") as connected:
        yield connected


def filled(value: float, count: int = 100_000) -> Any:
    return numpy.full(count, value)


def failing() -> None:
    raise ZeroDivisionError


def laid_bytes() -> int:
    """What this process has of memory in which results lie."""
    gc.collect()
    kept = landing._landing
    return 0 if kept is None else os.fstat(kept.segment.descriptor).st_blocks * 512


def lie(outcome: bytes, place: Place) -> Any:
    """The result that an outcome says has landed."""
    return messages.as_result(messages.arrived(outcome, place), trusted=True)


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_result_lies_where_it_is_waited_for(cloud: Cloud, node: str) -> None:
    """It may be written to, is there as long as it is used, and its memory is given back then."""
    until(lambda: laid_bytes() == 0)
    first = cloud.cpu.clone(filled, 1.0, node=node, **BY_NODE)
    second = cloud.cpu.submit_to(filled, (2.0,), node=node, **BY_NODE).result(60)
    assert laid_bytes() >= first.nbytes + second.nbytes
    first += 10
    part = second[7:9]
    del second
    assert list(cloud.cpu.map(float, [1])) == [1.0]
    assert (first == 11).all() and (part == 2).all()
    del first, part
    until(lambda: laid_bytes() == 0)


def test_asyncio_and_followed_calls_get_theirs_so_too(cloud3: RunningCloud, cloud: Cloud) -> None:
    followed = cloud.cpu.submit_to(filled, (3.0,), output=io.BytesIO(), **BY_NODE).result(60)

    async def main() -> list[Any]:
        async with await aio_connect(f"unix:{cloud3.socket('n1')}", home=cloud3.home) as connected:
            plain = await connected.cpu.clone(filled, 4.0, **BY_NODE)
            return [plain, await connected.cpu.clone(filled, 5.0, output=io.BytesIO(), **BY_NODE)]

    found = [followed, *asyncio.run(main())]
    assert laid_bytes() >= sum(one.nbytes for one in found)
    assert [one.mean() for one in found] == [3.0, 4.0, 5.0]


def test_calls_without_a_result_keep_no_place(cloud: Cloud) -> None:
    with pytest.raises(ZeroDivisionError):
        cloud.cpu.clone(failing, **BY_NODE)
    assert cloud.cpu.submit_to(filled, (1.0, 3), **BY_NODE).result(60).sum() == 3.0
    kept = landing._landing
    assert kept is not None
    until(lambda: gc.collect() >= 0 and repr(kept) == "<Landing 0 places>")


def test_a_child_keeps_what_its_parent_forgets(cloud: Cloud) -> None:
    """The memory of a result is not given back while another process may have it."""
    found = cloud.cpu.clone(filled, 6.0, **BY_NODE)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(writing)
            os.read(reading, 1)
            right = bool((found == 6.0).all())
        finally:
            os._exit(0 if right else 1)
    os.close(reading)
    del found
    gc.collect()
    again = cloud.cpu.clone(filled, 7.0, **BY_NODE)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (again == 7.0).all()


def test_attempts_of_one_call_do_not_write_where_others_do() -> None:
    """One that is lost with its node may run on, and lay its result down later than the one that counts."""
    place = Landing().place()
    lost, counts = (numpy.full(50_000, value) for value in (1.0, 2.0))
    right = messages.pickled(counts, land=landing.next_part(place.address))
    assert messages.pickled(lost, land=place.address)[:1] == LANDED
    assert isinstance(right, bytes)
    assert (lie(right, place) == 2.0).all()


def test_no_attempt_writes_to_the_place_of_another_call() -> None:
    """However many nodes are lost: when its place has no part left, a result goes along."""
    kept = Landing()
    place, other = kept.place(), kept.place()
    part: landing.Address | None = place.address
    seen = set()
    while part is not None:
        assert place.address[-1] <= part[-1] < other.address[-1]
        seen.add(part[-1])
        part = landing.next_part(part)
    assert len(seen) == 16


def test_what_lies_elsewhere_is_an_error_of_the_call() -> None:
    kept = Landing()
    place, other = kept.place(), kept.place()
    outcome = messages.pickled(numpy.ones(50_000), land=other.address)
    assert isinstance(outcome, bytes)
    for wrong in (outcome, LANDED, LANDED + b"nonsense", outcome[:1] + messages._pack([b"", [0], [-1], 0])):
        with pytest.raises(CallFailed, match="cannot be read"):
            lie(wrong, place)
    with pytest.raises(CallFailed, match="cannot be read"):  # nothing was laid so far behind
        lie(LANDED + messages._pack([b"", [1 << 30], [8], other.address[-1]]), other)
    assert (lie(outcome, other) == 1.0).all()


def test_a_result_goes_along_if_it_cannot_be_laid() -> None:
    """Who waits is gone, or another file has its descriptor by now."""
    place = Landing().place()
    process, descriptor, number, start = place.address
    for wrong in ((process, descriptor, number + 1, start), (process, 1 << 20, number, start)):
        found = dumps(numpy.ones(50_000), cloudpickle.dumps, segments=False, land=wrong)
        assert isinstance(found, bytes) and found[:1] == ALONG
