"""Calls of the kernel on files that Python's `os` lacks or gives only in part.

They work on descriptors and on names relative to them, and raise `OSError` with what the kernel said. Buffers
belong to a thread each, so that threads need not wait for each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import threading
from collections.abc import Iterator
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_SYS_GETDENTS64: Final = {"x86_64": 217}.get(os.uname().machine, 61)
_SYS_PIDFD_GETFD: Final = 438
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_HANDLE_BYTES: Final = 128  # MAX_HANDLE_SZ
_ENTRIES_BYTES: Final = 65_536
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h

RENAME_EXCHANGE: Final = 2
TIME_NOW: Final = (1 << 30) - 1
TIME_OMIT: Final = (1 << 30) - 2


class _Handle(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_uint),
        ("type", ctypes.c_int),
        ("data", ctypes.c_char * _HANDLE_BYTES),
    )


class _Buffers(threading.local):
    """What the kernel writes into, for one thread."""

    def __init__(self) -> None:
        self.handle = _Handle()
        self.handle_at = ctypes.byref(self.handle)
        self.view = memoryview(self.handle).cast("B")
        self.mount = ctypes.c_int()
        self.mount_at = ctypes.byref(self.mount)
        self.entries = ctypes.create_string_buffer(_ENTRIES_BYTES)
        self.entries_view = memoryview(self.entries).cast("B")


_buffers = _Buffers()


def handle(directory: int, name: bytes = b"") -> bytes:
    """The kernel's handle of a file, which holds its number and that number's generation.

    Args:
        directory: a descriptor; of the file itself if there is no name.
        name: a name in it, which is not followed if it is a link.

    Returns:
        Type and handle; empty if the file system has none.
    """
    buffers = _buffers
    buffers.handle.bytes = _HANDLE_BYTES
    flags = 0 if name else _AT_EMPTY_PATH
    if _libc.name_to_handle_at(directory, name, buffers.handle_at, buffers.mount_at, flags):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.EOVERFLOW):
            return b""
        raise OSError(code, os.strerror(code), name)
    return bytes(buffers.view[4 : 8 + buffers.handle.bytes])


def set_times(path: str, accessed: tuple[int, int], modified: tuple[int, int]) -> None:
    """Set both times of a file, each as seconds and nanoseconds, TIME_NOW or TIME_OMIT in their place."""
    times = struct.pack("=4q", *accessed, *modified)
    if _libc.utimensat(_AT_FDCWD, os.fsencode(path), times, 0):
        _raise(path)


def rename(directory: int, name: bytes, new_directory: int, new_name: bytes, flags: int = 0) -> None:
    """renameat2(2), with flags."""
    if _libc.renameat2(directory, name, new_directory, new_name, flags):
        _raise(name)


def allocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), with all its modes."""
    if _libc.fallocate(descriptor, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        _raise(None)


def punch(descriptor: int, start: int, size: int) -> None:
    """Give back so many bytes from there on, if the file system can; reading them gives zeros."""
    with contextlib.suppress(OSError):
        allocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, start, size)


def entries(directory: int, size: int) -> Iterator[tuple[bytes, int, int, int]]:
    """The next entries of a directory: name, number, kind (DT_*), and the offset behind it for a later seek.

    Args:
        directory: a descriptor that is open for reading, at the offset from which entries are wanted.
        size: about how many bytes of entries to take; each has 24 and more.
    """
    buffers = _buffers
    size = max(300, min(size, _ENTRIES_BYTES))
    count = _libc.syscall(ctypes.c_long(_SYS_GETDENTS64), directory, buffers.entries, ctypes.c_size_t(size))
    if count < 0:
        _raise(None)
    data = bytes(buffers.entries_view[:count])  # a copy, for the thread may read another directory meanwhile
    at = 0
    while at < count:
        number, behind, length, kind = struct.unpack_from("=QqHB", data, at)
        name = data[at + 19 : data.index(b"\0", at + 19)]
        yield name, number, kind, behind
        at += length


def descriptor_of(process: int, descriptor: int) -> int:
    """A descriptor for what another process has open as `descriptor`.

    Raises:
        OSError: it ended (ESRCH), has no such descriptor (EBADF), or is another user's (EPERM).
    """
    opened = os.pidfd_open(process)
    try:
        found: int = _libc.syscall(ctypes.c_long(_SYS_PIDFD_GETFD), opened, descriptor, 0)
        if found < 0:
            _raise(None)
        return found
    finally:
        os.close(opened)


def _raise(name: object) -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), name)
