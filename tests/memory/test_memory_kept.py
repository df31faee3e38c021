"""Keys that are kept more safely: on disk before the answer, on two nodes, through loss and return."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from memory.pools import PoolNode, Pools, in_loop, pools
from virgo.errors import (
    BadArgument,
    Conflict,
    DeadlineExceeded,
    DiskFull,
    NodeLost,
    NotRunning,
    PoolFull,
    TooLarge,
    UnknownId,
)
from virgo.limits import MEMORY_SLOTS, MEMORY_SLOTS_ALL
from virgo.members import compose_id
from virgo.memory import keeping, kept, keyspace
from virgo.memory.batch import Batch
from virgo.memory.durable import Disk
from virgo.memory.keeping import Keep, Pair

TWICE, ON_DISK, BOTH = "{*2}", "{*d}", "{*2d}"


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


@contextlib.asynccontextmanager
async def looking(directory: Path, count: int = 3, **settings: Any) -> AsyncIterator[Pools]:
    """Pools whose nodes are up; `look` is called by the tests."""
    async with pools(directory, count, **settings) as pool:
        for node in pool.nodes.values():
            for task in node.tasks:
                if task.get_name() == "follow mirrors":
                    task.cancel()
        yield pool


async def look(pool: Pools, times: int = 2) -> None:
    """What the nodes that are up do every second."""
    for _ in range(times):
        for node in pool.nodes.values():
            if node.up:
                await node.module._mirrors.look()


async def kill(node: PoolNode) -> None:
    """Lose a node as `kill -9` does: nothing that it does afterwards is seen."""
    node.up = False
    await asyncio.sleep(0)


async def filled(node: PoolNode, mark: str, count: int) -> dict[str, bytes]:
    values = {f"{mark}k{number}": b"%d" % number for number in range(count)}
    await node.run("MSET", *[part for pair in values.items() for part in pair])
    return values


async def seen(node: PoolNode, keys: Any) -> dict[str, Any]:
    wanted = list(keys)
    return dict(zip(wanted, await node.run("MGET", *wanted), strict=True))


def copies(pool: Pools) -> int:
    return sum(node.stats()["copies_for_others"] for node in pool.nodes.values() if node.up)


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


# --- on disk ----------------------------------------------------------------------------------


async def lose_power(node: PoolNode) -> None:
    """Stop it, and have its files as after a reboot that nobody prepared."""
    await node.stop()
    life = node.module_life()
    life.change(boot="another boot", clean=False)


@pytest.mark.parametrize("mark", [ON_DISK, BOTH])
@in_loop
async def test_durable_keys_outlast_a_power_loss(tmp_path: Path, mark: str) -> None:
    """The pool begins empty, but for what was acknowledged as durable, with its times and versions."""
    async with looking(tmp_path, 2) as pool:
        node = pool[1]
        values = await filled(node, mark, 100)
        await node.run("SET", "plain", "lost")
        await node.run("SET", f"{mark}timed", "t", "PX", 60_000)
        await node.run("SET", f"{mark}past", "t", "PX", 1)
        await node.run("DEL", f"{mark}k1")
        version = (await node.run("MEMORY.READ", f"{mark}k2"))[1]
        del values[f"{mark}k1"]
        for each in pool.nodes.values():
            await lose_power(each)
        for each in pool.nodes.values():
            await each.start()
        assert await seen(node, values) == values
        assert await node.run("MGET", "plain", f"{mark}k1", f"{mark}past") == [None] * 3
        assert 0 < await node.run("PTTL", f"{mark}timed") <= 60_000
        assert (await node.run("MEMORY.READ", f"{mark}k2"))[1] == version
        assert await node.run("INCR", f"{mark}k2") == 3
        assert (await node.run("MEMORY.READ", f"{mark}k2"))[1] > version


@in_loop
async def test_many_durable_changes_share_an_fsync(tmp_path: Path) -> None:
    """Changes that come while others are being written go to disk together."""
    async with looking(tmp_path, 1) as pool:
        node = pool[1]
        await node.run("SET", "{*d}first", "v")
        await asyncio.gather(*(node.run("SET", f"{{*d}}k{number}", "v") for number in range(300)))
        disk = node.module.store.keeper.disk
        assert isinstance(disk, Disk)
        assert disk._env.info()["last_txnid"] < 150
        assert disk.sent == 301


@in_loop
async def test_a_flush_reaches_the_disk(tmp_path: Path) -> None:
    """After FLUSHDB and a power loss there is nothing, but what came afterwards."""
    async with looking(tmp_path, 1) as pool:
        node = pool[1]
        await filled(node, ON_DISK, 50)
        await node.run("FLUSHDB")
        await node.run("SET", "{*d}after", "v")
        await lose_power(node)
        await node.start()
        assert await node.run("KEYS", "*") == [b"{*d}after"]


@in_loop
async def test_a_disk_that_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that did not reach the disk is an error; the next one takes it along."""
    async with looking(tmp_path, 1) as pool:
        node = pool[1]
        await node.run("SET", "{*d}k", "v1")
        whole = Disk._write

        def refuse(self: Disk, records: Any, *, emptied: bool) -> None:
            raise DiskFull("no room")

        monkeypatch.setattr(Disk, "_write", refuse)
        with pytest.raises(DiskFull):
            await node.run("SET", "{*d}k", "v2")
        monkeypatch.setattr(Disk, "_write", whole)
        await node.run("SET", "{*d}other", "v")
        await lose_power(node)
        await node.start()
        assert await node.run("GET", "{*d}k") == b"v2"


