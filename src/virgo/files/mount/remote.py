"""A tree whose files lie on another machine: every operation is an act on the node that has them.

A node is named by its path, as it is known here, and by its identity; a file that is open also by the
cloud's descriptor. What was moved elsewhere meanwhile is ESTALE, and the kernel looks for it anew. A node
that does not answer is EHOSTDOWN within seconds; when it is back, so are its files, and what was open is
open.
"""

from __future__ import annotations

import errno
from typing import Any, TypeVar

import msgspec

from virgo.files import posix
from virgo.files.mount.far import Far
from virgo.files.mount.remoteopens import Handle, RemoteOpens
from virgo.files.mount.table import Table, is_top
from virgo.files.mount.tree import Entry
from virgo.files.posix import Found, Owner, Settings
from virgo.files.roots import Root

T = TypeVar("T")
FOUND = msgspec.msgpack.Decoder(Found)
_ENTRIES = msgspec.msgpack.Decoder(list[tuple[bytes, int, int, int, Found | None]])
_CREATED = msgspec.msgpack.Decoder(tuple[Found, int])
_OPENED = msgspec.msgpack.Decoder(tuple[bytes, int])
_BYTES = msgspec.msgpack.Decoder(bytes)
_NAMES = msgspec.msgpack.Decoder(list[bytes])


class RemoteTree:
    """See the module; a `Tree`.

    Args:
        number: the tree's, which stands in its nodes.
        far: acts on the node that has the files.
    """

    def __init__(self, number: int, root: Root, table: Table, far: Far, files: RemoteOpens) -> None:
        self.number = number
        self.root = root
        self.files = files
        self._table = table
        self._far = far

    def __repr__(self) -> str:
        return f"<RemoteTree /{self.root.node}/{self.root.name}>"

    # --- finding ------------------------------------------------------------------------------

    def _directory(self, node: int) -> bytes:
        """The path of a directory. Raises ESTALE if it has none any more."""
        paths = self._table.paths(node)
        if not paths:
            raise posix.stale()
        return paths[0]

    def _at(self, decoder: msgspec.msgpack.Decoder[T], node: int, act: str, *arguments: Any) -> T:
        """An act on a node: by each of its paths, until one is right, and by its descriptor."""
        identity = b"" if is_top(node) else self._identity(node)
        far, there = self.far_of(identity)
        descriptor = self.files.descriptor(node)
        paths = self._table.paths(node) or ([b""] if descriptor else [])
        wrong = posix.stale()
        for path in paths:
            try:
                return far.act(decoder, act, (path, there, descriptor), *arguments)
            except OSError as error:
                if error.errno not in (errno.ESTALE, errno.ENOENT, errno.ENOTDIR):
                    raise
                wrong = error
        raise posix.stale() from wrong

    def far_of(self, identity: bytes) -> tuple[Far, bytes]:
        """The node that has the file of an identity, and the identity that it has there."""
        return self._far, identity

    def _identity(self, node: int) -> bytes:
        try:
            return self._table.identity(node)
        except KeyError:
            raise posix.stale() from None

    # --- names --------------------------------------------------------------------------------

    def look(self, parent: int, name: bytes) -> Found:
        """See `Tree`."""
        return self._far.act(FOUND, "LOOK", self._directory(parent), name)

    def make_node(self, parent: int, name: bytes, mode: int, device: int, owner: Owner) -> Found:
        """See `Tree`."""
        return self._far.act(FOUND, "MAKE_NODE", self._directory(parent), name, mode, device, owner)

    def make_directory(self, parent: int, name: bytes, mode: int, owner: Owner) -> Found:
        """See `Tree`."""
        return self._far.act(FOUND, "MAKE_DIRECTORY", self._directory(parent), name, mode, owner)

    def make_link(self, parent: int, name: bytes, target: bytes, owner: Owner) -> Found:
        """See `Tree`."""
        return self._far.act(FOUND, "MAKE_LINK", self._directory(parent), name, target, owner)

    def create(self, parent: int, name: bytes, flags: int, mode: int, owner: Owner) -> tuple[Found, Handle]:
        """See `Tree`."""
        path = self._directory(parent)
        found, descriptor = self._far.act(_CREATED, "CREATE", path, name, flags, mode, owner)
        return found, Handle(descriptor, found.attributes)

    def open(self, node: int, flags: int, *, drop: bool) -> Handle:
        """See `Tree`."""
        attributes, descriptor = self._at(_OPENED, node, "OPEN", flags, drop)
        return Handle(descriptor, attributes)

    def link(self, node: int, parent: int, name: bytes) -> Found:
        """See `Tree`."""
        return self._at(FOUND, node, "LINK", self._directory(parent), name)

    def remove(self, parent: int, name: bytes, *, directory: bool) -> None:
        """See `Tree`."""
        self._far.do("REMOVE", self._directory(parent), name, directory)

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        """See `Tree`."""
        above, new_above = self._directory(parent), self._directory(new_parent)
        self._far.do("RENAME", above, name, new_above, new_name, flags)

    def entries(self, node: int, offset: int, size: int, *, plus: bool) -> list[Entry]:
        """See `Tree`."""
        return [Entry(*fields) for fields in self._at(_ENTRIES, node, "ENTRIES", offset, size, plus)]

    def sync_directory(self, node: int) -> None:
        """See `Tree`."""
        self._at(_ANYTHING, node, "SYNC_DIRECTORY")

    # --- attributes ---------------------------------------------------------------------------

    def attributes(self, node: int) -> bytes:
        """See `Tree`."""
        return self._at(_BYTES, node, "ATTRIBUTES")

    def change(self, node: int, wanted: Settings) -> bytes:
        """See `Tree`."""
        return self._at(_BYTES, node, "CHANGE", wanted)

    def target(self, node: int) -> bytes:
        """See `Tree`."""
        return self._at(_BYTES, node, "TARGET")

    def statistics(self, node: int) -> bytes:
        """See `Tree`."""
        return self._at(_BYTES, node, "STATISTICS")

    def extended(self, node: int) -> list[bytes]:
        """See `Tree`."""
        return self._at(_NAMES, node, "EXTENDED")

    def get_extended(self, node: int, name: bytes) -> bytes:
        """See `Tree`."""
        return self._at(_BYTES, node, "GET_EXTENDED", name)

    def set_extended(self, node: int, name: bytes, value: bytes, flags: int) -> None:
        """See `Tree`."""
        self._at(_ANYTHING, node, "SET_EXTENDED", name, value, flags)

    def remove_extended(self, node: int, name: bytes) -> None:
        """See `Tree`."""
        self._at(_ANYTHING, node, "REMOVE_EXTENDED", name)


_ANYTHING: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder()
