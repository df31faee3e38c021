"""A tree whose files lie on this machine: every operation is the kernel's own, on the file itself.

A node is found again by the names under which it is known: its directory is at hand, open, and what has the
name there must be what was met under it, or the next name is tried. A file without any name, removed while it
is open, is found by a descriptor of whoever opened it (`opens`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from virgo.files import beneath, posix
from virgo.files.mount.opens import LocalOpens
from virgo.files.mount.table import Table, is_top
from virgo.files.mount.tree import Entry
from virgo.files.posix import Descriptor, Found, Owner, Settings
from virgo.files.roots import Root
from virgo.limits import MOUNT_DIRECTORIES_MAX

_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class LocalTree:
    """See the module; a `Tree`.

    Args:
        number: the tree's, which stands in its nodes.
        files: makes its open files, given what opens a node by its names.
    """

    def __init__(self, number: int, root: Root, table: Table, files: LocalOpens) -> None:
        self.number = number
        self.root = root
        self.files = files
        files.reopen = self.open
        self._table = table
        self._directories: OrderedDict[int, Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<LocalTree {self.root.directory!r}>"

    # --- finding ------------------------------------------------------------------------------

    def directory(self, node: int) -> Descriptor:
        """A directory at hand."""
        found = self._directories.get(node)
        if found is not None:
            return found
        found = Descriptor(beneath.open_root(self.root.directory)) if is_top(node) else self._search(node)
        with self._lock:
            self._directories[node] = found
            while len(self._directories) > MOUNT_DIRECTORIES_MAX:
                self._directories.popitem(last=False)
        return found

    def file(self, node: int) -> Descriptor:
        """A descriptor of anything, good for its attributes and for `posix.by_descriptor`."""
        if is_top(node) or node in self._directories:
            return self.directory(node)
        try:
            return self._search(node)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return self.files.nameless(node)

    def open(self, node: int, flags: int, *, drop: bool = False) -> Descriptor:
        """See `Tree.open`; a directory too."""
        writes = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        posix.refuse_writing(writes, self.root.read_only)
        held = self.file(node)
        opened = Descriptor(posix.open_again(held.number, flags))
        if drop:
            posix.drop_privileges(opened.number)
        return opened

    def _search(self, node: int) -> Descriptor:
        """Find it by the names that it has. Raises ESTALE if it has none of them any more."""
        identity = self._identity(node)
        for parent, name in self._table.names(node):
            above = self.directory(parent)
            with contextlib.suppress(FileNotFoundError):
                found = Descriptor(os.open(name, _PATH, dir_fd=above.number))
                if posix.identity_of(found.number) == identity:
                    return found
        raise posix.stale()

    def _identity(self, node: int) -> bytes:
        try:
            return self._table.identity(node)
        except KeyError:
            raise posix.stale() from None

    # --- names --------------------------------------------------------------------------------

    def look(self, parent: int, name: bytes) -> Found:
        """See `Tree`."""
        held = self.directory(parent)
        return posix.look(held.number, name)

    def make_node(self, parent: int, name: bytes, mode: int, device: int, owner: Owner) -> Found:
        """See `Tree`."""
        with self._changed(parent) as directory:
            posix.make_node(directory, name, mode, device, self._owner(owner))
            return posix.look(directory, name)

    def make_directory(self, parent: int, name: bytes, mode: int, owner: Owner) -> Found:
        """See `Tree`."""
        with self._changed(parent) as directory:
            posix.make_directory(directory, name, mode, self._owner(owner))
            return posix.look(directory, name)

    def make_link(self, parent: int, name: bytes, target: bytes, owner: Owner) -> Found:
        """See `Tree`."""
        with self._changed(parent) as directory:
            posix.make_link(directory, name, target, self._owner(owner))
            return posix.look(directory, name)

    def create(
        self, parent: int, name: bytes, flags: int, mode: int, owner: Owner
    ) -> tuple[Found, Descriptor]:
        """See `Tree`."""
        with self._changed(parent) as directory:
            opened = Descriptor(posix.create(directory, name, flags, mode, self._owner(owner)))
            return posix.look_at(opened.number), opened

    def link(self, node: int, parent: int, name: bytes) -> Found:
        """See `Tree`."""
        with self._changed(parent) as directory:
            held = self.file(node)
            posix.link(held.number, directory, name)
            return posix.look(directory, name)

    def remove(self, parent: int, name: bytes, *, directory: bool) -> None:
        """See `Tree`."""
        with self._changed(parent) as above:
            (os.rmdir if directory else os.unlink)(name, dir_fd=above)

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        """See `Tree`."""
        with self._changed(parent) as old, self._changed(new_parent) as new:
            posix.rename(old, name, new, new_name, flags)

    def entries(self, node: int, offset: int, size: int, *, plus: bool) -> list[Entry]:
        """See `Tree`."""
        opened = self.open(node, os.O_RDONLY | os.O_DIRECTORY)
        return [Entry(*fields) for fields in posix.entries(opened.number, offset, size, plus=plus)]

    def sync_directory(self, node: int) -> None:
        """See `Tree`."""
        opened = self.open(node, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(opened.number)

    @contextlib.contextmanager
    def _changed(self, node: int) -> Iterator[int]:
        posix.refuse_writing(True, self.root.read_only)
        held = self.directory(node)
        yield held.number

    def _owner(self, owner: Owner) -> Owner | None:
        """Whose a new file becomes; without owners kept the one whose the root is, whoever mounts it."""
        if self.root.keeps_owners or os.geteuid() != 0:
            return owner if self.root.keeps_owners else None
        top = Path(self.root.directory).stat()
        return Owner(top.st_uid, top.st_gid)

    # --- attributes ---------------------------------------------------------------------------

    def attributes(self, node: int) -> bytes:
        """See `Tree`."""
        held = self.file(node)
        return posix.look_at(held.number).attributes

    def change(self, node: int, wanted: Settings) -> bytes:
        """See `Tree`."""
        posix.refuse_writing(True, self.root.read_only)
        held = self.file(node)
        if wanted.size is not None:
            opened = self.files.descriptor(node, writes=True)
            os.ftruncate(opened.number, wanted.size)
        posix.change(held.number, wanted)
        return posix.look_at(held.number).attributes

    def target(self, node: int) -> bytes:
        """See `Tree`."""
        held = self.file(node)
        return os.readlink(b"", dir_fd=held.number)

    def statistics(self, node: int) -> bytes:
        """See `Tree`."""
        held = self.file(node)
        return posix.statistics(held.number)

    def extended(self, node: int) -> list[bytes]:
        """See `Tree`."""
        held = self.file(node)
        return [os.fsencode(name) for name in os.listxattr(posix.by_descriptor(held.number))]

    def get_extended(self, node: int, name: bytes) -> bytes:
        """See `Tree`."""
        held = self.file(node)
        return os.getxattr(posix.by_descriptor(held.number), name)

    def set_extended(self, node: int, name: bytes, value: bytes, flags: int) -> None:
        """See `Tree`."""
        posix.refuse_writing(True, self.root.read_only)
        held = self.file(node)
        os.setxattr(posix.by_descriptor(held.number), name, value, flags)

    def remove_extended(self, node: int, name: bytes) -> None:
        """See `Tree`."""
        posix.refuse_writing(True, self.root.read_only)
        held = self.file(node)
        os.removexattr(posix.by_descriptor(held.number), name)