@in_loop
async def test_clients_do_not_change_kept_keys_by_mapping(tmp_path: Path) -> None:
    """They could not send them elsewhere."""
    async with looking(tmp_path, 1) as pool:
        batch = Batch(pool[1].module.store)
        with pytest.raises(NotRunning):
            batch.put_plain(keyspace.stored_key(b"{*d}k"), b"v")
        batch.abort()


# --- regions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [("COPIES", 2), ("DURABLE",), ("COPIES", 2, "DURABLE")])
@in_loop
async def test_a_kept_region_is_a_region(tmp_path: Path, options: tuple[Any, ...]) -> None:
    """It is set, read and written as any, from every node; it ends with free; keys know nothing of it."""
    async with looking(tmp_path) as pool:
        first = await pool[1].run("VIRGO_MALLOC", 100, *options)
        second = await pool[1].run("VIRGO_MALLOC", 100, *options)
        assert first != second
        assert await pool[2].run("VIRGO_GET", first) == b""
        await pool[3].run("VIRGO_SET", first, b"0123456789")
        await pool[1].run("VIRGO_SET", first, b"AB", "AT", 12)
        assert await pool[2].run("VIRGO_GET", first) == b"0123456789\0\0AB"
        assert await pool[2].run("VIRGO_GET", first, "AT", 8, 5) == b"89\0\0A"
        assert await pool[2].run("VIRGO_GET", first, "AT", 8) == b"89\0\0AB"
        with pytest.raises(TooLarge):
            await pool[2].run("VIRGO_SET", first, bytes(101))
        for wrong in (("VIRGO_SET", first, b"x", "AT", 100), ("VIRGO_GET", first, "AT", 90, 11)):
            with pytest.raises((BadArgument, TooLarge)):
                await pool[2].run(*wrong)
        figures = msgspec.json.decode(await pool[2].run("MEMORY.REGION", first))
        assert (figures["id"], figures["size"], figures["length"]) == (first, 100, 14)
        assert await pool[1].run("KEYS", "*") == []
        await pool[1].run("FLUSHDB")
        assert await pool[2].run("VIRGO_GET", first) == b"0123456789\0\0AB"
        await pool[2].run("VIRGO_FREE", first)
        for call in ("VIRGO_GET", "VIRGO_FREE", "MEMORY.REGION"):
            with pytest.raises(UnknownId):
                await pool[1].run(call, first)
        with pytest.raises(UnknownId):
            await pool[1].run("VIRGO_SET", first, b"late")
        assert await pool[1].run("VIRGO_GET", second) == b""


@in_loop
async def test_a_region_on_two_nodes_outlasts_one(tmp_path: Path) -> None:
    """Reads go on, then writes, and a flush of keys does not reach it or its copy."""
    async with looking(tmp_path) as pool:
        region = await pool[1].run("VIRGO_MALLOC", 1000, "COPIES", 2)
        await pool[1].run("VIRGO_SET", region, b"v" * 1000)
        await pool[1].run("FLUSHDB")
        await look(pool)
        await kill(pool[1])
        assert await pool[3].run("VIRGO_GET", region) == b"v" * 1000
        await look(pool, 3)
        await pool[2].run("VIRGO_SET", region, b"w", "AT", 500)
        assert await pool[3].run("VIRGO_GET", region, "AT", 499, 3) == b"vwv"
        assert copies(pool) == 1


@in_loop
async def test_a_durable_region_outlasts_a_power_loss(tmp_path: Path) -> None:
    """With its value, also after a flush of keys; its id is not given again."""
    async with looking(tmp_path, 1) as pool:
        node = pool[1]
        region = await node.run("VIRGO_MALLOC", 1000, "DURABLE")
        await node.run("VIRGO_SET", region, b"v" * 10)
        await node.run("FLUSHDB")
        await lose_power(node)
        await node.start()
        assert await node.run("VIRGO_GET", region) == b"v" * 10
        assert await node.run("VIRGO_MALLOC", 1000, "DURABLE") > region


@pytest.mark.parametrize(
    "options",
    [("COPIES",), ("COPIES", 3), ("COPIES", 0), ("DURABLE", "SHARED"), ("COPIES", 2, "NODE", "n1")],
)
@in_loop
async def test_wrong_wishes(tmp_path: Path, options: tuple[Any, ...]) -> None:
    """They are refused, as are regions that are too large to be sent whole."""
    async with looking(tmp_path, 1) as pool:
        with pytest.raises(BadArgument):
            await pool[1].run("VIRGO_MALLOC", 100, *options)
        with pytest.raises(TooLarge):
            await pool[1].run("VIRGO_MALLOC", 300 << 20, "DURABLE")


def test_ids_of_kept_regions() -> None:
    """They name no node, are told from all others, and say how the region is kept."""
    identifier = kept.compose(Keep(2, True), 32_767, 2**31 - 1)
    assert kept.is_kept(identifier)
    assert kept.key_of(identifier) == b"{*2d}\0region:%d" % identifier
    assert not kept.is_kept(compose_id(1, 1))
    assert not kept.is_kept(17)
    with pytest.raises(PoolFull):
        kept.compose(Keep(2), 1, 2**31)


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
