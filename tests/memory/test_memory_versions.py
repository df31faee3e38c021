"""Versions, counters and times of keys, through the mapped client, the plain one and asyncio's alike."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from virgo import aio
from virgo.errors import BadArgument, Conflict
from virgo.memory.client import MemoryClient

if TYPE_CHECKING:
    from conftest import RunningCloud

Ask = Callable[..., Any]


@pytest.fixture(params=["mapped", "wire", "another node", "asyncio"])
def ask(request: pytest.FixtureRequest, cloud3: RunningCloud) -> Iterator[Ask]:
    """Call a method of a memory client by name, of each kind of client in turn."""
    if request.param == "asyncio":
        loop = asyncio.new_event_loop()
        place = f"unix:{cloud3.socket('n1')}"
        cloud = loop.run_until_complete(aio.connect(place, home=cloud3.home))

        def run(name: str, *arguments: Any, **options: Any) -> Any:
            found = getattr(cloud.memory, name)(*arguments, **options)
            return loop.run_until_complete(found) if inspect.isawaitable(found) else found

        yield run
        loop.run_until_complete(cloud.close())
        loop.close()
        return
    with cloud3.connect("n2" if request.param == "another node" else "n1") as blocking:
        client = MemoryClient(blocking.client, mapped=request.param == "mapped")
        yield lambda name, *arguments, **options: getattr(client, name)(*arguments, **options)


@pytest.fixture(autouse=True)
def no_keys(cloud3: RunningCloud) -> None:
    with cloud3.connect("n1") as cloud:
        cloud.memory.delete("v", "other")
        cloud.memory["{v}"] = b""  # so that all know where it lies


def test_a_version_is_a_promise_that_nothing_has_changed(ask: Ask) -> None:
    """Who sets with the version that was read overwrites only that very value; all else is Conflict."""
    assert ask("read", "v") is None
    first = ask("compare_and_set", "v", b"1", version=0)
    with pytest.raises(Conflict):
        ask("compare_and_set", "v", b"2", version=0)
    found = ask("read", "v")
    assert (found.value, found.version, found.ttl_s, found.sliding) == (b"1", first, None, False)
    second = ask("compare_and_set", "v", b"2", version=first)
    assert second > first
    ask("set", "v", b"3")
    ask("set", "v", b"2")
    with pytest.raises(Conflict):  # the same value again is another version
        ask("compare_and_set", "v", b"4", version=second)
    ask("delete", "v")
    with pytest.raises(Conflict):
        ask("compare_and_set", "v", b"4", version=second)
    assert ask("compare_and_set", "v", b"5", version=0, ttl_s=100) > second
    assert 99 < ask("read", "v").ttl_s <= 100


def test_counters_and_appends(ask: Ask) -> None:
    """Numbers are added to, values grow, and what is no number is refused and stays."""
    assert [ask("increment", "v"), ask("increment", "v", 41), ask("increment", "v", -50)] == [1, 42, -8]
    assert ask("append", "v", b"x") == 3
    with pytest.raises(BadArgument):
        ask("increment", "v")
    with pytest.raises(BadArgument):
        ask("increment", "v", 1.5)
    assert ask("get", "v") == b"-8x"


def test_times_can_be_given_taken_and_slide(ask: Ask) -> None:
    """A key expires when told, not when told otherwise, and one that slides only when it is not used."""
    assert not ask("expire", "v", 100)
    ask("set", "v", b"1", ttl_s=100)
    assert ask("expire", "v", None) and not ask("expire", "v", None)
    assert ask("read", "v").ttl_s is None
    assert ask("expire", "v", 0.1)
    time.sleep(0.12)
    assert ask("get", "v") is None
    ask("set", "v", b"1", ttl_s=0.3, sliding=True)
    assert ask("read", "v").sliding
    for _ in range(6):
        time.sleep(0.15)
        assert ask("get", "v") == b"1"
    time.sleep(0.4)
    assert ask("get", "v") is None
    for options in ({"sliding": True}, {"sliding": True, "ttl_s": 1, "only_if": "absent"}):
        with pytest.raises(BadArgument):
            ask("set", "v", b"1", **options)


def test_setdefault_never_overwrites(ask: Ask) -> None:
    """The first value stays, whoever else sets a default."""
    assert ask("setdefault", "v", b"1") == b"1"
    assert ask("setdefault", "v", b"2") == b"1"


def test_optimistic_counting_from_all_kinds_of_clients_is_exact(cloud3: RunningCloud) -> None:
    """Threads that read, add and compare-and-set by different ways lose nothing."""

    def count(name: str, mapped: bool) -> None:
        with cloud3.connect(name) as cloud:
            memory = MemoryClient(cloud.client, mapped=mapped)
            for _ in range(50):
                while True:
                    found = memory.read("v")
                    value, version = (int(found.value), found.version) if found else (0, 0)
                    try:
                        memory.compare_and_set("v", b"%d" % (value + 1), version=version)
                        break
                    except Conflict:
                        continue

    ways = [("n1", True), ("n1", False), ("n2", True), ("n3", False)]
    threads = [threading.Thread(target=count, args=way) for way in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with cloud3.connect("n3") as cloud:
        assert cloud.memory["v"] == b"200"
