"""Durable keys: on disk before the answer, and back after a loss of power."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from memory.kept import BOTH, ON_DISK, filled, looking, lose_power, seen
from memory.pools import in_loop
from virgo.errors import (
    DiskFull,
    NotRunning,
)
from virgo.memory import keyspace
from virgo.memory.batch import Batch
from virgo.memory.durable import Disk


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
