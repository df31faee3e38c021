"""What can be done to a file or a name, in terms of descriptors: all that a mounted file system needs.

A directory is a descriptor of it, a name a single one in it, never followed. A file is any descriptor of
it, one that was opened with O_PATH too. The mount calls these functions for the files of its own machine,
and a node for those who ask from elsewhere. Attributes are as the kernel's file system protocol packs them.

Errors are the kernel's `OSError`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from virgo.kernel import at
from virgo.kernel.fuse import protocol

_DEVICE: Final = struct.Struct("=Q")
_SETS_ID: Final = stat.S_ISUID | stat.S_ISGID


class Descriptor:
    """An open descriptor that is closed when nobody holds this object any more."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"<Descriptor {self.number}>"

    def __del__(self) -> None:
        os.close(self.number)


class Found(msgspec.Struct, frozen=True, array_like=True):
    """A file as it was met.

    Attributes:
        identity: what tells it from every other that had or will have its name, see `identify`.
        attributes: packed, see `protocol.attributes`.
    """

    identity: bytes
    attributes: bytes

    @property
    def mode(self) -> int:
        """Kind and permissions."""
        return protocol.mode_of(self.attributes)


class Owner(msgspec.Struct, frozen=True, array_like=True):
    """Whose a new file becomes: user and group, or None for both to leave it as the kernel makes it."""

    user: int
    group: int


class Settings(msgspec.Struct, frozen=True, array_like=True):
    """Attributes to be set; None for those that stay.

    Attributes:
        accessed, modified: seconds and nanoseconds, or `at.TIME_NOW` as nanoseconds.
        drop_privileges: the bits that let a program run as its owner go, as a write by a stranger demands.
    """

    mode: int | None = None
    user: int | None = None
    group: int | None = None
    size: int | None = None
    accessed: tuple[int, int] | None = None
    modified: tuple[int, int] | None = None
    drop_privileges: bool = False


def identify(status: os.stat_result, handle: bytes) -> bytes:
    """Device and handle; where the file system has no handles, the number, which may be given again."""
    return _DEVICE.pack(status.st_dev) + (handle or _DEVICE.pack(status.st_ino))


def look(directory: int, name: bytes) -> Found:
    """What a name stands for."""
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    return Found(identify(status, at.handle(directory, name)), protocol.attributes(status))


def look_at(file: int) -> Found:
    """The same of a descriptor."""
    status = os.fstat(file)
    return Found(identify(status, at.handle(file)), protocol.attributes(status))


def identity_of(file: int) -> bytes:
    """Only the identity."""
    return identify(os.fstat(file), at.handle(file))


def by_descriptor(file: int) -> str:
    """A path that leads to exactly the file of this descriptor, for calls that take no descriptor."""
    return f"/proc/self/fd/{file}"


def open_again(file: int, flags: int) -> int:
    """Open the file of a descriptor anew; for reading too if it is to be written, where that is allowed.

    A descriptor serves all programs that have the file open, and who only writes may be the first of them.
    What is no file of data is not waited for.
    """
    path = by_descriptor(file)
    flags |= os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    if flags & os.O_ACCMODE == os.O_WRONLY:
        with contextlib.suppress(PermissionError):
            return os.open(path, flags & ~os.O_ACCMODE | os.O_RDWR)
    return os.open(path, flags)


def access_of(file: int) -> int:
    """O_RDONLY, O_WRONLY or O_RDWR, as a descriptor was opened."""
    return fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE


# --- names ----------------------------------------------------------------------------------
# `umask` is that of this process, whose bits of the mode are given back: who asks has applied his own.


def create(directory: int, name: bytes, flags: int, mode: int, owner: Owner | None, umask: int = 0) -> int:
    """Open a new regular file, or an old one if O_EXCL is not among the flags."""
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        new = flags & ~os.O_ACCMODE | os.O_RDWR | os.O_CREAT | os.O_EXCL  # for reading too: see above
        file = os.open(name, new, mode & 0o7777, dir_fd=directory)
    except FileExistsError:
        if flags & os.O_EXCL:
            raise
        there = Descriptor(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory))
        return open_again(there.number, flags & ~(os.O_CREAT | os.O_NOFOLLOW))
    try:
        _give(directory, name, owner, mode, umask)
    except BaseException:
        os.close(file)
        os.unlink(name, dir_fd=directory)
        raise
    return file


def make_node(
    directory: int, name: bytes, mode: int, device: int, owner: Owner | None, umask: int = 0
) -> None:
    """Make a regular file, a FIFO, a socket or a device."""
    os.mknod(name, mode, device, dir_fd=directory)
    _owned(directory, name, owner, mode, umask)


def make_directory(directory: int, name: bytes, mode: int, owner: Owner | None, umask: int = 0) -> None:
    """Make a directory."""
    os.mkdir(name, mode & 0o7777, dir_fd=directory)
    _owned(directory, name, owner, mode | stat.S_IFDIR, umask)


