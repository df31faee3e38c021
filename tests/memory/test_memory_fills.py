"""`get_or_set`: one makes the value, the others wait or take the stale one, and nothing outdated is kept."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import RunningCloud
from memory.pools import in_loop, pools
from virgo import aio
from virgo.cloud import connect
from virgo.errors import BadArgument, NodeLost
from virgo.memory import calls


@in_loop
async def test_one_claims_and_the_others_are_told(tmp_path: Path) -> None:
    """The first who finds nothing gets the claim, from any node; it may ask again; what it fills is fresh."""
    async with pools(tmp_path) as pool:
        assert await pool[1].run("MEMORY.FETCH", "k", "me", 10_000) == [None, 1]
        assert await pool[2].run("MEMORY.FETCH", "k", "you", 10_000) == [None, 2]
        assert await pool[3].run("MEMORY.FETCH", "k", "me", 10_000) == [None, 1]
        assert await pool[2].run("MEMORY.FILL", "k", "you", "no") is None
        assert await pool[1].run("MEMORY.FILL", "k", "me", "v") > 0
        assert await pool[2].run("MEMORY.FETCH", "k", "you", 10_000) == [b"v", 0]
        assert await pool[1].run("MEMORY.FILL", "k", "me", "again") is None, "a claim is good for one fill"
        assert await pool[1].run("GET", "k") == b"v"


@pytest.mark.parametrize(
    "what", [("DEL", "s:k"), ("SET", "s:k", "newer"), ("MEMORY.DROP", "s"), ("FLUSHDB",)]
)
@in_loop
async def test_what_changes_a_key_voids_the_claim(tmp_path: Path, what: tuple[str, ...]) -> None:
    """What was made of older data is not kept in the place of what has been decided since."""
    async with pools(tmp_path) as pool:
        await pool[1].run("MEMORY.NAMESPACE", "s")
        for first in (False, True):
            if first:
                await pool[1].run("SET", "s:k", "old")
                await pool[1].run("DEL", "s:k")
            assert await pool[1].run("MEMORY.FETCH", "s:k", "me", 10_000) == [None, 1]
            await pool[2].run(*what)
            before = await pool[1].run("GET", "s:k")
            assert await pool[1].run("MEMORY.FILL", "s:k", "me", "outdated") is None
            assert await pool[1].run("GET", "s:k") == before
            await pool[1].run("DEL", "s:k")


@in_loop
async def test_a_claim_ends(tmp_path: Path) -> None:
    """Given up, or past its time, it is another's; what is left over is removed."""
    async with pools(tmp_path, 1) as pool:
        node = pool[1]
        await node.run("MEMORY.FETCH", "k", "me", 10_000)
        assert await node.run("MEMORY.RELEASE", "k", "you") == 0
        assert await node.run("MEMORY.RELEASE", "k", "me") == 1
        assert await node.run("MEMORY.FETCH", "k", "you", 1) == [None, 1]
        await asyncio.sleep(0.01)
        assert await node.run("MEMORY.FETCH", "k", "me", 1) == [None, 1]
        await asyncio.sleep(0.01)
        store = node.module.store
        with store.batching() as batch:
            assert batch.drop_claims(int(time.time() * 1000), 10) == 1
        assert store.stats()["keys"] == 0


@in_loop
async def test_a_stale_value_is_given_while_one_makes_it_anew(tmp_path: Path) -> None:
    """After its fresh time one gets the claim with the stale value, the others the stale value."""
    async with pools(tmp_path, 1) as pool:
        node = pool[1]
        await node.run("MEMORY.FETCH", "k", "me", 1000)
        await node.run("MEMORY.FILL", "k", "me", "v1", "PX", 30, "STALE", 60_000)
        assert await node.run("MEMORY.FETCH", "k", "you", 1000) == [b"v1", 0]
        await asyncio.sleep(0.04)
        assert await node.run("GET", "k") == b"v1"
        assert await node.run("MEMORY.FETCH", "k", "you", 1000) == [b"v1", 1]
        assert await node.run("MEMORY.FETCH", "k", "me", 1000) == [b"v1", 2]
        await node.run("MEMORY.FILL", "k", "you", "v2")
        assert await node.run("MEMORY.FETCH", "k", "me", 1000) == [b"v2", 0]
        assert await node.run("TTL", "k") == -1


@pytest.mark.parametrize(
    "request_",
    [
        ("MEMORY.FETCH", "k", "", 10),
        ("MEMORY.FETCH", "k", "x" * 65, 10),
        ("MEMORY.FETCH", "k", "me", 0),
        ("MEMORY.FILL", "k", "me", "v", "STALE", 10),
        ("MEMORY.FILL", "k", "me", "v", "PX"),
        ("MEMORY.FILL", "k", "me", "v", "EX", 10),
        ("MEMORY.FILL", "k", "me", "v", "PX", -1),
    ],
)
@in_loop
async def test_wrong_requests(tmp_path: Path, request_: tuple[Any, ...]) -> None:
    """They are refused."""
    async with pools(tmp_path, 1) as pool:
        with pytest.raises(BadArgument):
            await pool[1].run(*request_)


