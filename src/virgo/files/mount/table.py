"""What the kernel knows of a mount, for all processes that answer it: nodes, their names, open files.

A node is the kernel's number of a file. Its top 16 bits say of which tree it is (the private directory of a
machine's node, an export), the rest is a serial that is never given again. The kernel counts how often it
was told of a node, and says when it forgets; until then the node is kept here, with every name under which
it was met.

The table is an LMDB environment in memory: a process that is killed in the middle of a change leaves it
whole, and reads wait for nobody. It lives as long as the mount.

    node      node            -> how often the kernel was told, identity
    identity  tree, identity  -> node
    name      node            -> parent and name, each that is known
    child     parent and name -> node
    open      node            -> `OpenFile`
    seen      node            -> version of the content that the kernel may have
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import lmdb

from virgo.limits import MOUNT_TABLE_BYTES_MAX, PATH_BYTES_MAX

Key = bytes  # a node as the table has it: eight bytes, most significant first
_NODE: Final = struct.Struct(">Q")
_KNOWN: Final = struct.Struct("=q")
_OPEN: Final = struct.Struct("=Iiqqqq")
_TREE_SHIFT: Final = 48
_SERIAL: Final = b"serial"
_FIRST_SERIAL: Final = 16  # below stand the directories at the top of a tree
_READERS_MAX: Final = 512
TOP_OF_TREE: Final = 1
PATH_DEPTH_MAX: Final = PATH_BYTES_MAX // 2


def top(tree: int) -> int:
    """The node of a tree's top directory; of tree 0 it is the mounted directory itself."""
    return tree << _TREE_SHIFT | TOP_OF_TREE


def tree_of(node: int) -> int:
    """The tree that a node is of."""
    return node >> _TREE_SHIFT


