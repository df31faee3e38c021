"""Keys that are kept on two nodes, through loss and return."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from memory.kept import TWICE, copies, filled, kill, look, looking, seen
from memory.pools import in_loop
from virgo.errors import (
    BadArgument,
    Conflict,
    DeadlineExceeded,
    NodeLost,
)
from virgo.limits import MEMORY_SLOTS, MEMORY_SLOTS_ALL
from virgo.memory import keeping, keyspace
from virgo.memory.keeping import Keep, Pair


def test_marks() -> None:
    """A mark says how a key is kept; anything else in braces is a tag."""
    assert keeping.keep_of(b"{*2}k") == Keep(2)
    assert keeping.keep_of(b"{*d}k") == Keep(1, True)
    assert keeping.keep_of(b"{*2d}k") == Keep(2, True)
    for plain in (b"k", b"{*2", b"{*}k", b"{*3}k", b"{*d2}k", b"x{*2}k", b"{2}k", b"{*2 }k"):
        assert keeping.keep_of(plain) is keeping.PLAIN
    assert keyspace.slot_of(b"{*2}k") == MEMORY_SLOTS + keyspace.slot_of(b"k")
    assert keyspace.slot_of(b"{*d}k") == keyspace.slot_of(b"k")
    assert keyspace.slot_of(b"{*2}{tag}k") == MEMORY_SLOTS + keyspace.slot_of(b"{tag}other")


def test_who_succeeds() -> None:
    """The mirror of a lost owner takes over; an owner lets a lost or full mirror go; others do nothing."""
    pairs = [Pair(1, 2), Pair(2, 1), Pair(3, 2), Pair(1, 3), Pair(1, 0), Pair(0, 0)]
    assert keeping.succeed(pairs, 1, {2}, ()) == {0: Pair(1, 0), 1: Pair(1, 0)}
    assert keeping.succeed(pairs, 1, (), {3}) == {3: Pair(1, 0)}
    assert keeping.succeed(pairs, 2, {3}, ()) == {2: Pair(2, 0)}
    assert keeping.succeed(pairs, 3, {2}, ()) == {2: Pair(3, 0)}
    assert keeping.succeed(pairs, 2, (), ()) == {}
    assert keeping.choose_mirror(1, {1: 9}, random.randrange) == 0
    assert keeping.choose_mirror(1, {1: 9, 2: 0, 3: 5}, random.randrange) == 3


@in_loop
async def test_each_change_has_its_copy_when_it_is_answered(tmp_path: Path) -> None:
    """Two nodes have the record; counting and listing see each key once."""
    async with looking(tmp_path) as pool:
        values = await filled(pool[1], TWICE, 100)
        assert copies(pool) == 100
        for number in (1, 2, 3):
            assert await pool[number].run("DBSIZE") == 100
            assert await seen(pool[number], values) == values
            assert sorted(await pool[number].run("KEYS", "*")) == sorted(key.encode() for key in values)
        await pool[2].run("INCR", "{*2}n")
        await pool[3].run("APPEND", "{*2}k7", "0")
        assert await pool[1].run("DEL", "{*2}k1", "{*2}k2") == 2
        assert copies(pool) == 99
        for key in ("{*2}n", "{*2}k7", "{*2}k1"):
            records = {
                batch.key(keyspace.stored_key(key.encode()))
                for node in pool.nodes.values()
                for batch in [node.module.store.batch()]
            }
            assert len(records - {None}) == (key != "{*2}k1"), "the same record, or none, on all"
        await pool[2].run("FLUSHDB")
        assert copies(pool) == await pool[1].run("DBSIZE") == 0
        assert all(node.module.store.stats()["keys"] == 0 for node in pool.nodes.values())


@in_loop
async def test_a_lost_owner(tmp_path: Path) -> None:
    """Reads go on at once, writes when the mirror has taken over; a third node gets the copies."""
    async with looking(tmp_path) as pool:
        values = await filled(pool[1], TWICE, 200)
        await look(pool)
        await kill(pool[1])
        assert await seen(pool[2], values) == await seen(pool[3], values) == values
        write = asyncio.create_task(pool[2].run("INCRBY", "{*2}k5", 100))
        await asyncio.sleep(0.05)
        assert not write.done()
        await look(pool, 3)
        assert await write == 105
        values["{*2}k5"] = b"105"
        assert await seen(pool[3], values) == values
        assert await pool[2].run("DBSIZE") == 200
        assert copies(pool) == 200, "restored"
        assert [pool[number].stats()["slots_kept_once"] for number in (2, 3)] == [0, 0]
        # The other of the two that have it now goes, too.
        await kill(pool[2])
        await look(pool, 3)
        assert await seen(pool[3], values) == values
        assert await pool[3].run("DBSIZE") == 200
        assert copies(pool) == 0 < pool[3].stats()["slots_kept_once"]


@in_loop
async def test_a_lost_mirror(tmp_path: Path) -> None:
    """Changes wait until it is let go, then another has the copies."""
    async with looking(tmp_path) as pool:
        await filled(pool[1], TWICE, 60)
        await look(pool)
        table = pool[1].module._slots.table
        victim = table[MEMORY_SLOTS_ALL + keyspace.slot_of(b"{*2}k5") - MEMORY_SLOTS]
        await kill(pool[victim])
        write = asyncio.create_task(pool[1].run("SET", "{*2}k5", "new"))
        await asyncio.sleep(0.3)
        assert not write.done(), "it is not acknowledged with one copy while the other may come back"
        await look(pool, 3)
        await write
        assert copies(pool) == 60
        await kill(pool[1])
        [left] = [node for node in pool.nodes.values() if node.up]
        assert await left.run("GET", "{*2}k5") == b"new"


@in_loop
async def test_a_node_that_comes_back_has_no_say(tmp_path: Path) -> None:
    """What the old owner still has is older than what was changed since, and is forgotten."""
    async with looking(tmp_path) as pool:
        values = await filled(pool[1], TWICE, 80)
        await look(pool)
        await pool[1].stop()
        await look(pool, 3)
        await pool[2].run("DEL", "{*2}k1")
        await pool[2].run("SET", "{*2}k2", "newer")
        values["{*2}k2"] = b"newer"
        del values["{*2}k1"]
        await pool[1].start()
        for number in (1, 2, 3):
            assert await seen(pool[number], [*values, "{*2}k1"]) == {**values, "{*2}k1": None}
            assert await pool[number].run("DBSIZE") == 79
        await look(pool, 3)
        await kill(pool[2])
        await look(pool, 3)
        assert await seen(pool[3], values) == values
        assert copies(pool) == 79


@in_loop
async def test_an_owner_that_was_cut_off_acknowledges_nothing(tmp_path: Path) -> None:
    """The mirror has taken over and takes no copies from it; it learns from that, and forgets its own."""
    async with looking(tmp_path) as pool:
        await filled(pool[1], TWICE, 20)
        await look(pool)
        old = pool[1].module._slots
        stale = list(old.table)
        pool[1].up = False
        await look(pool, 3)
        await pool[2].run("SET", "{*2}k3", "new owner's")
        pool[1].up = True
        assert old.table == stale
        with pytest.raises(Conflict):
            await pool[1].run("SET", "{*2}k3", "old owner's")
        await look(pool)
        for number in (1, 2, 3):
            assert await pool[number].run("GET", "{*2}k3") == b"new owner's"


@in_loop
async def test_a_restarted_owner_sends_its_mirrors_all(tmp_path: Path) -> None:
    """It may have died between a change and its copy: then the copies are made alike, and extra ones go."""
    async with looking(tmp_path) as pool:
        values = await filled(pool[1], TWICE, 50)
        await look(pool)
        with pool[1].module.store.batching() as batch:  # as if it had died here
            batch.put_plain(keyspace.stored_key(b"{*2}k1"), b"unsent")
            batch.delete_key(keyspace.stored_key(b"{*2}k2"))
            batch._touched.clear()
        await pool[1].module._mirrors.look(resync=True)
        await kill(pool[1])
        await look(pool, 3)
        values["{*2}k1"] = b"unsent"
        del values["{*2}k2"]
        assert await seen(pool[3], values) == values
        assert await pool[3].run("DBSIZE") == 49


@in_loop
async def test_one_node_alone_keeps_once_until_there_is_another(tmp_path: Path) -> None:
    """It says so, and copies are made as soon as another node is there."""
    async with looking(tmp_path, 2) as pool:
        await pool[2].stop()
        values = await filled(pool[1], TWICE, 30)
        assert pool[1].stats()["slots_kept_once"] > 0 == pool[1].stats()["slots_kept_twice"]
        await pool[2].start()
        await look(pool)
        assert pool[1].stats()["slots_kept_once"] == 0
        assert copies(pool) == 30
        await kill(pool[1])
        assert await seen(pool[2], values) == values


@in_loop
async def test_a_full_mirror_is_let_go(tmp_path: Path) -> None:
    """Its room does not bound the owner's."""
    async with looking(tmp_path, 2) as pool:
        await filled(pool[1], TWICE, 10)
        await pool[2].run("VIRGO_MALLOC", pool[2].module.store.room_bytes(), "NODE", "n2")
        write = asyncio.create_task(pool[1].run("SET", "{*2}k1", b"v" * 100_000))
        await asyncio.sleep(0.3)
        await look(pool, 3)
        await write
        assert await pool[2].run("STRLEN", "{*2}k1") == 100_000
        assert pool[1].stats()["slots_kept_once"] > 0


