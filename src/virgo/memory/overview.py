"""The whole pool in one answer: every node's figures, and every namespace over all nodes.

A node that does not answer has its place with the reason, and no figures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from virgo import parallel
from virgo.errors import VirgoError
from virgo.limits import CONNECT_S
from virgo.memory.figures import NodePool, Pool, SpaceInfo
from virgo.memory.namespaces import Namespaces
from virgo.module import NodeServices
from virgo.wire.commands import Command
from virgo.wire.session import Session


class Overview:
    """The command, served by any node."""

    def __init__(
        self, node: NodeServices, stats: Callable[[], dict[str, Any]], namespaces: Namespaces
    ) -> None:
        self._node = node
        self._stats = stats
        self._namespaces = namespaces

    def __repr__(self) -> str:
        return f"<Overview of node {self._node.name}>"

    def commands(self) -> list[Command]:
        """What is served."""
        return [Command("MEMORY.POOL", self._serve, "read", summary="Figures of all nodes' pools, as JSON.")]

    async def _serve(self, _session: Session, _request: list[bytes]) -> bytes:
        """MEMORY.POOL."""
        known = sorted(self._node.known(), key=lambda member: member.name)
        parts = await parallel.settle(self._part(member.number) for member in known)
        nodes: list[NodePool] = []
        spaces: dict[str, SpaceInfo] = {}
        for member, part in zip(known, parts, strict=True):
            if isinstance(part, VirgoError):
                nodes.append(NodePool(member.name, error=part.message))
            elif isinstance(part, Exception):
                raise part
            else:
                figures, found = part
                nodes.append(NodePool(member.name, figures))
                for space in found:
                    spaces[space.name] = _sum(spaces.get(space.name), space)
        return msgspec.json.encode(Pool(nodes, [spaces[name] for name in sorted(spaces)]))

    async def _part(self, number: int) -> tuple[dict[str, Any], list[SpaceInfo]]:
        if number == self._node.number:
            return self._stats(), await self._namespaces.measure()
        figures = await self._node.call(number, b"MEMORY.STATS", timeout_s=CONNECT_S)
        spaces = await self._node.call(number, b"MEMORY.NAMESPACES", timeout_s=None)
        return msgspec.json.decode(figures), msgspec.json.decode(spaces, type=list[SpaceInfo])


def _sum(one: SpaceInfo | None, other: SpaceInfo) -> SpaceInfo:
    """Both nodes' parts of a namespace."""
    if one is None:
        return other
    return msgspec.structs.replace(
        other,
        generation=max(one.generation, other.generation),
        keys=(one.keys or 0) + (other.keys or 0),
        key_bytes=(one.key_bytes or 0) + (other.key_bytes or 0),
    )
