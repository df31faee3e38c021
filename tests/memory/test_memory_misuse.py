"""Regions and arrays used in ways that cannot be meant: typed errors, the same ones on every kind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from virgo.cloud import Cloud
from virgo.errors import BadArgument, TooLarge, UnknownId, WrongType
from virgo.memory import arrays
from virgo.memory.keyspace import slot_of
from virgo.memory.region import Region

if TYPE_CHECKING:
    from conftest import RunningCloud


@pytest.fixture
def cloud(cloud3: RunningCloud) -> Iterator[Cloud]:
    with cloud3.connect("n1") as connected:
        yield connected


@pytest.mark.parametrize("kind", [{}, {"shared": True}, {"node": "n2"}, {"durable": True}])
def test_numbers_are_numbers_on_every_kind_of_region(cloud: Cloud, kind: dict[str, Any]) -> None:
    """What is none is WrongType, and changes nothing."""
    with cloud.memory.malloc(10, **kind) as region:
        region.set(b"value")
        for wrong in (None, 1.5, True, "1"):
            for work in (lambda by: region.write(b"x", by), region.read, lambda by: region.read(by, 1)):
                with pytest.raises(WrongType):
                    work(wrong)
        with pytest.raises(WrongType):
            region.read(0, 1.5)  # type: ignore[arg-type]
        assert region.read(np.int64(1), np.int64(2)) == b"al" and region.get() == b"value"  # type: ignore[arg-type]
    with cloud.memory.malloc(10, shared=True) as region, pytest.raises(WrongType):
        region.view(write=True, timeout_s="x")  # type: ignore[arg-type]


def test_options_are_what_they_say(cloud: Cloud) -> None:
    """Words, numbers and truth values are not taken for one another."""
    for wrong in ({"cache": "yes"}, {"cache": 1}, {"copies": True}, {"copies": 3}, {"durable": "no"}):
        with pytest.raises(BadArgument) as caught:
            cloud.memory.namespace("s", **wrong)  # type: ignore[arg-type]
        assert caught.value.hint
    for lacking in ("PX", "VERSION"):
        with pytest.raises(BadArgument, match=f"{lacking} lacks its number"):
            cloud.client.execute("MEMORY.WRITE", "k", "v", lacking)


@pytest.mark.parametrize("version", ["1", None, True, 1.0, []])
def test_a_version_is_a_number(cloud: Cloud, version: Any) -> None:
    """Anything else is WrongType."""
    with pytest.raises(WrongType):
        cloud.memory.compare_and_set("k", b"v", version=version)


def test_a_value_beyond_the_limit_is_refused_at_every_door(
    cloud3: RunningCloud, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is brought down for the test in this process, where the mapped writes are made."""
    monkeypatch.setattr("virgo.memory.batch.MEMORY_VALUE_BYTES_MAX", 1000)
    cloud.memory["limit"] = bytes(1000)
    slots = cloud.client.execute("MEMORY.SLOTS")
    place = 2 * slot_of(b"limit")
    with cloud3.connect(f"n{int.from_bytes(slots[place : place + 2], 'little')}") as near:  # who has it
        memory = near.memory
        for write in (
            lambda value: memory.set("limit", value),
            lambda value: memory.set("limit", value, ttl_s=5),
            lambda value: memory.set_many({"limit": value}),
            lambda value: memory.append("limit", b"x"),
        ):
            with pytest.raises(TooLarge):
                write(bytes(1001))
            assert memory["limit"] == bytes(1000)


def test_ids_that_lead_nowhere_are_unknown_to_every_call(cloud: Cloud) -> None:
    """Freed ones of each kind, and those that were never given."""
    freed = []
    for kind in ({}, {"shared": True}, {"copies": 2}, {"durable": True}):
        with cloud.memory.malloc(10, **kind) as region:  # type: ignore[arg-type]
            freed.append(region.id)
    for identifier in (*freed, 1 << 47, 1 << 46, 5):
        region = cloud.memory.region(identifier)
        with pytest.raises(UnknownId):
            cloud.memory.attach(identifier)
        for use in (Region.get, Region.view, lambda each: each.view(write=True), Region.descriptor):
            with pytest.raises(UnknownId):
                use(region)


def test_an_array_that_cannot_be_made_leaves_no_region(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails once its region is there."""

    def fail(*_arguments: Any) -> Any:
        raise MemoryError

    before = cloud.memory.stats()["segments"]
    monkeypatch.setattr(arrays, "build", fail)
    with pytest.raises(MemoryError):
        cloud.memory.array(3)
    assert cloud.memory.stats()["segments"] == before


def test_parts_and_copies_of_an_array_have_no_region(cloud: Cloud) -> None:
    """Copies are plain; what is still of the class says that its source is to be asked."""
    with cloud.memory.array((4, 5)) as array:
        for made in (array.copy(), copy.copy(array), copy.deepcopy(array), array + 1, np.add(array, 1)):
            assert type(made) is np.ndarray and made.flags.writeable
        for part in (array.T, array.reshape(20), array.ravel()):
            for work in ("acquire", "free", "refresh", "__enter__"):
                with pytest.raises(BadArgument) as caught:
                    getattr(part, work)()
                assert caught.value.hint
            with pytest.raises(BadArgument):
                part.write([1.0])  # type: ignore[attr-defined]
        assert np.add(array, 1, out=array) is array and array.sum() == 20
        fraction, whole = np.modf(array, None, array)  # type: ignore[call-overload]
        assert whole is array and type(fraction) is np.ndarray
        np.add.at(array, (0, 0), 1)
        assert array[0, 0] == 2
