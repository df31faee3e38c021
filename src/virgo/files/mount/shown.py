"""What is mounted: a directory for each node, below it the node's own tree, in that its exports.

Each is a tree of its own, so nothing is renamed or linked from one into another.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable
from typing import Final

from virgo.files.mount.table import Table, is_top, tree_of
from virgo.files.mount.tree import Tree
from virgo.kernel.fuse import protocol
from virgo.limits import MOUNT_VALID_S

_VALID_S, _VALID_NS = int(MOUNT_VALID_S), int(MOUNT_VALID_S % 1 * 1e9)
_INO: Final = struct.Struct("=Q")
_INO_BITS: Final = 48


class Shown:
    """See the module.

    Attributes:
        table: what the kernel knows.
        nodes: number of the tree by name of the node.
        exports: the same by name of the export, by number of the tree in which they are.
    """

    def __init__(self, table: Table, trees: Iterable[Tree]) -> None:
        self.table = table
        self._trees = {tree.number: tree for tree in trees}
        found = list(self._trees.values())
        self.nodes = {os.fsencode(tree.root.node): tree.number for tree in found if not tree.root.name}
        self.exports: dict[int, dict[bytes, int]] = {number: {} for number in self._trees}
        for tree in found:
            if tree.root.name:
                above = self.nodes[os.fsencode(tree.root.node)]
                self.exports[above][os.fsencode(tree.root.name)] = tree.number

    def __repr__(self) -> str:
        return f"<Shown: {len(self._trees)} trees of {len(self.nodes)} nodes>"

    def tree(self, node: int) -> Tree:
        """The tree that a node is of. Raises EPERM for the mounted directory, in which nothing is made."""
        tree = self._trees.get(tree_of(node))
        if tree is None:
            raise OSError(errno.EPERM if node == protocol.ROOT else errno.ESTALE, "")
        return tree

    def top(self, node: int, name: bytes) -> int | None:
        """The tree whose top has this name in that directory, if one has."""
        if node == protocol.ROOT:
            return self.nodes.get(name)
        return self.exports[tree_of(node)].get(name) if is_top(node) else None

    def free(self, node: int, name: bytes) -> Tree:
        """The tree in which a name is to be given. Raises EEXIST if the top of a tree has it."""
        if self.top(node, name) is not None:
            raise OSError(errno.EEXIST, "")
        return self.tree(node)

    def taken(self, node: int, name: bytes) -> Tree:
        """The tree in which a name is to be taken away. Raises EBUSY if the top of a tree has it."""
        if self.top(node, name) is not None:
            raise OSError(errno.EBUSY, "")
        return self.tree(node)


def entry_out(node: int, attributes: bytes) -> bytes:
    """ENTRY_OUT of a node, with its attributes."""
    head = protocol.ENTRY_OUT.pack(node, 0, _VALID_S, _VALID_S, _VALID_NS, _VALID_NS)
    return head + numbered(node, attributes)


def attributes_out(node: int, attributes: bytes) -> bytes:
    """ATTR_OUT of a node, with its attributes."""
    return protocol.ATTR_OUT.pack(_VALID_S, _VALID_NS, 0) + numbered(node, attributes)


NOTHING: Final = protocol.ENTRY_OUT.pack(0, 0, _VALID_S, 0, _VALID_NS, 0) + bytes(protocol.ATTRIBUTES.size)


def numbered(node: int, attributes: bytes) -> bytes:
    """The attributes with a number that no file of another tree has."""
    return _INO.pack(salted(node, _INO.unpack_from(attributes)[0])) + attributes[_INO.size :]


def salted(node: int, number: int) -> int:
    """An inode's number as the mount shows it."""
    return (number & ((1 << _INO_BITS) - 1)) | tree_of(node) << _INO_BITS