@in_loop
async def test_changes_beside_loss_and_return(tmp_path: Path) -> None:
    """Counters raised while nodes come and go, one at a time: what was acknowledged is there, once each."""
    draw = random.Random(5)
    async with looking(tmp_path) as pool:
        acknowledged = dict.fromkeys((f"{{*2}}c{number}" for number in range(20)), 0)
        unknown = dict.fromkeys(acknowledged, 0)
        over = False

        async def raise_counters() -> None:
            while not over:
                key = draw.choice(list(acknowledged))
                node = draw.choice([node for node in pool.nodes.values() if node.up])
                try:
                    await asyncio.wait_for(node.run("INCR", key), 5)
                    acknowledged[key] += 1
                except (NodeLost, Conflict, DeadlineExceeded, TimeoutError):
                    unknown[key] += 1
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(raise_counters()) for _ in range(4)]
        for turn in range(6):
            await asyncio.sleep(0.2)
            victim = pool[turn % 3 + 1]
            victim.up = False
            await asyncio.sleep(0.02)
            await look(pool, 3)
            await asyncio.sleep(0.1)
            await victim.stop()
            await victim.start()
            await look(pool, 3)
        over = True
        await asyncio.gather(*tasks)
        await look(pool, 2)
        assert sum(acknowledged.values()) > 100
        for number in (1, 2, 3):
            found = await seen(pool[number], acknowledged)
            for key, count in acknowledged.items():
                assert count <= int(found[key] or 0) <= count + unknown[key], key


