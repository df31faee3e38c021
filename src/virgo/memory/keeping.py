"""Keys that are kept more safely than others: what a mark at their front asks for.

    {*2}name    on two nodes
    {*d}name    on disk, before the answer
    {*2d}name   on the disks of two nodes

The mark is part of the key, so every client in every language says and sees how a key is kept, and nothing
has to be looked up to find it. Any other braces are a tag, as in `keyspace.slot_of`.

Decisions about which node has the second copy, without I/O. A slot of keys that are kept twice has an owner,
which answers, and a mirror, which has each change before it is acknowledged. The mirror takes over when the
owner is lost, and the owner looks for another mirror when that is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from virgo.errors import BadArgument

OPENING = b"{*"
REGION = b"\0region:"  # what the keys of kept regions go on with; see `kept`


class Keep(NamedTuple):
    """How a key is kept.

    Attributes:
        copies: 1, or 2 for a second one on another node.
        durable: whether each change is on disk before it is acknowledged.
    """

    copies: int = 1
    durable: bool = False

    @property
    def mark(self) -> bytes:
        """What such keys begin with."""
        asked = (b"2" if self.copies == 2 else b"") + (b"d" if self.durable else b"")
        return OPENING + asked + b"}" if asked else b""


PLAIN = Keep()
_BY_MARK = {keep.mark: keep for keep in (Keep(2), Keep(1, True), Keep(2, True))}


def keep_of(key: bytes) -> Keep:
    """How a key is kept."""
    if not key.startswith(OPENING):
        return PLAIN
    return _BY_MARK.get(key[: key.find(b"}") + 1], PLAIN)


def is_region(key: bytes) -> bool:
    """Whether a key is that of a region, which is no key for those who list or forget keys."""
    return key.startswith(OPENING) and key.startswith(REGION, key.find(b"}") + 1)


def marks() -> list[bytes]:
    """All that say how a key is kept."""
    return list(_BY_MARK)


def checked(copies: int, durable: bool) -> Keep:
    """What a caller asks for. Raises BadArgument."""
    if type(copies) is not int or copies not in (1, 2):
        raise BadArgument(
            f"copies is {copies!r:.20}, but must be 1 or 2", hint="2 outlasts the loss of a node."
        )
    if not isinstance(durable, bool):
        raise BadArgument(
            f"durable is {durable!r:.20}, but must be True or False", hint="True outlasts a power loss."
        )
    return Keep(copies, durable)


# --- owners and mirrors -----------------------------------------------------------------------


class Pair(NamedTuple):
    """Who has a slot: numbers of nodes, 0 for none."""

    owner: int
    mirror: int


def choose_mirror(owner: int, rooms: Mapping[int, int], draw: Callable[[int], int]) -> int:
    """The better of two random nodes beside the owner, 0 if there is none.

    Args:
        owner: of the slot.
        rooms: free bytes of the nodes that may be chosen.
        draw: gives a random number from 0 to below its argument.
    """
    others = sorted(number for number, room in rooms.items() if number != owner and room > 0)
    if not others:
        return 0
    first, second = others[draw(len(others))], others[draw(len(others))]
    return max(first, second, key=lambda number: rooms[number])


def succeed(
    pairs: Sequence[Pair], local: int, lost: Collection[int], unable: Collection[int]
) -> dict[int, Pair]:
    """What this node changes of who has which slot, by index: it takes over, or lets a mirror go.

    Args:
        pairs: who has each slot.
        local: this node.
        lost: nodes that are known to be lost.
        unable: nodes that cannot take copies, since their pool or disk is full.
    """
    changed = {}
    for index, (owner, mirror) in enumerate(pairs):
        if (mirror == local and owner in lost) or (
            owner == local and mirror and (mirror in lost or mirror in unable)
        ):
            changed[index] = Pair(local, 0)
    return changed
