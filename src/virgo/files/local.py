"""The files of this node: blocking work on its roots and descriptors, no network and no event loop.

Every method raises VIRGO's errors only, and works on a `Spot` (a root's name and a path below it) or a
descriptor of this node. A root is opened anew for each operation, so an exported directory may be
mounted, unmounted or replaced while the node runs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from virgo.errors import BadArgument, BadDescriptor, FileMissing, FileRefused, TooLarge
from virgo.files import beneath, core
from virgo.files.core import Mode, Spot
from virgo.files.descriptors import DescriptorTable
from virgo.files.faults import translating
from virgo.files.journal import Entry, entry
from virgo.limits import FILE_CACHED_READ_BYTES_MAX, FILE_CHUNK_BYTES, LISTING_ENTRIES_MAX
from virgo.wire.resp import INTEGER_MAX


class LocalFiles:
    """This node's files.

    Args:
        directories: root directory by root name.
        read_only: names of the roots that cannot be changed.
        table: its open files; `reopen` of this object opens them again.
    """

    table: DescriptorTable

    def __init__(self, directories: Mapping[str, str], read_only: Collection[str]) -> None:
        self._directories = dict(directories)
        self._read_only = frozenset(read_only)
        self._scratch = bytearray(FILE_CACHED_READ_BYTES_MAX)
        self.reads = self.reads_cached = self.writes = self.syncs = 0
        self.bytes_read = self.bytes_written = 0

    def __repr__(self) -> str:
        return f"<LocalFiles {', '.join(name or 'private' for name in self._directories)}>"

    # --- by path ------------------------------------------------------------------------------

    def open(self, spot: Spot, mode: Mode, shown: str) -> int:
        """Open a regular file and return its descriptor; a created one gets its directories too."""
        self.table.check_room()
        with translating(f"open {shown!r}"), self.root_of(spot.root, change=mode.write) as root:
            descriptor = beneath.open_regular(root, spot.path, mode.flags)
            return self.keep(spot.root, spot.path, mode.flags, descriptor)

    def exists(self, spot: Spot) -> bool:
        """Whether the path names anything."""
        try:
            with translating("look up"), self.root_of(spot.root) as root:
                beneath.status(root, spot.path)
        except FileMissing:
            return False
        return True

    def status(self, spot: Spot, shown: str) -> dict[str, Any]:
        """What the path names; a link is shown, not followed."""
        with translating(f"stat {shown!r}"), self.root_of(spot.root) as root:
            return _describe(spot.name, beneath.status(root, spot.path))

    def list(self, spot: Spot, shown: str) -> list[dict[str, Any]]:
        """The entries of a directory, by name."""
        found: list[dict[str, Any]] = []
        with (
            translating(f"list {shown!r}"),
            self.root_of(spot.root) as root,
            beneath.opened(root, spot.path, os.O_RDONLY | os.O_DIRECTORY) as directory,
            os.scandir(directory) as entries,
        ):
            for item in entries:
                if len(found) >= LISTING_ENTRIES_MAX:
                    raise TooLarge(f"list {shown!r}: more than {LISTING_ENTRIES_MAX} entries")
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    found.append(_describe(item.name, item.stat(follow_symlinks=False)))
        found.sort(key=lambda item: str(item["name"]))
        return found

    def remove(self, spot: Spot, shown: str) -> None:
        """Remove a file, a link or an empty directory."""
        with translating(f"remove {shown!r}"), self.root_of(spot.root, change=True) as root:
            beneath.remove(root, spot.path)

    def make_directory(self, spot: Spot, shown: str) -> None:
        """Make a directory, and those above it that are absent."""
        with translating(f"mkdir {shown!r}"), self.root_of(spot.root, change=True) as root:
            beneath.make_directory(root, spot.path)

    def rename(self, spot: Spot, new: Spot, shown: str) -> None:
        """Give a file or directory another name, replacing what had it; open descriptors follow."""
        with (
            translating(f"rename {shown!r}"),
            self.root_of(spot.root, change=True) as root,
            self.root_of(new.root, change=True) as new_root,
        ):
            beneath.rename(root, spot.path, new_root, new.path)
        self.table.renamed(spot.root, spot.path, new.root, new.path)

    def link_over(self, spot: Spot, new: Spot, shown: str) -> None:
        """Give a file of the same root a second name, replacing what had it in one step."""
        aside = f"{new.parent}/.virgo-{hashlib.sha256(os.fsencode(new.name)).hexdigest()[:24]}"
        with translating(f"rename {shown!r}"), self.root_of(spot.root, change=True) as root:
            if new.parent:
                beneath.make_directories(root, new.parent)
            with (
                beneath.parent_of(root, spot.path) as (parent, name),
                beneath.parent_of(root, aside.lstrip("/")) as (new_parent, aside_name),
            ):
                if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                    raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
                with contextlib.suppress(FileNotFoundError):  # left by an earlier crash
                    os.unlink(aside_name, dir_fd=new_parent)
                os.link(name, aside_name, src_dir_fd=parent, dst_dir_fd=new_parent, follow_symlinks=False)
                os.rename(aside_name, new.name, src_dir_fd=new_parent, dst_dir_fd=new_parent)
        self.table.renamed(spot.root, spot.path, new.root, new.path)

    # --- by descriptor ------------------------------------------------------------------------

    def read_cached(self, descriptor: int, size: int, position: int) -> bytes | None:
        """What a read would give if all of it is in memory, else None. Never waits for a disk.

        Called by the event loop's thread alone, since it reads into one buffer.
        """
        if size > FILE_CACHED_READ_BYTES_MAX:
            return None
        live = self.table.pin(descriptor)
        if live is None:
            return None
        try:
            if not live.cached:
                return None
            _check_readable(live.entry, descriptor)
            window = memoryview(self._scratch)[:size]
            count = os.preadv(live.descriptor, [window], position, os.RWF_NOWAIT) if size else 0
            if count < size and position + count < os.fstat(live.descriptor).st_size:
                return None
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                live.cached = False
            return None  # the blocking read says what is wrong
        finally:
            self.table.unpin(live)
        self.reads += 1
        self.reads_cached += 1
        self.bytes_read += count
        return bytes(window[:count])

    def read(self, descriptor: int, size: int, position: int) -> bytes:
        """At most `size` bytes from `position`; fewer only at the end of the file."""
        with translating(f"read {descriptor}"), self.table.use(descriptor) as live:
            _check_readable(live.entry, descriptor)
            size = min(size, INTEGER_MAX - position)  # what the kernel can count
            data = os.pread(live.descriptor, size, position) if size else b""
            while len(data) < size:
                more = os.pread(live.descriptor, size - len(data), position + len(data))
                if not more:
                    break
                data += more
        self.reads += 1
        self.bytes_read += len(data)
        return data

    def write(self, descriptor: int, data: bytes, position: int) -> int:
        """Write at `position`, or at the end if opened to append; returns the count on its way to disk.

        The count is less than was given only if the disk filled or failed in the middle; the next write
        says why.
        """
        with translating(f"write {descriptor}"), self.table.use(descriptor) as live:
            if live.entry.flags & os.O_ACCMODE == os.O_RDONLY:
                raise FileRefused(
                    f"write {descriptor}: not opened for writing", hint="Open with w, a, x or +."
                )
            written = 0
            while written < len(data):
                try:
                    written += os.pwrite(live.descriptor, memoryview(data)[written:], position + written)
                except OSError:
                    if not written:
                        raise
                    break
        self.writes += 1
        self.bytes_written += written
        return written

    def truncate(self, descriptor: int, size: int) -> None:
        """Make the file that long; what is added reads as zeros."""
        with translating(f"truncate {descriptor}"), self.table.use(descriptor) as live:
            if live.entry.flags & os.O_ACCMODE == os.O_RDONLY:
                raise FileRefused(
                    f"truncate {descriptor}: not opened for writing", hint="Open with w, a, x or +."
                )
            os.ftruncate(live.descriptor, size)

    def sync(self, descriptor: int) -> None:
        """On return the file is on the disk, and so are the directories by which it is found."""
        with translating(f"sync {descriptor}"), self.table.use(descriptor) as live:
            os.fsync(live.descriptor)
            if not live.named:
                live.named = True
                self._sync_names(Spot(live.entry.root, live.entry.path))
        self.syncs += 1

    def digest(self, descriptor: int, algorithm: str) -> str:
        """A checksum of the whole file. Raises BadArgument."""
        if algorithm not in hashlib.algorithms_guaranteed or algorithm.startswith("shake"):
            raise BadArgument(
                f"{algorithm[:40]!r} is no checksum that is known here",
                hint="sha256, sha1, md5, blake2b and others of Python's hashlib.",
            )
        found = hashlib.new(algorithm, usedforsecurity=False)
        with translating(f"read {descriptor}"), self.table.use(descriptor) as live:
            _check_readable(live.entry, descriptor)
            position = 0
            while piece := os.pread(live.descriptor, FILE_CHUNK_BYTES, position):
                found.update(piece)
                position += len(piece)
        return found.hexdigest()

    def descriptor_status(self, descriptor: int) -> dict[str, Any]:
        """The status of an open file."""
        with translating(f"stat {descriptor}"), self.table.use(descriptor) as live:
            name = Spot(live.entry.root, live.entry.path).name
            return _describe(name, os.fstat(live.descriptor))

    def close(self, descriptor: int) -> None:
        """End a descriptor."""
        with translating(f"close {descriptor}"):
            self.table.close(descriptor)

    def reopen(self, kept: Entry) -> int:
        """Open the file of a descriptor in the kernel again, if it is still the same one."""
        spot = Spot(kept.root, kept.path)
        if kept.root not in self._directories:
            raise BadDescriptor(f"the export {kept.root!r} of an open file is no longer configured")
        change = kept.flags & os.O_ACCMODE != os.O_RDONLY
        try:
            with translating(f"reopen {kept.path!r}"), self.root_of(spot.root, change=change) as root:
                descriptor = beneath.open_regular(root, kept.path, kept.flags)
        except FileMissing as error:
            if not Path(self._directories[kept.root]).is_dir():  # not the file alone is gone
                raise
            raise FileMissing(
                f"the open file {kept.path!r} is gone: it was removed while the node did not hold it open",
                hint="Close the descriptor, and open the path again.",
            ) from error
        if beneath.identity(descriptor) != kept.identity:
            os.close(descriptor)
            raise BadDescriptor(
                f"the open file {kept.path!r} was replaced by another",
                hint="Close the descriptor, and open the path again.",
            )
        return descriptor

    # --- within -------------------------------------------------------------------------------

    def keep(self, root: str, path: str, flags: int, descriptor: int) -> int:
        """Take over a kernel descriptor of an open file; the cloud's number of it."""
        try:
            opened = entry(root, path, flags, beneath.identity(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return self.table.add(opened, descriptor)

    def check_writable(self, root: str) -> None:
        """Raise EROFS if nothing below the root can be changed."""
        if root in self._read_only:
            raise OSError(errno.EROFS, f"the export {root!r} is read-only")

    @contextlib.contextmanager
    def root_of(self, root: str, *, change: bool = False) -> Iterator[int]:
        """A descriptor of a root, by name, for the block; `change`: refuse what is read-only."""
        if change:
            self.check_writable(root)
        try:
            descriptor = beneath.open_root(self._directories[root])
        except KeyError:
            raise FileMissing(
                f"there is no export {root!r} on this node", hint="`virgo ls /NODE` lists them."
            ) from None
        except (FileNotFoundError, NotADirectoryError):
            if root in (core.PRIVATE, core.POOL_ROOT):
                raise
            raise FileMissing(
                f"{self._directories[root]}, the directory of the export {root!r}, is not there",
                hint="Make or mount it on its node; `virgo doctor` there shows all exports.",
            ) from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _sync_names(self, spot: Spot) -> None:
        """Sync the directories from the file's up to the root."""
        with self.root_of(spot.root) as root:
            path = spot.path
            while path:
                path = path.rpartition("/")[0]
                with (
                    contextlib.suppress(FileNotFoundError),  # removed while open
                    beneath.opened(root, path, os.O_RDONLY | os.O_DIRECTORY) as directory,
                ):
                    os.fsync(directory)


def _check_readable(kept: Entry, descriptor: int) -> None:
    if kept.flags & os.O_ACCMODE == os.O_WRONLY:
        raise FileRefused(f"read {descriptor}: not opened for reading", hint="Open with r or +.")


def _describe(name: str, status: os.stat_result) -> dict[str, Any]:
    """A status as people and programs read it."""
    return {
        **core.name_fields(name),
        "kind": beneath.describe(status.st_mode),
        "size": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "mode": stat.S_IMODE(status.st_mode),
        "links": status.st_nlink,
    }
