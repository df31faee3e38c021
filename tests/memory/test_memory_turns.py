"""Shared regions that somebody keeps: what their node does meanwhile, and how much it answers at once."""

from __future__ import annotations

import asyncio
import fcntl
import time
from pathlib import Path
from typing import Any

import pytest

from memory.pools import in_loop, pools
from virgo.errors import Busy, TooLarge
from virgo.memory import segments, shared
from virgo.memory.descriptors import shut


async def timed(work: Any) -> float:
    began = time.monotonic()
    await work
    return time.monotonic() - began


@in_loop
async def test_a_stopped_writer_keeps_nobody_from_other_regions(tmp_path: Path) -> None:
    """Sixty wait for a region that is kept, and are Busy after 3 s; others are served at once."""
    async with pools(tmp_path, 1) as nodes:
        kept, other = [await nodes[1].run("VIRGO_MALLOC", 50_000, "SHARED") for _ in range(2)]
        await nodes[1].run("VIRGO_SET", other, b"other")
        segment = nodes[1].module.shared._segment(kept, 50_000)
        stopped = segment.open(write=True)
        assert segments._lock(stopped, segments._CONTENT, fcntl.F_WRLCK)
        began = time.monotonic()
        waiting = [asyncio.ensure_future(nodes[1].run("VIRGO_GET", kept)) for _ in range(60)]
        await asyncio.sleep(0.2)
        assert await timed(nodes[1].run("VIRGO_GET", other)) < 1
        assert await timed(nodes[1].run("VIRGO_SET", other, b"new")) < 1
        assert await timed(asyncio.to_thread(time.monotonic)) < 1
        waiting[0].cancel()  # its thread waits on, and is the only one
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(each, Busy) for each in found[1:])
        assert time.monotonic() - began < 5
        after = asyncio.ensure_future(nodes[1].run("VIRGO_SET", kept, b"x"))
        await asyncio.sleep(0.2)
        shut(stopped)
        await after
        assert await nodes[1].run("VIRGO_GET", kept) == b"x"


@in_loop
async def test_an_answer_is_as_long_as_the_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the region was declared; only a value that is too long is refused, and read in parts."""
    monkeypatch.setattr(shared, "MEMORY_REPLY_BYTES_MAX", 1000)
    async with pools(tmp_path, 1) as nodes:
        identifier = await nodes[1].run("VIRGO_MALLOC", 5000, "SHARED")
        assert await nodes[1].run("VIRGO_GET", identifier) == b""
        await nodes[1].run("VIRGO_SET", identifier, b"x" * 1000)
        for part in ((), ("AT", 0), ("AT", 0, 5000)):
            assert await nodes[1].run("VIRGO_GET", identifier, *part) == b"x" * 1000
        await nodes[1].run("VIRGO_SET", identifier, b"x", "AT", 1000)
        with pytest.raises(TooLarge) as caught:
            await nodes[1].run("VIRGO_GET", identifier)
        assert caught.value.hint
        assert len(await nodes[1].run("VIRGO_GET", identifier, "AT", 1)) == 1000
