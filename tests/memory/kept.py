"""What tests of kept keys share: pools that are looked after on request, lost nodes, lost power."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from memory.pools import PoolNode, Pools, pools

TWICE, ON_DISK, BOTH = "{*2}", "{*d}", "{*2d}"


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


async def lose_power(node: PoolNode) -> None:
    """Stop it, and have its files as after a reboot that nobody prepared."""
    await node.stop()
    life = node.module_life()
    life.change(boot="another boot", clean=False)
