"""Regions over three nodes, with real stores and calls that a test can delay or lose."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from memory.pools import Pools, pools
from virgo.errors import BadArgument, NodeLost, NoNode, PoolFull, TooLarge, UnknownId
from virgo.limits import MEMORY_CHUNK_BYTES, MiB
from virgo.members import compose_id, node_of

CHUNK = MEMORY_CHUNK_BYTES
Test = Callable[[Pools], Coroutine[Any, Any, None]]


def run(directory: Path, test: Test, *, count: int = 3, capacity_bytes: int = 64 * MiB) -> None:
    async def main() -> None:
        async with pools(directory, count, capacity_bytes=capacity_bytes) as found:
            await test(found)

    asyncio.run(main())


def pattern(number: int, length: int) -> bytes:
    """Bytes that tell which value they are of, at any place."""
    return (b"%07d," % number * (length // 8 + 1))[:length]


def test_any_node_serves_any_region(tmp_path: Path) -> None:
    """Set on one node, get on another, free on a third; then every node says that the id is unknown."""

    async def test(nodes: Pools) -> None:
        identifier = await nodes[1].run("VIRGO_MALLOC", 100, "NODE", "n2")
        assert node_of(identifier) == 2
        assert await nodes[3].run("VIRGO_GET", identifier) == b""
        await nodes[1].run("VIRGO_SET", hex(identifier), b"a, b")
        assert [await node.run("VIRGO_GET", identifier) for node in nodes.nodes.values()] == [b"a, b"] * 3
        await nodes[3].run("VIRGO_FREE", identifier)
        for node in nodes.nodes.values():
            for command in (("VIRGO_GET",), ("VIRGO_SET", b"x"), ("VIRGO_FREE",)):
                with pytest.raises(UnknownId):
                    await node.run(command[0], identifier, *command[1:])

    run(tmp_path, test)


def test_bad_requests_are_typed_errors(tmp_path: Path) -> None:
    """Sizes and values out of range, nodes and ids that are none."""

    async def test(nodes: Pools) -> None:
        node = nodes[1]
        identifier = await node.run("VIRGO_MALLOC", 10)
        for error, *request in (
            (BadArgument, "VIRGO_MALLOC", 0),
            (BadArgument, "VIRGO_MALLOC", -5),
            (BadArgument, "VIRGO_MALLOC", "ten"),
            (BadArgument, "VIRGO_MALLOC", 10, "ON", "n1"),
            (NoNode, "VIRGO_MALLOC", 10, "NODE", "n9"),
            (TooLarge, "VIRGO_MALLOC", 2**40),
            (TooLarge, "VIRGO_SET", identifier, b"12345678901"),
            (UnknownId, "VIRGO_GET", 0),
            (UnknownId, "VIRGO_GET", -1),
            (UnknownId, "VIRGO_GET", compose_id(9, 1)),
            (UnknownId, "VIRGO_GET", compose_id(2, 1)),
            (BadArgument, "VIRGO_GET", "x"),
        ):
            with pytest.raises(error):
                await node.run(*request)
        await node.run("VIRGO_SET", identifier, b"1234567890")
        assert await node.run("VIRGO_GET", identifier) == b"1234567890"

    run(tmp_path, test)


def test_a_large_region_is_spread_and_whole(tmp_path: Path) -> None:
    """Every node has a part, every node gives the whole, shorter values and freeing leave no rest."""

    async def test(nodes: Pools) -> None:
        size = 6 * CHUNK + 5
        identifier = await nodes[1].run("VIRGO_MALLOC", size)
        assert nodes.total("declared_bytes") == size
        assert await nodes[2].run("VIRGO_GET", identifier) == b""
        for length in (size, CHUNK, 0, 2 * CHUNK + 1):
            value = os.urandom(length)
            await nodes[2].run("VIRGO_SET", identifier, value)
            assert await nodes[3].run("VIRGO_GET", identifier) == value
            assert nodes.total("chunks") == -(-length // CHUNK)
        assert all(node.stats()["declared_bytes"] for node in nodes.nodes.values())
        with pytest.raises(TooLarge):
            await nodes[2].run("VIRGO_SET", identifier, bytes(size + 1))
        await nodes[3].run("VIRGO_FREE", identifier)
        assert (nodes.total("chunks"), nodes.total("declared_bytes"), nodes.total("regions")) == (0, 0, 0)

    run(tmp_path, test)


def test_a_pinned_region_lies_whole_on_its_node(tmp_path: Path) -> None:
    """With NODE no other node has a part of it, however large it is."""

    async def test(nodes: Pools) -> None:
        identifier = await nodes[1].run("VIRGO_MALLOC", 3 * CHUNK, "NODE", "n3")
        await nodes[1].run("VIRGO_SET", identifier, bytes(3 * CHUNK))
        assert [node.stats()["chunks"] for node in nodes.nodes.values()] == [0, 0, 3]

    run(tmp_path, test)


def test_gets_never_see_a_torn_value(tmp_path: Path) -> None:
    """While two nodes set a spread region, each get returns one of the values whole."""

    async def test(nodes: Pools) -> None:
        identifier = await nodes[1].run("VIRGO_MALLOC", 3 * CHUNK)
        await nodes[1].run("VIRGO_SET", identifier, pattern(0, 100))

        async def write(number: int) -> None:
            for turn in range(4):
                kind = number * 10 + turn
                await nodes[number].run("VIRGO_SET", identifier, pattern(kind, CHUNK * (1 + kind % 3)))

        async def read(number: int) -> int:
            seen = set()
            while not all(task.done() for task in writers):
                value = await nodes[number].run("VIRGO_GET", identifier)
                assert value == pattern(int(value[:7]), len(value))
                seen.add(value[:7])
            return len(seen)

        writers = [asyncio.create_task(write(number)) for number in (1, 2)]
        counts = await asyncio.gather(read(3), read(1))
        await asyncio.gather(*writers)
        assert max(counts) > 1
        last = await nodes[1].run("VIRGO_GET", identifier)
        assert nodes.total("chunks") == len(last) // CHUNK

    run(tmp_path, test)


def test_a_full_pool_is_an_error_everywhere(tmp_path: Path) -> None:
    """Regions go to other nodes while they have room; then PoolFull; and freeing one makes room again."""

    async def test(nodes: Pools) -> None:
        small = [await nodes[1].run("VIRGO_MALLOC", 4 * MiB) for _ in range(12)]
        assert {node_of(identifier) for identifier in small} == {1, 2, 3}
        with pytest.raises(PoolFull):
            await nodes[2].run("VIRGO_MALLOC", 1 * MiB)
        with pytest.raises(PoolFull):
            await nodes[1].run("VIRGO_MALLOC", 6 * MiB)
        await nodes[1].run("VIRGO_FREE", small[0])
        await nodes[1].run("VIRGO_FREE", small[-1])
        with pytest.raises(PoolFull):
            await nodes[1].run("VIRGO_MALLOC", 12 * MiB)
        assert nodes.total("declared_bytes") == 40 * MiB
        large = await nodes[1].run("VIRGO_MALLOC", 8 * MiB)
        await nodes[2].run("VIRGO_SET", large, bytes(8 * MiB))
        await nodes[3].settle()

    run(tmp_path, test, capacity_bytes=16 * MiB)


def test_a_lost_node_is_named_and_its_data_is_back_with_it(tmp_path: Path) -> None:
    """A get whose chunks lie on a lost node is NodeLost; when the node is back, so is the value."""

    async def test(nodes: Pools) -> None:
        identifier = await nodes[1].run("VIRGO_MALLOC", 6 * CHUNK)
        value = pattern(1, 6 * CHUNK)
        await nodes[1].run("VIRGO_SET", identifier, value)
        await nodes[2].stop()
        with pytest.raises(NodeLost, match="n2"):
            await nodes[1].run("VIRGO_GET", identifier)
        with pytest.raises(NodeLost, match="n2"):
            await nodes[1].run("VIRGO_GET", compose_id(2, 1))
        await nodes[2].start()
        assert await nodes[3].run("VIRGO_GET", identifier) == value

    run(tmp_path, test)


def test_a_set_moves_chunks_off_a_lost_node(tmp_path: Path) -> None:
    """A new value goes to the nodes that are left; what the lost one has is swept when it is back."""

    async def test(nodes: Pools) -> None:
        identifier = await nodes[1].run("VIRGO_MALLOC", 6 * CHUNK)
        await nodes[1].run("VIRGO_SET", identifier, pattern(1, 6 * CHUNK))
        assert nodes[2].stats()["chunks"]
        await nodes[2].stop()
        await nodes[3].run("VIRGO_SET", identifier, pattern(2, 6 * CHUNK))
        assert await nodes[3].run("VIRGO_GET", identifier) == pattern(2, 6 * CHUNK)
        await nodes[1].settle()
        await nodes[2].start()
        assert nodes[2].stats()["chunks"]
        await nodes[2].module._chunks.sweep()
        assert (nodes[2].stats()["chunks"], nodes[2].stats()["declared_bytes"]) == (0, 0)
        assert nodes.total("declared_bytes") == 6 * CHUNK
        assert await nodes[2].run("VIRGO_GET", identifier) == pattern(2, 6 * CHUNK)

    run(tmp_path, test)


def test_a_node_that_fails_midway_is_replaced(tmp_path: Path) -> None:
    """A node that answers NodeLost or PoolFull to a chunk does not fail the set while others have room."""

    async def test(nodes: Pools) -> None:
        identifier = await nodes[1].run("VIRGO_MALLOC", 6 * CHUNK)
        puts = 0

        def fail(number: int, request: list[bytes]) -> None:
            nonlocal puts
            if request[0] == b"MEMORY.CHUNK.PUT" and number == 2:
                puts += 1
                if puts == 2:
                    raise PoolFull("somebody was faster")

        nodes.on_call = fail
        await nodes[1].run("VIRGO_SET", identifier, pattern(1, 6 * CHUNK))
        assert await nodes[1].run("VIRGO_GET", identifier) == pattern(1, 6 * CHUNK)
        await nodes[1].settle()
        assert (nodes.total("chunks"), nodes.total("declared_bytes")) == (6, 6 * CHUNK)
        assert nodes[2].stats()["chunks"] == 0

    run(tmp_path, test)


def test_a_set_that_dies_midway_leaves_the_old_value_and_no_rest(tmp_path: Path) -> None:
    """The home is killed between chunks and flip: the old value stays, and a sweep frees the new chunks."""

    async def test(nodes: Pools) -> None:
        identifier = await nodes[1].run("VIRGO_MALLOC", 6 * CHUNK)
        await nodes[1].run("VIRGO_SET", identifier, pattern(1, 6 * CHUNK))
        stuck = asyncio.Event()
        puts = 0

        async def hang() -> None:
            stuck.set()
            await asyncio.sleep(60)

        def on_call(number: int, request: list[bytes]) -> Coroutine[Any, Any, None] | None:
            nonlocal puts
            if request[0] != b"MEMORY.CHUNK.PUT":
                return None
            puts += 1
            return hang() if puts == 4 else None

        nodes.on_call = on_call
        writing = asyncio.create_task(nodes[1].run("VIRGO_SET", identifier, pattern(2, 6 * CHUNK)))
        await stuck.wait()
        assert await nodes[2].module._chunks.sweep() == 0, "a set that goes on must not lose its chunks"
        nodes.on_call = None
        nodes[1].spawn = lambda work, *, name: work.close()  # type: ignore[method-assign]
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        del nodes[1].spawn
        assert nodes.total("chunks") > 6
        assert await nodes[3].run("VIRGO_GET", identifier) == pattern(1, 6 * CHUNK)
        for node in nodes.nodes.values():
            await node.module._chunks.sweep()
        assert nodes.total("chunks") == 6
        assert await nodes[3].run("VIRGO_GET", identifier) == pattern(1, 6 * CHUNK)

    run(tmp_path, test)


def test_a_cancelled_set_tidies_at_once(tmp_path: Path) -> None:
    """When the client goes away in the middle of a set, the chunks written so far are freed."""

    async def test(nodes: Pools) -> None:
        identifier = await nodes[1].run("VIRGO_MALLOC", 6 * CHUNK)
        stuck = asyncio.Event()

        async def hang() -> None:
            stuck.set()
            await asyncio.sleep(60)

        nodes.on_call = lambda number, request: (
            hang() if request[0] == b"MEMORY.CHUNK.PUT" and number == 3 else None
        )
        writing = asyncio.create_task(nodes[1].run("VIRGO_SET", identifier, pattern(2, 6 * CHUNK)))
        await stuck.wait()
        nodes.on_call = None
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await nodes[1].settle()
        assert (nodes.total("chunks"), nodes.total("declared_bytes")) == (0, 6 * CHUNK)

    run(tmp_path, test)


def test_freeing_during_a_set_frees_all(tmp_path: Path) -> None:
    """Set and free at once: whatever the order, nothing is left and the id is unknown."""

    async def test(nodes: Pools) -> None:
        for _ in range(3):
            identifier = await nodes[1].run("VIRGO_MALLOC", 3 * CHUNK)
            outcomes = await asyncio.gather(
                nodes[2].run("VIRGO_SET", identifier, pattern(1, 3 * CHUNK)),
                nodes[3].run("VIRGO_FREE", identifier),
                nodes[3].run("VIRGO_SET", identifier, pattern(2, 3 * CHUNK)),
                return_exceptions=True,
            )
            assert not isinstance(outcomes[1], BaseException)
            assert all(
                not isinstance(outcome, BaseException) or isinstance(outcome, UnknownId)
                for outcome in outcomes
            )
            await nodes[1].settle()
            assert (nodes.total("chunks"), nodes.total("declared_bytes")) == (0, 0)
            with pytest.raises(UnknownId):
                await nodes[2].run("VIRGO_GET", identifier)

    run(tmp_path, test)


def test_tidying_spares_what_the_next_set_wrote(tmp_path: Path) -> None:
    """After a set failed on a node outside its plan, the next set uses that node and keeps its chunks."""

    async def test(nodes: Pools) -> None:
        identifier = await nodes[1].run("VIRGO_MALLOC", 3 * CHUNK)
        await nodes[1].run("VIRGO_SET", identifier, pattern(1, 3 * CHUNK))
        await nodes[2].stop()

        async def fail() -> None:
            raise BadArgument("a defect somewhere")

        nodes.on_call = lambda number, request: fail() if request[0] == b"MEMORY.CHUNK.PUT" else None
        failing = asyncio.create_task(nodes[1].run("VIRGO_SET", identifier, pattern(2, 3 * CHUNK)))
        await asyncio.sleep(0)
        following = asyncio.create_task(nodes[3].run("VIRGO_SET", identifier, pattern(3, 3 * CHUNK)))
        with pytest.raises(BadArgument):
            await failing
        nodes.on_call = None
        await following
        await nodes[1].settle()
        assert await nodes[3].run("VIRGO_GET", identifier) == pattern(3, 3 * CHUNK)
        assert nodes[1].stats()["chunks"] + nodes[3].stats()["chunks"] == 3
        await nodes[2].start()

    run(tmp_path, test)
