"""The pool below a mount: `/pool/...`, whose files lie on the nodes that the cloud placed them on.

What a name stands for is asked of a node of this machine, which knows the placement; what is done with a
file is an act on the node that has it. A directory is that of all nodes that have it, so it has no owner
and no times of its own. Renaming a directory is refused with EXDEV, upon which `mv` copies. There are
regular files and directories, no links and no devices: nobody could say where they lie.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

import msgspec

from virgo.errors import FileRefused, FileThere, NodeLost, NotRunning
from virgo.files import core, posix
from virgo.files.mount.far import Far, FarNode
from virgo.files.mount.remote import FOUND, RemoteTree
from virgo.files.mount.remoteopens import Handle, RemoteOpens
from virgo.files.mount.table import Table, is_top
from virgo.files.mount.tree import Entry
from virgo.files.posix import Found, Owner, Settings
from virgo.files.roots import Root
from virgo.kernel.fuse import protocol
from virgo.limits import MOUNT_VALID_S
from virgo.members import node_of
from virgo.wire.call import Argument

_NUMBER: Final = struct.Struct(">H")
_DIRECTORY: Final = _NUMBER.pack(0)  # in place of a node's number
_INO: Final = struct.Struct("=Q")
_INO_BITS: Final = 40
_KINDS: Final = {"directory": stat.S_IFDIR >> 12, "file": stat.S_IFREG >> 12}
_ROOT: Final = Root(core.POOL, "", "", keeps_owners=False)


class PoolTree(RemoteTree):
    """See the module; a `Tree`.

    Args:
        number: the tree's, which stands in its nodes.
        nodes: all nodes by number.
        near: those that may be asked where a file is, this machine's first.
        mount: descriptor of the mount.
        counts: see `counters`.
    """

    def __init__(
        self,
        number: int,
        table: Table,
        nodes: Mapping[int, FarNode],
        near: Sequence[FarNode],
        mount: int,
        counts: memoryview[int],
    ) -> None:
        self._near = near
        self._fars = {of: Far(node, core.POOL_ROOT) for of, node in nodes.items()}
        files = RemoteOpens(mount, table, lambda descriptor: self._far_at(node_of(descriptor)), counts)
        super().__init__(number, _ROOT, table, Far(near[0], core.POOL_ROOT), files)
        self._numbers = {node.name: of for of, node in nodes.items()}
        self._listed: dict[int, tuple[float, list[Entry]]] = {}

    def __repr__(self) -> str:
        return f"<PoolTree over {len(self._fars)} nodes>"

    # --- asking -------------------------------------------------------------------------------

    def _ask(self, operation: str, *words: Argument) -> Any:
        """A command on a node that knows the placement: the first that answers."""
        lost: Exception = NotRunning("no node of the cloud answers")
        for node in self._near:
            try:
                return node.execute(operation, *words)
            except NotRunning as error:
                lost = error
            except NodeLost as error:
                lost = error
                if not node.silent:  # it answered, of the node that has the file
                    break
        raise lost

    def _full(self, parent: int, name: bytes) -> bytes:
        path = self._directory(parent)
        return b"/pool/" + (path + b"/" + name if path else name)

    def _status(self, path: bytes) -> dict[str, Any]:
        return dict(msgspec.json.decode(self._ask("FILES.STAT", path)))

    def far_of(self, identity: bytes) -> tuple[Far, bytes]:
        """See `RemoteTree`; what is asked of a file is not asked of a directory."""
        if identity[: _NUMBER.size] in (_DIRECTORY, b""):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return self._far_at(_NUMBER.unpack_from(identity)[0]), identity[_NUMBER.size :]

    def _far_at(self, number: int) -> Far:
        if number not in self._fars:
            raise NodeLost(f"node {number} has joined after this was mounted", hint="Mount it again.")
        return self._fars[number]

    def _is_directory(self, node: int) -> bool:
        return is_top(node) or self._identity(node).startswith(_DIRECTORY)

    # --- names --------------------------------------------------------------------------------

    def look(self, parent: int, name: bytes) -> Found:
        """See `Tree`."""
        path = self._full(parent, name)
        found = self._status(path)
        if found["kind"] == "directory":
            return _directory(path)
        if found.get("lost"):
            raise NodeLost(f"{path!r} is on node {found['node']}, which is lost")
        number = self._numbers.get(found["node"], 0)
        return _numbered(number, self._far_at(number).act(FOUND, "LOOK", self._directory(parent), name))

    def create(self, parent: int, name: bytes, flags: int, mode: int, owner: Owner) -> tuple[Found, Handle]:
        """See `Tree`; on the node that a rule names or that has most room."""
        path = self._full(parent, name)
        try:
            descriptor = int(self._ask("VIRGO_OPEN", path, "x+"))
        except FileThere:
            if flags & os.O_EXCL:
                raise
            descriptor = int(self._ask("VIRGO_OPEN", path, "w+" if flags & os.O_TRUNC else "r+"))
        far = self._far_at(node_of(descriptor))
        where = (path.removeprefix(b"/pool/"), b"", descriptor)
        far.do("CHANGE", where, Settings(mode=mode & 0o7777))
        with contextlib.suppress(FileRefused):  # its node is not root, and its files are its user's
            far.do("CHANGE", where, Settings(user=owner.user, group=owner.group))
        found = _numbered(node_of(descriptor), far.act(FOUND, "LOOK", self._directory(parent), name))
        return found, Handle(descriptor, found.attributes)

    def make_directory(self, parent: int, name: bytes, mode: int, owner: Owner) -> Found:
        """See `Tree`; whose it is and who may use it are those of the pool."""
        path = self._full(parent, name)
        self._ask("FILES.MKDIR", path)
        self._listed.pop(parent, None)
        return _directory(path)

    def make_node(self, parent: int, name: bytes, mode: int, device: int, owner: Owner) -> Found:
        """See `Tree`; regular files only."""
        if not stat.S_ISREG(mode):
            _refuse()
        found, handle = self.create(parent, name, os.O_EXCL, mode, owner)
        self._ask("VIRGO_CLOSE", handle.descriptor)
        return found

    def make_link(self, parent: int, name: bytes, target: bytes, owner: Owner) -> Found:
        """Not in the pool."""
        _refuse()

    def link(self, node: int, parent: int, name: bytes) -> Found:
        """Not in the pool."""
        _refuse()

    def remove(self, parent: int, name: bytes, *, directory: bool) -> None:
        """See `Tree`."""
        path = self._full(parent, name)
        if directory != (self._status(path)["kind"] == "directory"):
            code = errno.ENOTDIR if directory else errno.EISDIR
            raise OSError(code, os.strerror(code))
        self._ask("FILES.REMOVE", path)
        self._listed.pop(parent, None)

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        """See `Tree`; of files."""
        if flags:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        path = self._full(parent, name)
        if self._status(path)["kind"] == "directory":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        self._ask("FILES.RENAME", path, self._full(new_parent, new_name))
        self._listed.pop(parent, None)
        self._listed.pop(new_parent, None)

    def entries(self, node: int, offset: int, size: int, *, plus: bool) -> list[Entry]:
        """See `Tree`; the attributes are asked for one by one."""
        listed = self._listed.get(node)
        if not offset or listed is None or time.monotonic() - listed[0] > MOUNT_VALID_S:
            listed = self._listed[node] = (time.monotonic(), self._list(node))
        return listed[1][offset : offset + max(1, size // 64)]

    def _list(self, node: int) -> list[Entry]:
        path = self._directory(node)
        found = msgspec.json.decode(self._ask("FILES.LIST", b"/pool/" + path))
        dots = [(b".", _KINDS["directory"]), (b"..", _KINDS["directory"])]
        named = dots + [(os.fsencode(core.entry_name(item)), _KINDS.get(item["kind"], 0)) for item in found]
        return [Entry(name, 1 + index, kind, 1 + index) for index, (name, kind) in enumerate(named)]

    def sync_directory(self, node: int) -> None:
        """See `Tree`; the names of a file are synced with it."""

    # --- attributes ---------------------------------------------------------------------------

    def attributes(self, node: int) -> bytes:
        """See `Tree`."""
        if not self._is_directory(node):
            return _salted(self._identity(node), super().attributes(node))
        path = b"/pool/" + self._directory(node)
        if not is_top(node) and self._status(path)["kind"] != "directory":
            raise posix.stale()
        return _directory(path).attributes

    def change(self, node: int, wanted: Settings) -> bytes:
        """See `Tree`; of files."""
        return _salted(self._identity(node) if not is_top(node) else b"", super().change(node, wanted))

    def statistics(self, node: int) -> bytes:
        """See `Tree`; those of the node that was asked."""
        if not self._is_directory(node):
            return super().statistics(node)
        return Far(self._near[0], core.POOL_ROOT).act(_BYTES, "STATISTICS", (b"", b"", 0))

    def extended(self, node: int) -> list[bytes]:
        """See `Tree`."""
        return [] if self._is_directory(node) else super().extended(node)

    def get_extended(self, node: int, name: bytes) -> bytes:
        """See `Tree`."""
        if self._is_directory(node):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return super().get_extended(node, name)


_BYTES = msgspec.msgpack.Decoder(bytes)


def _refuse() -> NoReturn:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def _directory(path: bytes) -> Found:
    """A directory of the pool: the same wherever it lies."""
    digest = hashlib.blake2b(path.strip(b"/"), digest_size=16).digest()
    owner = (2, os.getuid(), os.getgid())
    attributes = protocol.ATTRIBUTES.pack(
        *_INO.unpack_from(digest), 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR | 0o755, *owner, 0, 4096, 0
    )
    return Found(_DIRECTORY + digest, attributes)


def _numbered(number: int, found: Found) -> Found:
    """A file of a node: with its identity in the whole cloud."""
    identity = _NUMBER.pack(number) + found.identity
    return Found(identity, _salted(identity, found.attributes))


def _salted(identity: bytes, attributes: bytes) -> bytes:
    """Attributes with a number that no other node's file has."""
    number = _INO.unpack_from(attributes)[0] & ((1 << _INO_BITS) - 1)
    return _INO.pack(number | identity[1] << _INO_BITS) + attributes[_INO.size :]
