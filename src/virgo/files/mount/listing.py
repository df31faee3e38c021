"""READDIR and READDIRPLUS: what a directory holds, as much of it as the kernel has room for.

At the top of the mount stand the nodes; at the top of a node its exports come before its own entries, and
hide what has their names.
"""

from __future__ import annotations

import stat
from typing import Final

from virgo.files.mount.shown import Shown, entry_out, salted
from virgo.files.mount.table import is_top, top
from virgo.files.mount.tree import Entry, Tree
from virgo.kernel.fuse import protocol
from virgo.kernel.fuse.protocol import Operation
from virgo.kernel.fuse.serving import Handler, Request

_PLUS_BYTES: Final = protocol.ENTRY_OUT.size + protocol.ATTRIBUTES.size
_DOTS: Final = (b".", b"..")
_DIRECTORY: Final = stat.S_IFDIR >> 12


class Listing:
    """See the module.

    Args:
        shown: what is mounted.
    """

    def __init__(self, shown: Shown) -> None:
        self._shown = shown

    def __repr__(self) -> str:
        return f"<Listing of {self._shown!r}>"

    def handlers(self) -> dict[int, Handler]:
        """By operation."""
        return {
            Operation.OPENDIR: lambda _request: protocol.OPEN_OUT.pack(0, 0, 0),
            Operation.READDIR: lambda request: self._read(request, plus=False),
            Operation.READDIRPLUS: lambda request: self._read(request, plus=True),
            Operation.RELEASEDIR: lambda _request: b"",
            Operation.FSYNCDIR: self._sync,
        }

    def _read(self, request: Request, *, plus: bool) -> bytes:
        _, offset, size, *_ = protocol.READ_IN.unpack_from(request.body)
        if request.node == protocol.ROOT:
            return self._tops(offset, size, plus=plus)
        tree = self._shown.tree(request.node)
        exports = self._shown.exports[tree.number] if is_top(request.node) else {}
        return self._own(tree, request, offset, size, exports, plus=plus)

    def _own(
        self, tree: Tree, request: Request, offset: int, size: int, exports: dict[bytes, int], *, plus: bool
    ) -> bytes:
        """Entries of a real directory, as many as fit; empty at its end.

        Any number may be the offset of a real entry, so exports have none of their own: all of them come with
        the first entries, and whoever goes on from there goes on behind "." of the directory itself.
        """
        chosen: list[Entry] = []
        if exports and not offset:
            dot = tree.entries(request.node, 0, 0, plus=False)[0]
            shown = [Entry(name, top(number), _DIRECTORY, dot.behind) for name, number in exports.items()]
            chosen, offset = [dot, *shown], dot.behind
        used = sum(_length(entry.name, plus=plus) for entry in chosen)
        while True:
            read = tree.entries(request.node, offset, size // 4 if plus else size, plus=plus)
            for entry in read:
                offset = entry.behind
                if entry.name in exports:  # hidden by one
                    continue
                used += _length(entry.name, plus=plus)
                if used > size:
                    return self._packed(request, chosen, plus=plus)
                chosen.append(entry)
            if chosen or not read:
                return self._packed(request, chosen, plus=plus)

    def _packed(self, request: Request, entries: list[Entry], *, plus: bool) -> bytes:
        if plus:
            return self._with_attributes(request, entries)
        return b"".join([_dirent(request.node, entry) for entry in entries])

    def _with_attributes(self, request: Request, entries: list[Entry]) -> bytes:
        table = self._shown.table
        met = [entry for entry in entries if entry.found is not None and entry.name not in _DOTS]
        told = [(entry.name, entry.found.identity) for entry in met if entry.found is not None]
        nodes = dict(zip([entry.name for entry in met], table.learn_all(request.node, told), strict=True))
        request.undo = lambda: table.forget([(node, 1) for node in nodes.values()])
        parts = []
        for entry in entries:
            node = nodes.get(entry.name)
            parts.append(
                entry_out(node, entry.found.attributes) if node and entry.found else bytes(_PLUS_BYTES)
            )
            parts.append(_dirent(request.node, entry))
        return b"".join(parts)

    def _tops(self, offset: int, size: int, *, plus: bool) -> bytes:
        """The nodes, by name; `plus` says nothing of them, so they are looked up."""
        tops = dict.fromkeys(_DOTS, 0) | self._shown.nodes
        listed = b""
        for index, (name, tree) in enumerate(sorted(tops.items())[offset:], offset + 1):
            node = top(tree) if tree else protocol.ROOT
            part = bytes(_PLUS_BYTES) if plus else b""
            part += protocol.DIRENT.pack(node, index, len(name), _DIRECTORY) + name + _padding(name)
            if len(listed) + len(part) > size:
                break
            listed += part
        return listed

    def _sync(self, request: Request) -> bytes:
        if request.node != protocol.ROOT:
            self._shown.tree(request.node).sync_directory(request.node)
        return b""


def _length(name: bytes, *, plus: bool) -> int:
    """Bytes of an entry in the answer."""
    return protocol.DIRENT.size + (len(name) + 7 & ~7) + (_PLUS_BYTES if plus else 0)


def _dirent(node: int, entry: Entry) -> bytes:
    head = protocol.DIRENT.pack(salted(node, entry.number), entry.behind, len(entry.name), entry.kind)
    return head + entry.name + _padding(entry.name)


def _padding(name: bytes) -> bytes:
    return bytes(-len(name) % 8)
