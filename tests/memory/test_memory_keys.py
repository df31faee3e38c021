"""The key commands: beside redis-server with the same generated commands, and over nodes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.pools import Pools, pools
from memory.replies import plain
from virgo.errors import BadArgument, NodeLost, TooLarge, VirgoError
from virgo.limits import MEMORY_KEY_BYTES_MAX, MiB
from virgo.memory import keyspace

_KEY = st.sampled_from([b"k1", b"k2", b"k3", b"", b"x*y", b"{k1}2"])
_VALUE = st.sampled_from([b"", b"1", b"value", b"\r\n\0\xff", b"-7", b"10.5", b"9223372036854775807"])
_NUMBER = st.sampled_from(
    [
        *(b"0", b"1", b"-1", b"3", b"-3", b"100", b"9223372036854775807", b"-9223372036854775808"),
        *(b"1.5", b" 1", b"", b"+1", b"01", b"-0", b"9223372036854775808", b"0x1", b"one"),
    ]
)
_FLOAT = st.sampled_from(
    [b"0.1", b"-2.5", b"3.0e3", b"1e-20", b".5", b"5.", b"1e400", b"1e5000", b"x", b"", b"1 "]
)
_TIME = st.one_of(
    st.sampled_from([(b"EX", b"100"), (b"PX", b"100000"), (b"EXAT", b"9000000000"), (b"KEEPTTL",)]),
    st.just(()),
)
_SET = st.tuples(
    _KEY,
    _VALUE,
    st.sampled_from([(), (b"NX",), (b"XX",), (b"nx",), (b"NX", b"XX"), (b"BAD",), (b"EX",)]),
    st.sampled_from([(), (b"GET",)]),
    _TIME,
).map(lambda parts: (b"SET", parts[0], parts[1], *parts[2], *parts[3], *parts[4]))
_ONE = st.tuples(
    st.sampled_from(
        [b"GET", b"GETDEL", b"STRLEN", b"TYPE", b"TTL", b"PERSIST", b"INCR", b"DECR", b"EXPIRETIME", b"GETEX"]
    ),
    _KEY,
)
_MANY = st.builds(
    lambda name, keys: (name, *keys),
    st.sampled_from([b"MGET", b"EXISTS", b"DEL", b"UNLINK", b"TOUCH"]),
    st.lists(_KEY, min_size=1, max_size=4),
)
_MSET = st.lists(st.tuples(_KEY, _VALUE), min_size=1, max_size=3).map(
    lambda pairs: (b"MSET", *(part for pair in pairs for part in pair))
)
_UNTIL = st.sampled_from([b"100", b"0", b"-1", b"x", b"9000000000", b"1", b"99999"])
_PARTS = st.one_of(
    st.tuples(st.sampled_from([b"APPEND", b"GETSET", b"SETNX"]), _KEY, _VALUE),
    st.tuples(st.sampled_from([b"INCRBY", b"DECRBY"]), _KEY, _NUMBER),
    st.tuples(st.just(b"INCRBYFLOAT"), _KEY, _FLOAT),
    st.tuples(st.sampled_from([b"GETRANGE", b"SUBSTR"]), _KEY, _NUMBER, _NUMBER),
    st.tuples(st.just(b"SETRANGE"), _KEY, st.sampled_from([b"0", b"2", b"-1", b"x", b"7"]), _VALUE),
    st.tuples(st.sampled_from([b"SETEX", b"PSETEX"]), _KEY, st.sampled_from([b"99999", b"0", b"-1"]), _VALUE),
)
_TIMES = st.one_of(
    st.builds(
        lambda name, key, until, options: (name, key, until, *options),
        st.sampled_from([b"EXPIRE", b"EXPIREAT"]),
        _KEY,
        _UNTIL,
        st.lists(st.sampled_from([b"NX", b"XX", b"GT", b"lt", b"BAD"]), max_size=2),
    ),
    st.builds(
        lambda key, options: (b"GETEX", key, *options),
        _KEY,
        st.sampled_from([(b"EX", b"100"), (b"EXAT", b"9000000000"), (b"EXAT", b"1"), (b"PERSIST",)])
        | st.sampled_from([(b"EX", b"0"), (b"PERSIST", b"EX", b"1"), (b"NX",), (b"EX",)]),
    ),
)
_TWO = st.builds(
    lambda name, first, second, options: (name, first, second, *(options if name == b"COPY" else ())),
    st.sampled_from([b"RENAME", b"RENAMENX", b"COPY"]),
    _KEY,
    _KEY,
    st.sampled_from([(), (b"REPLACE",), (b"DB", b"0"), (b"DB",), (b"BAD",), (b"DB", b"0", b"replace")]),
)
_OTHER = st.one_of(
    st.tuples(st.sampled_from([b"KEYS"]), st.sampled_from([b"*", b"k?", b"k[12]", b"x\\**", b"[^k]*"])),
    st.sampled_from([(b"DBSIZE",), (b"FLUSHDB",), (b"SCAN", b"0", b"COUNT", b"3"), (b"RANDOMKEY",)]),
)
_COMMANDS = st.lists(
    st.one_of(_SET, _ONE, _MANY, _MSET, _PARTS, _TIMES, _TWO, _OTHER), min_size=1, max_size=40
)


async def scanned(nodes: Pools) -> list[bytes]:
    """All keys by SCAN, each turn on the other node."""
    cursor, found, turns = b"0", [], 0
    while turns == 0 or cursor != b"0":
        cursor, some = await nodes[turns % 2 + 1].run("SCAN", cursor, "COUNT", "2")
        found += some
        turns += 1
    return sorted(found)


@settings(max_examples=150, deadline=None)
@given(_COMMANDS)
def test_answers_are_those_of_redis(
    peer: redis.Redis, tmp_path_factory: pytest.TempPathFactory, commands: list[tuple[bytes, ...]]
) -> None:
    """Whatever is asked, from whichever node, redis-server answers the same, and refuses the same."""

    async def main() -> None:
        peer.flushall()
        async with pools(tmp_path_factory.mktemp("pools"), 2, capacity_bytes=32 * MiB) as nodes:
            for step, command in enumerate(commands):
                connection.send_command(*command)
                try:
                    theirs = connection.read_response()
                except redis.ResponseError:
                    theirs = VirgoError
                try:
                    ours = plain(await nodes[step % 2 + 1].run(*command))
                except VirgoError:
                    ours = VirgoError
                if command[0] == b"SCAN":
                    ours, theirs = await scanned(nodes), sorted(peer.scan_iter())
                elif command[0] == b"KEYS":
                    ours, theirs = sorted(ours), sorted(theirs)
                elif command[0] == b"RANDOMKEY" and theirs is not None:
                    ours, theirs = peer.exists(ours), 1
                assert ours == theirs, (command, ours, theirs)

    connection = peer.connection_pool.get_connection()
    try:
        asyncio.run(main())
    finally:
        peer.connection_pool.release(connection)


def test_keys_expire_for_readers_at_once_and_go_soon(tmp_path: Path) -> None:
    """A key past its time is absent to every command, and a little later it is no longer counted."""

    async def main() -> None:
        async with pools(tmp_path, 2, capacity_bytes=32 * MiB) as nodes:
            await nodes[1].run("SET", "a", "1", "PX", "60")
            await nodes[2].run("SET", "b", "1")
            assert 0 < await nodes[2].run("PTTL", "a") <= 60
            await asyncio.sleep(0.07)
            assert await nodes[1].run("MGET", "a", "b") == [None, b"1"]
            assert await nodes[2].run("EXISTS", "a") == 0
            assert await nodes[2].run("PTTL", "a") == -2
            assert await nodes[2].run("SET", "a", "2", "XX") is None
            async with asyncio.timeout(5):
                while await nodes[2].run("DBSIZE") != 1:
                    await asyncio.sleep(0.05)

    asyncio.run(main())


def test_a_scan_over_nodes_meets_every_key_once(tmp_path: Path) -> None:
    """SCAN visits all nodes; keys that are there throughout come exactly once, and others may come."""

    async def main() -> None:
        async with pools(tmp_path, 3, capacity_bytes=32 * MiB) as nodes:
            names = {f"key:{number}".encode() for number in range(600)}
            for number, name in enumerate(sorted(names)):
                await nodes[number % 3 + 1].run("SET", name, b"")
            assert all(node.stats()["keys"] for node in nodes.nodes.values())
            cursor, found, turns = b"0", [], 0
            while turns == 0 or cursor != b"0":
                cursor, some = await nodes[turns % 3 + 1].run("SCAN", cursor, "MATCH", "key:*", "COUNT", "50")
                await nodes[1].run("SET", f"new:{turns}", b"")
                found += some
                turns += 1
            assert sorted(found) == sorted(names)
            assert turns > 6
            with pytest.raises(BadArgument):
                await nodes[1].run("SCAN", 99 << 16)

    asyncio.run(main())


def test_a_lost_node_is_never_an_absent_key(tmp_path: Path) -> None:
    """Keys of a lost node are NodeLost in every command, and those of others are served."""

    async def main() -> None:
        async with pools(tmp_path, 2, capacity_bytes=32 * MiB) as nodes:
            await nodes[1].run("SET", "here", b"1")
            await nodes[2].run("SET", "there", b"2")
            await nodes[2].stop()
            assert await nodes[1].run("GET", "here") == b"1"
            for request in (
                ("GET", "there"),
                ("SET", "there", b"3"),
                ("MGET", "here", "there"),
                ("DEL", "there"),
                ("DBSIZE",),
                ("KEYS", "*"),
            ):
                with pytest.raises(NodeLost):
                    await nodes[1].run(*request)
            await nodes[2].start()
            assert await nodes[1].run("MGET", "here", "there") == [b"1", b"2"]

    asyncio.run(main())


def test_keys_are_bounded_alike_everywhere(tmp_path: Path) -> None:
    """The longest key works from every node, a longer one is TooLarge for reading and writing."""

    async def main() -> None:
        async with pools(tmp_path, 2, capacity_bytes=32 * MiB) as nodes:
            longest = b"k" * MEMORY_KEY_BYTES_MAX
            await nodes[1].run("SET", longest, b"1", "EX", "100")
            assert await nodes[2].run("GET", longest) == b"1"
            for node in (1, 2):
                for request in (("GET",), ("SET", b"x"), ("MGET",), ("TTL",)):
                    with pytest.raises(TooLarge):
                        await nodes[node].run(request[0], longest + b"k", *request[1:])

    asyncio.run(main())


def test_new_keys_go_elsewhere_when_the_node_is_full(tmp_path: Path) -> None:
    """A node whose pool regions have filled writes new keys to another; all read them."""

    async def main() -> None:
        async with pools(tmp_path, 2, capacity_bytes=16 * MiB) as nodes:
            await fill(nodes)
            for number in range(5):
                await nodes[1].run("SET", f"k{number}", b"x" * 1000)
            assert (nodes[1].stats()["keys"], nodes[2].stats()["keys"]) == (0, 5)
            assert await nodes[1].run("GET", "k3") == b"x" * 1000
            assert nodes[1].module._slots.table[keyspace.slot_of(b"k3")] == 2

    async def fill(nodes: Pools) -> None:
        for _ in range(4):
            await nodes[1].run("VIRGO_MALLOC", 4 * MiB, "NODE", "n1")

    asyncio.run(main())
