"""What a file system shows below one directory, whoever has the files: `LocalTree`, `RemoteTree`, `PoolTree`.

Nodes are the kernel's numbers (see `table`); attributes are packed as the kernel takes them. Every method
may wait for a disk or another machine, runs in any thread, and raises `OSError` or an error of the cloud,
which both become an errno for the program that asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from virgo.files.posix import Found, Owner, Settings
from virgo.files.roots import Root


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a directory.

    Attributes:
        name: its last name; "." and ".." are entries too.
        number: the inode's, as its file system has it.
        kind: DT_* of the kernel.
        behind: the offset from which the next entry is read.
        found: what the name stands for, if that was asked; None if it went away meanwhile.
    """

    name: bytes
    number: int
    kind: int
    behind: int
    found: Found | None = None


class OpenFiles(Protocol):
    """The tree's files that programs have open."""

    def opened(self, node: int, flags: int, handle: Any) -> bytes:
        """A program has opened the file, which gave `handle`: how the kernel shall treat it (OPEN_OUT)."""

    def release(self, node: int) -> None:
        """A program has closed it."""

    def may_be_privileged(self, node: int) -> bool:
        """Whether it can become set-user-ID now: not while somebody may write to it without our knowledge."""

    def read(self, node: int, offset: int, size: int) -> bytes:
        """At most so many bytes, fewer only at the end."""

    def write(self, node: int, offset: int, data: memoryview, *, append: bool, drop: bool) -> int:
        """Write, at the end if `append`; `drop`: it is set-user-ID no more. The count, which may be less."""

    def sync(self, node: int, *, data_only: bool) -> None:
        """On return what was written is on the disk of the node that has the file."""

    def allocate(self, node: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""

    def seek(self, node: int, offset: int, whence: int) -> int:
        """Where data, or a hole, begins: lseek(2) with SEEK_DATA or SEEK_HOLE."""

    def copy(self, node: int, offset: int, target: int, target_offset: int, length: int) -> int:
        """Copy within the tree, without the data coming here; the count."""


class Tree(Protocol):
    """See the module.

    Attributes:
        number: the tree's, which stands in its nodes.
        root: what it shows.
    """

    number: int
    root: Root

    @property
    def files(self) -> OpenFiles:
        """Its open files."""

    def look(self, parent: int, name: bytes) -> Found:
        """What a name stands for. Raises FileNotFoundError."""

    def make_node(self, parent: int, name: bytes, mode: int, device: int, owner: Owner) -> Found:
        """A new regular file, FIFO, socket or device."""

    def make_directory(self, parent: int, name: bytes, mode: int, owner: Owner) -> Found:
        """A new directory."""

    def make_link(self, parent: int, name: bytes, target: bytes, owner: Owner) -> Found:
        """A new symbolic link."""

    def create(self, parent: int, name: bytes, flags: int, mode: int, owner: Owner) -> tuple[Found, Any]:
        """A new regular file, and a handle for `OpenFiles.opened`."""

    def open(self, node: int, flags: int, *, drop: bool) -> Any:
        """Open a regular file: a handle for `OpenFiles.opened`; `drop`: it is set-user-ID no more."""

    def link(self, node: int, parent: int, name: bytes) -> Found:
        """A further name of a file."""

    def remove(self, parent: int, name: bytes, *, directory: bool) -> None:
        """Take a name away."""

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        """Give what has a name another one."""

    def entries(self, node: int, offset: int, size: int, *, plus: bool) -> list[Entry]:
        """Entries of a directory from an offset on, about `size` bytes of them; `plus`: look at each."""

    def attributes(self, node: int) -> bytes:
        """Its attributes."""

    def change(self, node: int, wanted: Settings) -> bytes:
        """Set attributes; what they are then."""

    def target(self, node: int) -> bytes:
        """What a symbolic link says."""

    def statistics(self, node: int) -> bytes:
        """Room and names of its file system, packed."""

    def extended(self, node: int) -> list[bytes]:
        """Names of its extended attributes."""

    def get_extended(self, node: int, name: bytes) -> bytes:
        """An extended attribute."""

    def set_extended(self, node: int, name: bytes, value: bytes, flags: int) -> None:
        """Set one."""

    def remove_extended(self, node: int, name: bytes) -> None:
        """Take one away."""

    def sync_directory(self, node: int) -> None:
        """On return its names are on the disk."""
