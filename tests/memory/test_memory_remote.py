"""Values of other nodes that are read often: sent once, and never shown when they have changed."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from memory.pools import Pools, in_loop, pools
from virgo.errors import NodeLost
from virgo.limits import MEMORY_REMOTE_VALUE_BYTES_MIN, MiB
from virgo.memory.remote import Known, RemoteValues

LARGE = MEMORY_REMOTE_VALUE_BYTES_MIN


class Sent:
    """Counts the bytes that nodes send to each other in answer to reads."""

    def __init__(self, pool: Pools) -> None:
        self.requests: list[bytes] = []
        pool.on_call = self._note

    def _note(self, _number: int, request: list[bytes]) -> None:
        self.requests.append(request[0])


@in_loop
async def test_a_value_that_is_read_often_is_sent_twice(tmp_path: Path) -> None:
    """The second time with its version; from then on only that is asked for, as long as it stays."""
    async with pools(tmp_path) as pool:
        value = os.urandom(LARGE)
        await pool[1].run("SET", "k", value)
        sent = Sent(pool)
        for _ in range(5):
            assert await pool[2].run("GET", "k") == value
        assert sent.requests == [b"GET", *[b"MEMORY.KEY.CHANGED"] * 4]
        assert pool[2].stats()["remote_hits"] == 3
        assert pool[2].stats()["remote_bytes"] == LARGE
        assert pool[1].stats()["hits"] == 5, "its node knows that it is used"


@in_loop
async def test_what_changes_is_seen_at_once(tmp_path: Path) -> None:
    """Whoever changes it, and however: no read shows a value of before."""
    async with pools(tmp_path) as pool:
        await pool[1].run("SET", "k", b"0" * LARGE)
        for _ in range(3):
            await pool[2].run("GET", "k")
        for number, change in enumerate(
            (
                ("SET", "k", b"1" * LARGE),
                ("APPEND", "k", b"2"),
                ("SETRANGE", "k", 0, b"3"),
                ("EXPIRE", "k", 100),
                ("DEL", "k"),
                ("SET", "k", b"4" * LARGE),
                ("FLUSHDB",),
                ("SET", "k", b"small"),
                ("SET", "k", b"5" * LARGE),
            )
        ):
            await pool[1 + number % 3].run(*change)
            for _ in range(3):
                assert await pool[2].run("GET", "k") == await pool[1].run("GET", "k")
        pool[1].up = False
        with pytest.raises(NodeLost):
            await pool[2].run("GET", "k")


@in_loop
async def test_reads_beside_writes(tmp_path: Path) -> None:
    """A reader of another node sees numbers that never go back."""
    async with pools(tmp_path) as pool:
        await pool[1].run("SET", "k", b"%020d" % 0 + bytes(LARGE))
        over = False

        async def write() -> None:
            number = 0
            while not over:
                number += 1
                await pool[1].run("SET", "k", b"%020d" % number + bytes(LARGE))
                await asyncio.sleep(0)

        writer = asyncio.create_task(write())
        last = 0
        for _ in range(300):
            number = int((await pool[2].run("GET", "k"))[:20])
            assert number >= last
            last = number
        over = True
        await writer
        assert last > 10


@in_loop
async def test_small_values_are_not_kept(tmp_path: Path) -> None:
    """To ask for a version costs as much as the value."""
    async with pools(tmp_path) as pool:
        await pool[1].run("SET", "k", bytes(LARGE - 1))
        sent = Sent(pool)
        for _ in range(4):
            await pool[2].run("GET", "k")
        assert sent.requests == [b"GET"] * 4


def test_what_is_kept_is_bounded() -> None:
    """By bytes and by count; what was used longest ago goes first; a value that is too large is not kept."""
    kept = RemoteValues(16 * MiB)
    draw = random.Random(1)
    for number in range(200):
        key = b"%d" % draw.randrange(300)
        kept.keep(key, Known(1, number, bytes(LARGE)))
        assert kept.held_bytes <= MiB
        kept.hit(key)
    assert kept.held_bytes == len(kept._known) * LARGE == MiB
    oldest = next(iter(kept._known))
    kept.hit(oldest)
    kept.keep(b"another", Known(1, 1, bytes(LARGE)))
    assert kept.get(oldest, 1) is not None
    assert kept.get(oldest, 2) is None, "another node's is another value"
    kept.keep(b"large", Known(1, 1, bytes(2 * MiB)))
    assert kept.get(b"large", 1) is None
    for number in range(20_000):
        kept.sight(b"s%d" % number, bytes(LARGE))
    assert len(kept._sighted) == 10_000
