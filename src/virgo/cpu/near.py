"""Where the data of a call are, so that it can run there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Protocol, runtime_checkable

from virgo.errors import BadArgument

_DATA: Final = frozenset({type(None), bool, int, float, str, bytes, list, tuple, dict})


@runtime_checkable
class Placed(Protocol):
    """Something that lies on one node, such as a region: calls that get it run there if they can."""

    def __virgo_node__(self) -> int:
        """The number of that node, 0 if it lies nowhere."""


def place_of(near: str | Placed) -> str | int:
    """The name or number of the node that is meant. Raises BadArgument."""
    if isinstance(near, str):
        return near
    if isinstance(near, Placed):
        return near.__virgo_node__()
    raise BadArgument(
        f"near is a {type(near).__name__}, which lies on no node",
        hint="Give a node's name, a region or a shared array.",
    )


def near_arguments(args: Iterable[Any]) -> int:
    """The node of the first argument that lies on one, 0 if none does."""
    for arg in args:
        kind = type(arg)
        if kind not in _DATA and hasattr(kind, "__virgo_node__"):
            number: int = arg.__virgo_node__()
            return number
    return 0
