"""Opening and changing files below a root, with no way out of it.

Every path is resolved by the kernel with openat2(2) and RESOLVE_BENEATH from a descriptor of the root:
`..` above the root, absolute links and links that lead out are refused while resolving, so that there is
no moment between a check and its use. Magic links (`/proc/*/fd`) are refused too. What changes a name
(remove, mkdir, rename) opens the parent this way and then acts on the one last name without following it.

Promises: only regular files are opened, and opening never waits for a FIFO's other end, makes no terminal
ours and leaves nothing open when it fails. Errors are the kernel's `OSError`, except PathEscape.

Needs Linux 5.6; `check_kernel` says so when it is older.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import sys
from collections.abc import Iterator
from typing import Final

from virgo.errors import FileRefused, PathEscape
from virgo.kernel import at

_SYS_OPENAT2: Final = 437
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_BENEATH: Final = 0x08
_RETRIES: Final = 64  # the kernel says EAGAIN when a rename elsewhere races with `..`

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(root: int, path: str, flags: int, permissions: int = 0o666) -> int:
    """A descriptor of `path` below the directory `root`; "" is the root itself.

    Raises:
        PathEscape: it leads out of the root.
        OSError: what the kernel said.
    """
    how = _How(flags | os.O_CLOEXEC, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
    if flags & os.O_CREAT:
        how.mode = permissions
    name = ctypes.c_char_p(os.fsencode(path) or b".")
    for _ in range(_RETRIES):
        result: int = _syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_long(root),
            name,
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if result >= 0:
            return result
        code = ctypes.get_errno()
        if code == errno.EXDEV:
            raise PathEscape(f"{path!r} leads out of its root")
        if code not in (errno.EAGAIN, errno.EINTR):
            raise OSError(code, os.strerror(code), path)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)


def check_kernel() -> None:
    """Raise FileRefused if openat2 is not there (an old kernel, or a sandbox that hides it)."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(open_beneath(root, "", os.O_PATH))
    except OSError as error:
        raise FileRefused(
            f"the files module cannot use openat2(2): {error.strerror}",
            hint="It needs Linux 5.6 or newer, and a container profile that allows openat2.",
        ) from error
    finally:
        os.close(root)


def open_root(directory: str) -> int:
    """A descriptor of a root directory, to resolve from."""
    return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


@contextlib.contextmanager
def opened(root: int, path: str, flags: int) -> Iterator[int]:
    """A descriptor for the block."""
    descriptor = open_beneath(root, path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_regular(root: int, path: str, flags: int) -> int:
    """A descriptor of a regular file; with O_CREAT the directories above it are made too.

    Raises:
        FileRefused: it is a directory, FIFO, socket or device.
    """
    flags |= os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = open_beneath(root, path, flags)
    except FileNotFoundError:
        parent = path.rpartition("/")[0]
        if not flags & os.O_CREAT or not parent:
            raise
        make_directories(root, parent)
        descriptor = open_beneath(root, path, flags)
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        code = errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL
        said = os.strerror(code) if stat.S_ISDIR(kind) else f"it is a {describe(kind)}, not a regular file"
        raise OSError(code, said, path)
    os.set_blocking(descriptor, True)
    return descriptor


def make_directories(root: int, path: str) -> None:
    """Make the directory and those above it that are absent."""
    names = path.split("/")
    for depth in range(1, len(names) + 1):
        try:
            os.close(open_beneath(root, "/".join(names[:depth]), os.O_PATH | os.O_DIRECTORY))
        except FileNotFoundError:
            if names[depth - 1] == "..":
                raise
            with (
                opened(root, "/".join(names[: depth - 1]), os.O_PATH | os.O_DIRECTORY) as parent,
                contextlib.suppress(FileExistsError),  # another was faster
            ):
                os.mkdir(names[depth - 1], dir_fd=parent)


def status(root: int, path: str) -> os.stat_result:
    """The status of what the path names; of a link itself if it is one."""
    with opened(root, path, os.O_PATH | os.O_NOFOLLOW) as descriptor:
        return os.fstat(descriptor)


@contextlib.contextmanager
def parent_of(root: int, path: str) -> Iterator[tuple[int, str]]:
    """The parent's descriptor and the last name, for calls that take `dir_fd`."""
    parent, _, name = path.rpartition("/")
    if name in ("", ".", ".."):
        raise OSError(errno.EBUSY, "this directory cannot be changed under this name", path)
    with opened(root, parent, os.O_PATH | os.O_DIRECTORY) as descriptor:
        yield descriptor, name


def remove(root: int, path: str) -> None:
    """Remove a file, a link or an empty directory."""
    with parent_of(root, path) as (parent, name):
        if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            os.rmdir(name, dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)


def make_directory(root: int, path: str) -> None:
    """Make a directory, and those above it that are absent."""
    above = path.rpartition("/")[0]
    if not path:
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    if above:
        make_directories(root, above)
    with parent_of(root, path) as (parent, name):
        os.mkdir(name, dir_fd=parent)


def rename(root: int, path: str, new_root: int, new_path: str) -> None:
    """Rename, replacing what has the new name as rename(2) does; directories above it are made."""
    above = new_path.rpartition("/")[0]
    with parent_of(root, path) as (parent, name):
        os.stat(name, dir_fd=parent, follow_symlinks=False)
        if above:
            make_directories(new_root, above)
        with parent_of(new_root, new_path) as (new_parent, new_name):
            os.rename(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent)


def identity(descriptor: int) -> str:
    """What tells this file from every other that had or will have its name: inode and generation.

    An inode's number is given again as soon as it is free; the kernel's file handle, where the file
    system has one, also holds the number's generation.
    """
    try:
        handle = at.handle(descriptor)
    except OSError:
        handle = b""
    shown = f"{int.from_bytes(handle[:4], sys.byteorder):x}:{handle[4:].hex()}" if handle else ""
    return f"{os.fstat(descriptor).st_ino}/{shown}"


_KINDS: Final = (
    (stat.S_ISREG, "file"),
    (stat.S_ISDIR, "directory"),
    (stat.S_ISLNK, "link"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
)


def describe(mode: int) -> str:
    """The kind of a file in one word."""
    return next((name for test, name in _KINDS if test(mode)), "device")
