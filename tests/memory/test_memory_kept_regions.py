"""Regions that are durable or on two nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from memory.kept import copies, kill, look, looking, lose_power
from memory.pools import in_loop
from virgo.errors import (
    BadArgument,
    PoolFull,
    TooLarge,
    UnknownId,
)
from virgo.members import compose_id
from virgo.memory import kept
from virgo.memory.keeping import Keep


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
