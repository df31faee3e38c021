"""Caches give way: what is forgotten when room is needed, and what never is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from memory.pools import PoolNode, in_loop, pools
from virgo.errors import PoolFull
from virgo.limits import MiB
from virgo.memory.sketch import Sketch

CAPACITY = 16 * MiB


async def written(node: PoolNode, prefix: str, count: int, value: bytes) -> None:
    for start in range(0, count, 100):
        keys = [f"{prefix}{number}" for number in range(start, min(start + 100, count))]
        await node.run("MSET", *[part for key in keys for part in (key, value)])


@in_loop
async def test_a_cache_takes_more_than_there_is_room_for(tmp_path: Path) -> None:
    """Sets of a cache never fail for lack of room; each can be read at once; what is no cache stays whole."""
    async with pools(tmp_path, 1, capacity_bytes=CAPACITY) as pool:
        node = pool[1]
        await node.run("MEMORY.NAMESPACE", "c", "CACHE", "yes")
        await written(node, "mine", 2000, b"k" * 100)
        region = await node.run("VIRGO_MALLOC", 1 * MiB)
        await node.run("VIRGO_SET", region, b"r" * MiB)
        draw = random.Random(1)
        for number in range(12_000):
            value = draw.randbytes(draw.choice((10, 200, 1000, 5000)))
            await node.run("SET", f"c:{number}", value)
            assert await node.run("GET", f"c:{number}") == value
        figures = node.stats()
        assert figures["keys_evicted"] > 5_000
        assert figures["used_bytes"] <= CAPACITY
        assert figures["used_bytes"] > 0.7 * CAPACITY, "it does not forget more than it has to"
        assert await node.run("VIRGO_GET", region) == b"r" * MiB
        for number in range(2000):
            assert await node.run("GET", f"mine{number}") == b"k" * 100


@in_loop
async def test_what_is_no_cache_fails_for_lack_of_room(tmp_path: Path) -> None:
    """Without a cache a full pool refuses, and loses nothing."""
    async with pools(tmp_path, 1, capacity_bytes=CAPACITY) as pool:
        node = pool[1]
        await node.run("MEMORY.NAMESPACE", "n")
        count = 0
        with pytest.raises(PoolFull):
            while True:
                await node.run("SET", f"n:{count}", b"v" * 1000)
                count += 1
        assert count > CAPACITY / 1100 / 2, "pages are half full at least"
        assert [await node.run("STRLEN", f"n:{number}") for number in range(count)] == [1000] * count
        assert node.stats()["keys_evicted"] == 0


@in_loop
async def test_caches_make_room_for_others(tmp_path: Path) -> None:
    """Regions and keys that are no cache get the room of caches."""
    async with pools(tmp_path, 1, capacity_bytes=CAPACITY) as pool:
        node = pool[1]
        await node.run("MEMORY.NAMESPACE", "c", "CACHE", "yes")
        await written(node, "c:", 20_000, b"v" * 1000)
        for _ in range(3):
            await node.run("VIRGO_MALLOC", 3 * MiB)
        await written(node, "mine", 1_500, b"v" * 1000)
        with pytest.raises(PoolFull):
            for _ in range(3):
                await node.run("VIRGO_MALLOC", 3 * MiB)
        assert all([await node.run("EXISTS", f"mine{number}") for number in range(1_500)])


@in_loop
async def test_a_namespace_that_becomes_a_cache(tmp_path: Path) -> None:
    """What was set before it was one may be forgotten too; and no longer once it is none."""
    async with pools(tmp_path, 1, capacity_bytes=CAPACITY) as pool:
        node = pool[1]
        await written(node, "c:", 8_000, b"v" * 1000)
        await node.run("MEMORY.NAMESPACE", "c", "CACHE", "yes")
        await written(node, "x", 5_000, b"v" * 1000)
        left = sum([await node.run("EXISTS", f"c:{number}") for number in range(8_000)])
        assert 0 < left < 8_000
        await node.run("MEMORY.NAMESPACE", "c", "CACHE", "no")
        with pytest.raises(PoolFull):
            await written(node, "y", 9_000, b"v" * 1000)
        assert sum([await node.run("EXISTS", f"c:{number}") for number in range(8_000)]) == left


@in_loop
async def test_all_keys_may_be_evicted_if_the_node_is_told_so(tmp_path: Path) -> None:
    """With memory.evict the pool is a cache as a whole; regions stay."""
    async with pools(tmp_path, 1, capacity_bytes=CAPACITY, evict=True) as pool:
        node = pool[1]
        region = await node.run("VIRGO_MALLOC", 1 * MiB)
        await node.run("VIRGO_SET", region, b"r" * MiB)
        await written(node, "k", 30_000, b"v" * 1000)
        assert await node.run("GET", "k29999") == b"v" * 1000
        assert node.stats()["keys_evicted"] > 10_000
        assert await node.run("VIRGO_GET", region) == b"r" * MiB


async def hits_beside_a_scan(node: PoolNode, *, prefix: str, scanned: int) -> float:
    """The share of a hot set's reads that hit, while a scan of many keys goes through the cache."""
    hot = [f"{prefix}hot{number}" for number in range(3_000)]
    draw = random.Random(7)
    hits = reads = 0
    for number in range(scanned):
        await node.run("SET", f"{prefix}scan{number}", b"s" * 1000)
        for key in draw.choices(hot, k=1):
            reads += number > scanned // 2
            if await node.run("GET", key) is None:
                await node.run("SET", key, b"h" * 1000)
            else:
                hits += number > scanned // 2
    return hits / reads


@in_loop
async def test_a_scan_does_not_drive_out_what_is_used(tmp_path: Path) -> None:
    """Keys in use stay while three times as many as fit go by that are used once."""
    async with pools(tmp_path, 1, capacity_bytes=CAPACITY) as pool:
        await pool[1].run("MEMORY.NAMESPACE", "c", "CACHE", "yes")
        assert await hits_beside_a_scan(pool[1], prefix="c:", scanned=25_000) > 0.9


def test_the_sketch_is_shared_and_bounded(tmp_path: Path) -> None:
    """Processes that map it count together, up to its greatest count; without a file nothing is counted."""
    assert Sketch(tmp_path, create=False).tire(b"k") == 0
    first, second = Sketch(tmp_path, create=True), Sketch(tmp_path, create=False)
    for _ in range(3):
        first.use(b"k")
        second.use(b"k")
    assert second.tire(b"k") == 6
    assert first.tire(b"k") == 3
    for _ in range(1000):
        first.use(b"k")
    assert second.tire(b"k") == 255
    assert (tmp_path / "sketch").stat().st_blocks * 512 >= 4 * MiB, "a hole would be a SIGBUS on a full disk"


@in_loop
async def test_what_is_read_stays_on_a_node_that_is_new(tmp_path: Path) -> None:
    """Uses are counted from the first declaration of a cache on, whatever was asked before."""
    async with pools(tmp_path, 1, capacity_bytes=CAPACITY) as pool:
        node = pool[1]
        await node.run("SET", "plain", "v")
        assert node.module.store.sketch.tire(b"asked before") == 0
        await node.run("MEMORY.NAMESPACE", "c", "CACHE", "yes")
        assert (tmp_path / "n1" / "memory" / "sketch").exists()
        hot = [f"c:hot{number}" for number in range(20)]
        for key in hot:
            await node.run("SET", key, b"h" * 1000)
        for number in range(8_000):
            await node.run("SET", f"c:scan{number}", b"s" * 5_000)
            if number % 10 == 0:
                for key in hot:
                    assert await node.run("GET", key) is not None, number
