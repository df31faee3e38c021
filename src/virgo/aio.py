"""The cloud for asyncio: the operations of `virgo.connect()`, with `await`.

    cloud = await virgo.aio.connect()
    async with cloud:
        region = await cloud.memory.malloc(100)

Every name of `Cloud` is here too; what asks the node is awaited, so that its properties are methods here
(`await cloud.nodes()`). Cancelling a call cancels what it had started on the nodes.
"""

from __future__ import annotations

import asyncio
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from virgo.cloud import places
from virgo.config import CpuConfig
from virgo.errors import NodeLost, NotRunning
from virgo.limits import REQUEST_DEADLINE_S
from virgo.members import Member
from virgo.node.control import NODES
from virgo.wire.aclient import AsyncClient
from virgo.wire.call import Call

if TYPE_CHECKING:
    from virgo.cpu.aclient import AsyncCpuClient
    from virgo.files.aclient import AsyncFilesClient
    from virgo.memory.aclient import AsyncMemoryClient


class AsyncCloud:
    """A connection to the cloud through one of its nodes, for one event loop.

    Args:
        client: the pool of connections to that node.
        cpu: who runs callables, by the configuration of this program.

    Attributes:
        client: see there.
    """

    def __init__(self, client: AsyncClient, cpu: CpuConfig = CpuConfig()) -> None:  # noqa: B008 - it is frozen
        self.client = client
        self._cpu = cpu

    def __repr__(self) -> str:
        return f"<AsyncCloud at {self.client.address}>"

    async def __aenter__(self) -> AsyncCloud:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    @cached_property
    def cpu(self) -> AsyncCpuClient:
        """Processors: run functions and programs on the least loaded node."""
        from virgo.cpu.aclient import AsyncCpuClient

        return AsyncCpuClient(self.client, self._cpu)

    @cached_property
    def memory(self) -> AsyncMemoryClient:
        """Memory: regions by id, and keys to bytes."""
        from virgo.memory.aclient import AsyncMemoryClient

        return AsyncMemoryClient(self.client)

    @cached_property
    def files(self) -> AsyncFilesClient:
        """Files of every node."""
        from virgo.files.aclient import AsyncFilesClient

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
        if "cpu" in self.__dict__:
            await self.cpu.close()
        if "memory" in self.__dict__:
            await self.memory.close()
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
    search = places(target, token=token, home=home, timeout_s=timeout_s, embedded=embedded)
    while True:
        how, last, config = await asyncio.to_thread(next, search)  # it may wait for a node that starts
        client = AsyncClient(**how, timeout_s=timeout_s)
        try:
            await client.execute("WHOAMI")
        except BaseException as error:
            await client.close()
            if last or not isinstance(error, NotRunning | NodeLost):
                raise
        else:
            return AsyncCloud(client, config.cpu)