def herd(url: str, home: Path, key: str, made: str, barrier: Any, results: Any) -> None:
    """One process of many that want the same value at the same time."""
    with connect(url, home=home) as cloud:
        memory = cloud.memory

        def make() -> bytes:
            memory.increment(made)
            time.sleep(0.2)
            return b"made"

        memory.get("warm up")
        barrier.wait()
        results.put(memory.get_or_set(key, make))


@pytest.mark.parametrize("nodes", [("n1", "n1"), ("n2", "n3")])
def test_a_herd_makes_a_value_once(cloud3: RunningCloud, nodes: tuple[str, str]) -> None:
    """Six processes that miss at once: one makes the value, all get it; mapped, and from other nodes."""
    key, made = f"herd {nodes}", f"herd made {nodes}"
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(6), context.Queue()
    urls = [f"unix:{cloud3.socket(nodes[number % 2])}" for number in range(6)]
    processes = [
        context.Process(target=herd, args=(url, cloud3.home, key, made, barrier, results)) for url in urls
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [b"made"] * 6
    for process in processes:
        process.join()
    with cloud3.connect() as cloud:
        assert cloud.memory[made] == b"1"


def hanging(url: str, home: Path, key: str, started: Any) -> None:
    """A process that claims and then hangs."""
    with connect(url, home=home) as cloud:

        def make() -> bytes:
            started.set()
            time.sleep(60)
            return b"never"

        cloud.memory.get_or_set(key, make, fill_s=0.5)


def test_a_killed_filler_holds_nobody_up_for_long(cloud3: RunningCloud) -> None:
    """Its claim ends with its time, and the next one makes the value."""
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    url = f"unix:{cloud3.socket('n1')}"
    process = context.Process(target=hanging, args=(url, cloud3.home, "killed filler", started))
    process.start()
    assert started.wait(60)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    with cloud3.connect() as cloud:
        assert cloud.memory.get_or_set("killed filler", lambda: b"by another") == b"by another"


def test_a_failed_filler_lets_the_next_one_try_at_once(cloud3: RunningCloud) -> None:
    """What `make` raises is raised to its caller alone."""

    def fails() -> bytes:
        raise LookupError("no such page")

    with cloud3.connect() as cloud:
        memory = cloud.memory.namespace("failed filler")
        with pytest.raises(LookupError):
            memory.get_or_set("k", fails)
        with pytest.raises(TypeError):
            memory.get_or_set("k", lambda: 17)  # type: ignore[arg-type, return-value]
        assert memory.get_or_set("k", lambda: b"v", ttl_s=60) == b"v"
        assert memory.get_or_set("k", fails) == b"v"
        with pytest.raises(BadArgument):
            memory.get_or_set("k", fails, stale_s=1)


def test_threads_of_one_client_make_a_value_once(cloud3: RunningCloud) -> None:
    """Threads are told apart, too."""
    calls: list[int] = []

    def make() -> bytes:
        calls.append(1)
        time.sleep(0.1)
        return b"v"

    with cloud3.connect() as cloud:
        results: list[bytes] = []
        work: Callable[[], None] = lambda: results.append(cloud.memory.get_or_set("threads", make))  # noqa: E731
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (results, calls) == ([b"v"] * 6, [1])


def test_asyncio_makes_a_value_once(cloud3: RunningCloud) -> None:
    """Coroutines wait without holding up others; `make` may be a coroutine function."""
    calls: list[int] = []

    async def make() -> bytes:
        calls.append(1)
        await asyncio.sleep(0.1)
        return b"v"

    async def main() -> None:
        async with await aio.connect(f"unix:{cloud3.socket('n1')}", home=cloud3.home) as cloud:
            results = await asyncio.gather(*(cloud.memory.get_or_set("coroutines", make) for _ in range(6)))
            assert (results, calls) == ([b"v"] * 6, [1])
            assert await cloud.memory.get_or_set("plain function", lambda: b"w", ttl_s=9, stale_s=9) == b"w"

    asyncio.run(main())


def test_what_went_wrong_first_is_what_is_raised(
    cloud3: RunningCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A maker's error is not hidden by a node that cannot be told of it."""

    def fails() -> bytes:
        raise LookupError("no such page")

    def lost(*_arguments: object) -> None:
        raise NodeLost("cannot be told")

    monkeypatch.setattr(calls, "release_key", lost)
    with cloud3.connect() as cloud, pytest.raises(LookupError):
        cloud.memory.get_or_set("hidden", fails)