def is_top(node: int) -> bool:
    """Whether it is a tree's top directory."""
    return node & ((1 << _TREE_SHIFT) - 1) == TOP_OF_TREE


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file that programs have open.

    Attributes:
        count: how often.
        backing: the number under which it is passed through, 0 if it is not.
        reader, writer: what is open for reading, and for writing: process and descriptor on this machine,
            0 and the cloud's descriptor elsewhere; (0, 0) for none.
    """

    count: int
    backing: int = 0
    reader: tuple[int, int] = (0, 0)
    writer: tuple[int, int] = (0, 0)


class Table:
    """The table, as one process sees it. Open it after forking."""

    def __init__(self, directory: Path) -> None:
        self._environment = lmdb.open(
            str(directory), map_size=MOUNT_TABLE_BYTES_MAX, max_dbs=8, max_readers=_READERS_MAX,
            sync=False, metasync=False, writemap=True, meminit=False,
        )  # fmt: skip
        opened = self._environment.open_db
        self._node, self._identity = opened(b"node"), opened(b"identity")
        self._name, self._child = opened(b"name", dupsort=True), opened(b"child")
        self._open, self._serial = opened(b"open"), opened(b"serial")
        self._seen = opened(b"seen")

    def __repr__(self) -> str:
        return f"<Table {self.stats()}>"

    def close(self) -> None:
        """Let go of it."""
        self._environment.close()

    def stats(self) -> dict[str, int]:
        """How many nodes the kernel knows, and how many files are open."""
        with self._environment.begin() as txn:
            return {"known": txn.stat(self._node)["entries"], "open": txn.stat(self._open)["entries"]}

    # --- what the kernel is told --------------------------------------------------------------

    def learn(self, parent: int, name: bytes, identity: bytes) -> int:
        """The node of what was met under a name; the kernel is told of it once more."""
        with self._environment.begin(write=True) as txn:
            return self._learn(txn, parent, name, identity)

    def learn_all(self, parent: int, met: Iterable[tuple[bytes, bytes]]) -> list[int]:
        """The same for many names and identities of one directory."""
        with self._environment.begin(write=True) as txn:
            return [self._learn(txn, parent, name, identity) for name, identity in met]

    def _learn(self, txn: Any, parent: int, name: bytes, identity: bytes) -> int:
        tree = tree_of(parent)
        whose = struct.pack(">H", tree) + identity
        key = txn.get(whose, db=self._identity)
        if key is None:
            serial = _NODE.unpack(txn.get(_SERIAL, _NODE.pack(_FIRST_SERIAL), db=self._serial))[0]
            txn.put(_SERIAL, _NODE.pack(serial + 1), db=self._serial)
            key = _NODE.pack(tree << _TREE_SHIFT | serial)
            txn.put(whose, key, db=self._identity)
            told = 0
        else:
            told = _KNOWN.unpack_from(txn.get(key, db=self._node))[0]
        txn.put(key, _KNOWN.pack(told + 1) + identity, db=self._node)
        self._bind(txn, _NODE.pack(parent) + name, key)
        return int(_NODE.unpack(key)[0])

    def forget(self, forgotten: Iterable[tuple[int, int]]) -> None:
        """The kernel takes back that it was told of these nodes so many times."""
        with self._environment.begin(write=True) as txn:
            for node, count in forgotten:
                key = _NODE.pack(node)
                known = txn.get(key, db=self._node)
                if known is None:
                    continue
                told = _KNOWN.unpack_from(known)[0] - count
                if told > 0:
                    txn.put(key, _KNOWN.pack(told) + known[_KNOWN.size :], db=self._node)
                else:
                    self._drop(txn, key, known[_KNOWN.size :])

    def _drop(self, txn: Any, key: Key, identity: bytes) -> None:
        node = _NODE.unpack(key)[0]
        whose = struct.pack(">H", tree_of(node)) + identity
        if txn.get(whose, db=self._identity) == key:
            txn.delete(whose, db=self._identity)
        for place in self._places(txn, key):
            txn.delete(place, db=self._child)
        txn.delete(key, db=self._name)
        txn.delete(key, db=self._node)
        txn.delete(key, db=self._open)
        txn.delete(key, db=self._seen)

    # --- names --------------------------------------------------------------------------------

    def identity(self, node: int) -> bytes:
        """What the node was when it was met. Raises KeyError if the kernel should not know it any more."""
        with self._environment.begin() as txn:
            found = txn.get(_NODE.pack(node), db=self._node)
        if found is None:
            raise KeyError(node)
        return bytes(found[_KNOWN.size :])

    def names(self, node: int) -> list[tuple[int, bytes]]:
        """Parents and names under which the node is known."""
        with self._environment.begin() as txn:
            places = self._places(txn, _NODE.pack(node))
        return [(_NODE.unpack_from(place)[0], bytes(place[8:])) for place in places]

    def paths(self, node: int) -> list[bytes]:
        """Paths below the top of its tree under which the node is known; empty if it has no name any more."""
        if is_top(node):
            return [b""]
        with self._environment.begin() as txn:
            return self._paths(txn, _NODE.pack(node), PATH_DEPTH_MAX)

    def _paths(self, txn: Any, key: Key, depth: int) -> list[bytes]:
        found = []
        for place in self._places(txn, key):
            if is_top(_NODE.unpack_from(place)[0]):
                found.append(bytes(place[8:]))
            elif depth:
                found += [path + b"/" + place[8:] for path in self._paths(txn, place[:8], depth - 1)]
        return found

    def child(self, parent: int, name: bytes) -> int | None:
        """The node that was last met under a name."""
        with self._environment.begin() as txn:
            key = txn.get(_NODE.pack(parent) + name, db=self._child)
        return None if key is None else int(_NODE.unpack(key)[0])

    def unbind(self, parent: int, name: bytes) -> None:
        """The name stands for nothing any more."""
        with self._environment.begin(write=True) as txn:
            self._unbind(txn, _NODE.pack(parent) + name)

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, swap: bool) -> None:
        """What had the first name has the second; `swap`: and the other way round."""
        place, new_place = _NODE.pack(parent) + name, _NODE.pack(new_parent) + new_name
        with self._environment.begin(write=True) as txn:
            key, other = self._unbind(txn, place), self._unbind(txn, new_place)
            if key is not None:
                self._bind(txn, new_place, key)
            if swap and other is not None:
                self._bind(txn, place, other)

    def _places(self, txn: Any, key: Key) -> list[bytes]:
        with txn.cursor(db=self._name) as cursor:
            return list(cursor.iternext_dup()) if cursor.set_key(key) else []

    def _bind(self, txn: Any, place: bytes, key: Key) -> None:
        before = txn.get(place, db=self._child)
        if before == key:
            return
        if before is not None:
            txn.delete(before, place, db=self._name)
        txn.put(place, key, db=self._child)
        txn.put(key, place, db=self._name)

    def _unbind(self, txn: Any, place: bytes) -> Key | None:
        key: Key | None = txn.pop(place, db=self._child)
        if key is not None:
            txn.delete(key, place, db=self._name)
        return key

    # --- open files ---------------------------------------------------------------------------

    def changing(self) -> Any:
        """A transaction, alone, for `opened` and `set_open`: with block."""
        return self._environment.begin(write=True)

    def opened(self, node: int, txn: Any = None) -> OpenFile | None:
        """The node as an open file; None if nobody has it open."""
        if txn is None:
            with self._environment.begin() as reading:
                return self.opened(node, reading)
        found = txn.get(_NODE.pack(node), db=self._open)
        if found is None:
            return None
        count, backing, *rest = _OPEN.unpack(found)
        return OpenFile(count, backing, (rest[0], rest[1]), (rest[2], rest[3]))

    def set_open(self, node: int, file: OpenFile | None, txn: Any) -> None:
        """Replace it; None if nobody has it open any more."""
        if file is None:
            txn.delete(_NODE.pack(node), db=self._open)
        else:
            data = _OPEN.pack(file.count, file.backing, *file.reader, *file.writer)
            txn.put(_NODE.pack(node), data, db=self._open)

    def release(self, node: int, txn: Any) -> OpenFile | None:
        """It is open once less; what it was if nobody has it open any more."""
        file = self.opened(node, txn)
        if file is None:
            return None
        last = file.count == 1
        self.set_open(node, None if last else replace(file, count=file.count - 1), txn)
        return file if last else None

    def see(self, node: int, version: bytes, txn: Any) -> bool:
        """The kernel reads this version from now on; whether it did before."""
        key = _NODE.pack(node)
        known: bool = txn.get(key, db=self._seen) == version
        if not known:
            txn.put(key, version, db=self._seen)
        return known
