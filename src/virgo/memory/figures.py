"""What people and programs are shown of the pool: values without behaviour."""

from __future__ import annotations

from typing import Any

import msgspec


class SpaceInfo(msgspec.Struct, frozen=True):
    """A namespace, and what one node holds of it.

    Attributes:
        generation: how often it was dropped, and one more.
        cache: whether its keys may be evicted.
        keys: of this node; None where they were not counted.
        key_bytes: of these keys and their values.
    """

    name: str
    generation: int
    cache: bool
    keys: int | None = None
    key_bytes: int | None = None


class NodePool(msgspec.Struct, frozen=True):
    """One node's part of the pool.

    Attributes:
        figures: those of `MEMORY.STATS`; empty if the node did not answer.
        error: why it did not, or "".
    """

    name: str
    figures: dict[str, Any] = {}
    error: str = ""


class Pool(msgspec.Struct, frozen=True):
    """The pool: its nodes by name, and its namespaces with their keys on all nodes that answered."""

    nodes: list[NodePool]
    namespaces: list[SpaceInfo]