def make_link(directory: int, name: bytes, target: bytes, owner: Owner | None, umask: int = 0) -> None:
    """Make a symbolic link."""
    os.symlink(target, name, dir_fd=directory)
    _owned(directory, name, owner, stat.S_IFLNK, umask)


def _owned(directory: int, name: bytes, owner: Owner | None, mode: int, umask: int) -> None:
    try:
        _give(directory, name, owner, mode, umask)
    except BaseException:
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=directory) if stat.S_ISDIR(mode) else os.unlink(name, dir_fd=directory)
        raise


def _give(directory: int, name: bytes, owner: Owner | None, mode: int, umask: int) -> None:
    """Give a new file its owner, and what its mode has lost; its group is the directory's if that says so."""
    above = os.fstat(directory).st_mode
    if owner is not None:
        group = -1 if above & stat.S_ISGID else owner.group
        os.chown(name, owner.user, group, dir_fd=directory, follow_symlinks=False)
    # The kernel takes these bits from what changes hands, and a directory has the one of the directory above.
    wanted = mode & 0o7777 | (above & stat.S_ISGID if stat.S_ISDIR(mode) else 0)
    if wanted & (_SETS_ID | umask) and not stat.S_ISLNK(mode):
        os.chmod(name, wanted, dir_fd=directory)


def link(file: int, directory: int, name: bytes) -> None:
    """Give the file of a descriptor a further name."""
    os.link(by_descriptor(file), name, dst_dir_fd=directory)


def rename(directory: int, name: bytes, new_directory: int, new_name: bytes, flags: int) -> None:
    """rename(2), or renameat2(2) with flags."""
    if flags:
        at.rename(directory, name, new_directory, new_name, flags)
    else:
        os.rename(name, new_name, src_dir_fd=directory, dst_dir_fd=new_directory)


# --- files ----------------------------------------------------------------------------------


def change(file: int, wanted: Settings) -> None:
    """Set attributes, but for the size, which takes a descriptor that writes: `os.ftruncate`."""
    path = by_descriptor(file)
    if wanted.user is not None or wanted.group is not None:
        user = -1 if wanted.user is None else wanted.user
        os.chown(path, user, -1 if wanted.group is None else wanted.group)
    if wanted.mode is not None:
        Path(path).chmod(wanted.mode & 0o7777)
    elif wanted.drop_privileges:
        drop_privileges(file)
    if wanted.accessed is not None or wanted.modified is not None:
        stays = (0, at.TIME_OMIT)
        at.set_times(path, wanted.accessed or stays, wanted.modified or stays)


def drop_privileges(file: int) -> None:
    """Take away what lets a program run as its owner, as the kernel does when a stranger writes to it."""
    mode = os.fstat(file).st_mode
    dropped = mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        dropped &= ~stat.S_ISGID
    if dropped != mode and stat.S_ISREG(mode):
        Path(by_descriptor(file)).chmod(stat.S_IMODE(dropped))
    with contextlib.suppress(OSError):
        os.removexattr(by_descriptor(file), "security.capability")


def privileged(file: int) -> bool:
    """Whether it lets who runs it do more than he may, which a write by a stranger must end."""
    mode = os.fstat(file).st_mode
    if mode & stat.S_ISUID or (mode & stat.S_ISGID and mode & stat.S_IXGRP):
        return True
    try:
        return bool(os.getxattr(by_descriptor(file), "security.capability"))
    except OSError:
        return False


def statistics(file: int) -> bytes:
    """Room and names of the file system that a descriptor is on, packed as STATFS answers."""
    found = os.fstatvfs(file)
    return protocol.STATFS_OUT.pack(
        found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree,
        found.f_bsize, found.f_namemax, found.f_frsize, 0,
    )  # fmt: skip


def entries(
    directory: int, offset: int, size: int, *, plus: bool
) -> Iterator[tuple[bytes, int, int, int, Found | None]]:
    """Entries of a directory from an offset on: as `virgo.kernel.at.entries`, and what each stands for.

    Args:
        directory: a descriptor that is open for reading.
        offset: 0, or that behind an entry.
        size: about how many bytes of entries.
        plus: look at each but `.` and `..`; what went away meanwhile is None.
    """
    if offset:
        os.lseek(directory, offset, os.SEEK_SET)
    for name, number, kind, behind in at.entries(directory, size):
        found = None
        if plus and name not in (b".", b".."):
            with contextlib.suppress(FileNotFoundError):
                found = look(directory, name)
        yield name, number, kind, behind, found


def stale() -> OSError:
    """The file is not where it was met: the kernel looks for it anew."""
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def refuse_writing(change: bool, read_only: bool) -> None:
    """Raise EROFS for a change of what is exported read-only."""
    if change and read_only:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
