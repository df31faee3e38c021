"""The cloud for asyncio: the operations of `virgo.connect()`, with `await`.

    cloud = await virgo.aio.connect()
    async with cloud:
        region = await cloud.memory.malloc(100)

Cancelling a call cancels what it had started on the nodes.
"""

from __future__ import annotations

import asyncio
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from virgo import cloud as blocking
from virgo import config as configuration
from virgo.errors import NotRunning
from virgo.limits import REQUEST_DEADLINE_S
from virgo.members import Member
from virgo.node.control import NODES
from virgo.wire.aclient import AsyncClient
from virgo.wire.call import Call

if TYPE_CHECKING:
    from virgo.cpu.client import AsyncCpuClient
    from virgo.files.client import AsyncFilesClient
    from virgo.memory.client import AsyncMemoryClient


class AsyncCloud:
    """A connection to the cloud through one of its nodes, for one event loop."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client

    def __repr__(self) -> str:
        return f"<AsyncCloud at {self.client.address}>"

    async def __aenter__(self) -> AsyncCloud:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    @cached_property
    def cpu(self) -> AsyncCpuClient:
        """Processors: run functions and programs on the least loaded node."""
        from virgo.cpu.client import AsyncCpuClient

        return AsyncCpuClient(self.client)

    @cached_property
    def memory(self) -> AsyncMemoryClient:
        """Memory: regions by id, and keys to bytes."""
        from virgo.memory.client import AsyncMemoryClient

        return AsyncMemoryClient(self.client)

    @cached_property
    def files(self) -> AsyncFilesClient:
        """Files of every node."""
        from virgo.files.client import AsyncFilesClient

        return AsyncFilesClient(self.client)

    async def nodes(self) -> list[Member]:
        """The nodes that are up now, by name."""
        return await self.client.run(NODES)

    async def modules(self) -> list[dict[str, Any]]:
        """Modules of the connected node, in load order."""
        return await self.client.run(Call(("MODULES",), msgspec.json.decode))

    async def stats(self) -> dict[str, Any]:
        """The connected node: its member record, engine, modules and their figures."""
        return await self.client.run(Call(("STATUS",), msgspec.json.decode))

    async def close(self) -> None:
        """Let go of everything that this connection holds."""
        await self.client.close()


async def connect(
    target: str | None = None,
    *,
    token: str | None = None,
    home: str | Path | None = None,
    timeout_s: float = REQUEST_DEADLINE_S,
    embedded: bool = True,
) -> AsyncCloud:
    """The cloud, through a node; as `virgo.connect`."""
    environment = dict(os.environ) if home is None else {**os.environ, "VIRGO_HOME": str(home)}
    config = configuration.load(environment)
    target = target or environment.get("VIRGO_URL")
    if not target:
        await asyncio.to_thread(blocking.let_settle, config.home)
    for place in [target] if target else blocking.candidates(config):
        client = AsyncClient(**blocking.reach(config, place, token), timeout_s=timeout_s)
        try:
            await client.execute("WHOAMI")
        except NotRunning:
            await client.close()
            if target:
                raise
            continue
        return AsyncCloud(client)
    if not embedded:
        raise NotRunning(f"no node answers under {config.home}")
    place = await asyncio.to_thread(blocking.start_embedded, config.home)
    return AsyncCloud(AsyncClient(**blocking.reach(config, place, token), timeout_s=timeout_s))
