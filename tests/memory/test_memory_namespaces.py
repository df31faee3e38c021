"""Namespaces: dropped at once on all nodes, told from what only begins alike, and known after a restart."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import RunningCloud
from memory.pools import PoolNode, Pools, in_loop, pools
from virgo.errors import BadArgument, Busy, NodeLost
from virgo.memory import keyspace, spaces
from virgo.memory.spaces import Declared, Space


async def fill(node: PoolNode, name: str, count: int) -> None:
    pairs = [part for number in range(count) for part in (f"{name}:{number}", f"value {number}")]
    await node.run("MSET", *pairs)


async def listed(node: PoolNode, pattern: str = "*") -> set[bytes]:
    found: set[bytes] = set()
    cursor = 0
    while True:
        cursor_, keys = await node.run("SCAN", cursor, "MATCH", pattern, "COUNT", 100)
        found |= set(keys)
        cursor = int(cursor_)
        if not cursor:
            return found


async def swept(pool: Pools) -> None:
    """Wait until nobody holds keys of dropped namespaces."""
    for node in pool.nodes.values():
        while node.up and node.module.store.unswept:
            await asyncio.sleep(0.01)


@in_loop
async def test_a_drop_hides_all_keys_on_all_nodes_at_once(tmp_path: Path) -> None:
    """From the answer on nobody sees a key of before, by any command; others stay; new ones are seen."""
    async with pools(tmp_path) as pool:
        for number in (1, 2, 3):
            await pool[number].run("MEMORY.NAMESPACE", "s")
            await fill(pool[number], f"s:{number}", 40)
            await fill(pool[number], f"t{number}", 5)
        await pool[1].run("SET", "s", "not in it")
        assert await pool[1].run("DBSIZE") == 136
        await pool[2].run("MEMORY.DROP", "s")
        for number in (1, 2, 3):
            node = pool[number]
            assert await node.run("GET", "s:1:3") is None
            assert await node.run("MGET", "s:2:3", "t1:1") == [None, b"value 1"]
            assert await node.run("EXISTS", "s:3:1") == 0
            assert await node.run("TTL", "s:3:1") == -2
            assert await listed(node, "s:*") == set()
            assert len(await listed(node)) == 16
        assert await pool[3].run("GET", "s") == b"not in it"
        assert await pool[3].run("INCR", "s:1:3") == 1, "it begins anew"
        await swept(pool)
        assert await pool[1].run("DBSIZE") == 17
        assert await pool[1].run("GET", "s:1:3") == b"1", "the sweep leaves what was set since"


@in_loop
async def test_a_drop_costs_no_look_at_the_keys(tmp_path: Path) -> None:
    """However many keys there are, a drop removes none before it is answered."""
    async with pools(tmp_path, 1) as pool:
        node = pool[1]
        await node.run("MEMORY.NAMESPACE", "s")
        await fill(node, "s", 3_000)
        before = node.module.store.env.info()["last_txnid"]
        await node.run("MEMORY.DROP", "s")
        assert node.module.store.env.info()["last_txnid"] - before <= 2
        assert await node.run("MEMORY.KEYS.COUNT") == 3_000, "they are still in the store"
        await swept(pool)
        assert await node.run("MEMORY.KEYS.COUNT") == 0
        assert node.stats()["keys_swept"] == 3_000


@in_loop
async def test_keys_set_before_the_namespace_was_declared_are_dropped_too(tmp_path: Path) -> None:
    """They have no generation, so the first drop removes them one by one, before it is answered."""
    async with pools(tmp_path) as pool:
        await fill(pool[1], "s", 50)
        await pool[2].run("MEMORY.NAMESPACE", "s")
        assert await pool[3].run("GET", "s:1") == b"value 1"
        await pool[3].run("SET", "s:2", "anew")
        await pool[2].run("MEMORY.DROP", "s")
        assert [await pool[1].run("GET", f"s:{number}") for number in range(50)] == [None] * 50
        assert await listed(pool[1]) == set()


@in_loop
async def test_a_drop_of_what_was_never_declared_drops_it(tmp_path: Path) -> None:
    """A namespace needs no declaration to be dropped: its keys are those that begin so."""
    async with pools(tmp_path) as pool:
        await fill(pool[1], "s", 20)
        await pool[2].run("MEMORY.DROP", "s")
        assert await listed(pool[1]) == set()


@in_loop
async def test_a_node_that_is_down_hears_of_a_drop_when_it_starts(tmp_path: Path) -> None:
    """A node that was down has dropped it when it serves; one that cannot be told makes the drop NodeLost."""
    async with pools(tmp_path) as pool:
        for number in (1, 2, 3):
            await pool[number].run("MEMORY.NAMESPACE", "s")
            await fill(pool[number], f"s:{number}", 30)
        await pool[3].stop()
        await pool[1].run("MEMORY.DROP", "s")
        await pool[3].start()
        assert [await pool[3].run("GET", f"s:3:{number}") for number in range(30)] == [None] * 30

        async def lost(_number: int, request: list[bytes]) -> None:
            if request[0] == b"MEMORY.NAMESPACE.LEARN":
                raise NodeLost("cut off")

        pool.on_call = lost
        await fill(pool[3], "s:3", 30)
        with pytest.raises(NodeLost):
            await pool[1].run("MEMORY.DROP", "s")
        pool.on_call = None
        for number in (2, 3):
            await pool[number].module._namespaces._refresh(fresh=False)  # what it does every few seconds
        assert [await pool[3].run("GET", f"s:3:{number}") for number in range(30)] == [None] * 30


@in_loop
async def test_renaming_moves_between_namespaces(tmp_path: Path) -> None:
    """A key takes the generation of the namespace that it comes to."""
    async with pools(tmp_path) as pool:
        node = pool[1]
        await node.run("MEMORY.DROP", "a")
        await node.run("MEMORY.DROP", "b")
        await node.run("MEMORY.DROP", "b")
        await node.run("SET", "a:1", "x", "EX", 100)
        await node.run("RENAME", "a:1", "b:1")
        assert (await node.run("GET", "b:1"), await node.run("GET", "a:1")) == (b"x", None)
        await node.run("COPY", "b:1", "plain")
        await node.run("MEMORY.DROP", "b")
        assert (await node.run("GET", "b:1"), await node.run("GET", "plain")) == (None, b"x")
        assert await node.run("TTL", "plain") > 90


@in_loop
async def test_figures_of_namespaces(tmp_path: Path) -> None:
    """Each node tells its part: keys that count, their bytes, generation, whether it is a cache."""
    import msgspec

    async with pools(tmp_path) as pool:
        await pool[1].run("MEMORY.NAMESPACE", "s", "CACHE", "yes")
        for number in (1, 2):
            await fill(pool[number], f"s:{number}", 100)
        parts = [msgspec.json.decode(await pool[number].run("MEMORY.NAMESPACES")) for number in (1, 2, 3)]
        assert all((part[0]["name"], part[0]["cache"]) == ("s", True) for part in parts)
        assert sum(part[0]["keys"] for part in parts) == 200
        assert sum(part[0]["key_bytes"] for part in parts) > 200 * len("s:1:1value 1")
        await pool[3].run("MEMORY.DROP", "s")
        [part] = msgspec.json.decode(await pool[1].run("MEMORY.NAMESPACES"))
        assert (part["keys"], part["generation"], part["cache"]) == (0, 2, True)


@pytest.mark.parametrize("name", ["", "a:b", "x" * 101])
@in_loop
async def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    """A name is short and has no colon."""
    async with pools(tmp_path, 1) as pool:
        for command in ("MEMORY.NAMESPACE", "MEMORY.DROP"):
            with pytest.raises(BadArgument):
                await pool[1].run(command, name)
        with pytest.raises(BadArgument):
            await pool[1].run("MEMORY.NAMESPACE", "s", "CACHE", "perhaps")


def test_too_many_namespaces() -> None:
    """There is a bound, and what is declared already may still be changed and dropped."""
    table = {b"%d" % number: Declared() for number in range(spaces.MEMORY_SPACES_MAX)}
    with pytest.raises(Busy):
        spaces.declare(table, b"more", None)
    assert spaces.drop(table, b"7")[b"7"].generation == 2
    assert len(spaces.encode_table(table)) < 500_000


def test_generations_go_round() -> None:
    """After the last generation comes the first one, never 0, which means none."""
    table = spaces.drop({b"s": Declared(2**32 - 1)}, b"s")
    assert table[b"s"].generation == 1
    assert Space.decode(Space(2**32 - 1, True, False, True).encode()) == Space(2**32 - 1, True, False, True)


NAMES = st.sampled_from([b"a", b"b", b"ab"])
KEYS = st.builds(lambda name, number: b"%b:%d" % (name, number), NAMES, st.integers(0, 4))
STEPS = st.one_of(
    st.tuples(st.just("set"), KEYS),
    st.tuples(st.just("delete"), KEYS),
    st.tuples(st.just("drop"), NAMES),
    st.tuples(st.just("declare"), NAMES),
    st.tuples(st.just("rename"), KEYS),
    st.tuples(st.just("sweep"), NAMES),
)


@settings(max_examples=60)
@given(st.lists(STEPS, max_size=25), st.integers(0, 2**32))
def test_namespaces_are_prefixes_that_can_be_emptied(steps: list[Any], seed: int) -> None:
    """Whatever is done in whatever order: what is seen is what a dictionary would have."""
    import tempfile

    async def run(directory: Path) -> None:
        draw = random.Random(seed)
        model: dict[bytes, bytes] = {}
        async with pools(directory, 2, capacity_bytes=16 << 20) as pool:
            for kind, what in steps:
                node = pool[draw.choice((1, 2))]
                if kind == "set":
                    model[what] = b"%d" % draw.randrange(10**6)
                    await node.run("SET", what, model[what])
                elif kind == "delete":
                    assert await node.run("DEL", what) == (model.pop(what, None) is not None)
                elif kind == "drop":
                    await node.run("MEMORY.DROP", what)
                    model = {key: value for key, value in model.items() if not key.startswith(what + b":")}
                elif kind == "declare":
                    await node.run("MEMORY.NAMESPACE", what, "CACHE", draw.choice(("yes", "no")))
                elif kind == "rename" and what in model:
                    target = draw.choice((b"a:9", b"b:9", b"plain"))
                    await node.run("RENAME", what, target)
                    model[target] = model.pop(what)
                elif kind == "sweep":
                    await asyncio.sleep(0)
                prefix = draw.choice((b"", b"a:", b"ab:", b"pl"))
                wanted = {key for key in model if key.startswith(prefix)}
                assert await listed(node, (keyspace.pattern_of(prefix)).decode()) == wanted
                for key in [*model, what]:
                    assert await node.run("GET", key) == model.get(key)

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run(Path(directory)))


def test_namespaces_from_python(cloud3: RunningCloud) -> None:
    """A namespace is a mapping of its own; mapped readers see a drop as soon as it is answered."""
    with cloud3.connect("n1") as first, cloud3.connect("n2") as second:
        space = first.memory.namespace("python")
        other = second.memory.namespace(b"python")
        for number in range(200):
            space[f"{number}"] = b"%d" % number
        assert first.memory.mapped and second.memory.mapped
        assert len(space) == len(other) == 200
        assert other["17"] == first.memory["python:17"] == b"17"
        assert space.get_many(["1", "no"]) == {"1": b"1"}
        space.set_many({"x": b"1", "y": b"2"})
        assert sorted(space.scan("1"))[:3] == [b"1", b"10", b"100"]
        assert (b"x" in space, "x" in other, "no" in space) == (True, True, False)
        assert space.increment("x", 4) == 5
        assert space.pop("x") == b"5"
        del space["y"]
        assert space.delete("0", "1", "no") == 2
        first.memory["pythons"] = b"another"
        other.drop()
        assert (list(space), len(other), space.get("17"), "18" in space) == ([], 0, None, False)
        assert first.memory["pythons"] == b"another"
        space["17"] = b"new"
        assert other["17"] == b"new"
        first.memory.drop("python")
        assert "17" not in other
        [info] = [each for each in first.memory.namespaces() if each.name == "python"]
        assert info.generation == 3


def test_a_namespace_travels(cloud3: RunningCloud) -> None:
    """As an argument of a clone it arrives bound to the node there."""

    def shipped(space: Any) -> bytes:
        space["from afar"] = b"hello"
        return bytes(space["near"])

    with cloud3.connect("n1") as cloud:
        space = cloud.memory.namespace("travels")
        space["near"] = b"here"
        assert cloud.cpu.submit(shipped, space).result(30) == b"here"
        assert space["from afar"] == b"hello"
        space.drop()