@in_loop
async def test_copies_that_expire_or_are_swept_are_not_counted(tmp_path: Path) -> None:
    """DBSIZE counts each key once, whatever removes it, and wherever."""
    async with looking(tmp_path) as pool:
        for number in range(20):
            await pool[1].run("SET", f"{{*2}}s:{number}", "v")
            await pool[1].run("SET", f"{{*2}}t{number}", "v", "PX", 20)
        await pool[1].run("SET", "{*2}stays", "v")
        await pool[1].run("MEMORY.DROP", "{*2}s")
        await asyncio.sleep(0.03)
        for node in pool.nodes.values():
            while node.module.store.unswept:
                await asyncio.sleep(0.01)
            node.module._expire_some()
        await look(pool)
        assert await pool[2].run("DBSIZE") == 1
        assert copies(pool) == 1


@in_loop
async def test_a_mirror_without_room_is_counted_right(tmp_path: Path) -> None:
    """What it did not take it does not count, and keys are counted without regions."""
    async with looking(tmp_path, 2, capacity_bytes=16 << 20) as pool:
        await pool[1].run("VIRGO_MALLOC", pool[1].module.store.room_bytes() - 200_000, "NODE", "n1")
        await pool[2].run("VIRGO_MALLOC", 100, "DURABLE")
        values = [part for number in range(60) for part in (f"{{*2}}k{number}", b"v" * 10_000)]
        write = asyncio.create_task(pool[2].run("MSET", *values))
        await asyncio.sleep(0.5)
        await look(pool, 3)
        await write
        for number in (1, 2):
            assert await pool[number].run("DBSIZE") == 60
        await pool[1].run("DEL", *values[::2])
        await look(pool)
        assert [await pool[number].run("DBSIZE") for number in (1, 2)] == [0, 0]
        assert [pool[number].stats()["keys"] for number in (1, 2)] == [0, 1], "the region's"


@pytest.mark.parametrize(
    "request_",
    [
        ("MEMORY.COPY.BEGIN", 1, 17),
        ("MEMORY.COPY.END", 1, MEMORY_SLOTS + 3),
        ("MEMORY.COPY.BEGIN", 2, MEMORY_SLOTS_ALL),
        ("MEMORY.COPY.BEGIN", 2, -1),
        ("MEMORY.COPY.PUT", 2, b"x"),
        ("MEMORY.COPY.PUT", 2, b"x", b"y"),
        ("MEMORY.COPY.PUT", 1, b"\0\0victim", b""),
        ("MEMORY.KEPT.GET", b"x"),
        ("MEMORY.KEPT.MAKE", b"x", 1),
        ("MEMORY.KEPT.FREE", b"{*d}\0region:x"),
        ("MEMORY.KEY.PUT", b"k", b"1", b"v"),
    ],
)
@in_loop
async def test_what_only_nodes_ask_is_checked(tmp_path: Path, request_: tuple[Any, ...]) -> None:
    """Nothing is lost by it, whoever sends it."""
    async with looking(tmp_path, 2) as pool:
        await pool[1].run("SET", "victim", "v")
        await pool[1].run("SET", "{*2}victim", "v")
        with pytest.raises((BadArgument, Conflict)):
            await pool[1].run(*request_)
        assert await pool[2].run("MGET", "victim", "{*2}victim") == [b"v", b"v"]
