"""The messages between the kernel and a file system: numbers, flags and layouts, as of FUSE 7.45.

Source: include/uapi/linux/fuse.h of the kernel, whose names are kept where a name stands for a number. All
integers are of the machine's own order.
"""

from __future__ import annotations

import os
import struct
from enum import IntEnum, IntFlag
from typing import Final

MAJOR: Final = 7
MINOR: Final = 41  # what a reply of ours has; the kernel's may be higher
OPERATIONS: Final = 64  # numbers of operations are below
ROOT: Final = 1  # the node of the directory that is mounted


class Operation(IntEnum):
    """What the kernel asks for."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class Can(IntFlag):
    """What kernel and file system agree on at the start."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    FLOCK_LOCKS = 1 << 10
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    EXPLICIT_INVAL_DATA = 1 << 25
    HANDLE_KILLPRIV_V2 = 1 << 28
    INIT_EXT = 1 << 30
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37


class Opened(IntFlag):
    """How the kernel shall treat a file that was just opened (FOPEN_*)."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    PASSTHROUGH = 1 << 7


class Change(IntFlag):
    """Which attributes SETATTR sets (FATTR_*)."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    HANDLE = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    CTIME = 1 << 10
    KILL_PRIVILEGES = 1 << 11


WRITE_KILL_PRIVILEGES: Final = 1 << 2
OPEN_KILL_PRIVILEGES: Final = 1 << 0
FSYNC_DATA_ONLY: Final = 1 << 0

# --- requests -------------------------------------------------------------------------------
IN_HEADER: Final = struct.Struct("=IIQQIIIHH")  # length opcode unique node uid gid pid extensions -
INIT_IN: Final = struct.Struct("=IIII")  # major minor readahead flags, and of a newer kernel ...
INIT_MORE: Final = struct.Struct("=I")  # ... further flags
# valid - handle size owner atime mtime ctime atimensec mtimensec ctimensec mode - uid gid -
SETATTR_IN: Final = struct.Struct("=IIQQQqqqIIIIIIII")
MKNOD_IN: Final = struct.Struct("=IIII")  # mode rdev umask -
MKDIR_IN: Final = struct.Struct("=II")  # mode umask
RENAME_IN: Final = struct.Struct("=Q")  # new parent
RENAME2_IN: Final = struct.Struct("=QII")  # new parent, flags, -
LINK_IN: Final = struct.Struct("=Q")  # node
OPEN_IN: Final = struct.Struct("=II")  # flags, open flags
CREATE_IN: Final = struct.Struct("=IIII")  # flags mode umask, open flags
RELEASE_IN: Final = struct.Struct("=QIIQ")  # handle flags, release flags, owner
READ_IN: Final = struct.Struct("=QQIIQII")  # handle offset size, read flags, owner flags -
WRITE_IN: Final = struct.Struct("=QQIIQII")  # handle offset size, write flags, owner flags -
FSYNC_IN: Final = struct.Struct("=QII")  # handle flags -
SETXATTR_IN: Final = struct.Struct("=II")  # size flags
GETXATTR_IN: Final = struct.Struct("=II")  # size -
FORGET_IN: Final = struct.Struct("=Q")  # count
BATCH_FORGET_IN: Final = struct.Struct("=II")  # count -
FORGET_ONE: Final = struct.Struct("=QQ")  # node count
FALLOCATE_IN: Final = struct.Struct("=QQQII")  # handle offset length mode -
LSEEK_IN: Final = struct.Struct("=QQII")  # handle offset whence -
# handle offset, node handle offset of the target, length flags
COPY_FILE_RANGE_IN: Final = struct.Struct("=QQQQQQQ")

# --- answers --------------------------------------------------------------------------------
OUT_HEADER: Final = struct.Struct("=IiQ")  # length -errno unique
# ino size blocks atime mtime ctime, their nanoseconds, mode nlink uid gid rdev blksize flags
ATTRIBUTES: Final = struct.Struct("=QQQqqqIIIIIIIIII")
ENTRY_OUT: Final = struct.Struct("=QQQQII")  # node generation, valid: name attributes, nanoseconds of both
ATTR_OUT: Final = struct.Struct("=QII")  # valid, nanoseconds, -
OPEN_OUT: Final = struct.Struct("=QIi")  # handle flags backing
WRITE_OUT: Final = struct.Struct("=II")  # size -
STATFS_OUT: Final = struct.Struct("=QQQQQIIII24x")  # blocks free available files free; bsize namelen frsize -
XATTR_OUT: Final = struct.Struct("=II")  # size -
LSEEK_OUT: Final = struct.Struct("=Q")  # offset
COPY_OUT: Final = struct.Struct("=Q")  # count
DIRENT: Final = struct.Struct("=QQII")  # ino, offset behind it, length of the name, kind
# major minor readahead flags, background congestion, write, granularity of times, pages, alignment, more
# flags, depth of stacked file systems, deadline of requests, unused
INIT_OUT: Final = struct.Struct("=IIIIHHIIHHIIH22x")

# --- notices --------------------------------------------------------------------------------
NOTIFY_INVAL_INODE: Final = 2
INVAL_INODE_OUT: Final = struct.Struct("=Qqq")  # node offset length


def attributes(status: os.stat_result) -> bytes:
    """A status as the kernel takes it."""
    atime, atime_ns = divmod(status.st_atime_ns, 1_000_000_000)
    mtime, mtime_ns = divmod(status.st_mtime_ns, 1_000_000_000)
    ctime, ctime_ns = divmod(status.st_ctime_ns, 1_000_000_000)
    return ATTRIBUTES.pack(
        status.st_ino, status.st_size, status.st_blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        status.st_mode, status.st_nlink, status.st_uid, status.st_gid,
        device_out(status.st_rdev) if status.st_rdev else 0, status.st_blksize, 0,
    )  # fmt: skip


_MODE: Final = struct.Struct("=I")
_MODE_AT: Final = 60


def mode_of(packed: bytes) -> int:
    """Kind and permissions in packed attributes."""
    return int(_MODE.unpack_from(packed, _MODE_AT)[0])


def version_of(packed: bytes) -> bytes:
    """What changes in packed attributes when the content does: size and time."""
    return packed[8:16] + packed[32:40] + packed[52:56]


def device_out(device: int) -> int:
    """A device's number in the 32 bits that the protocol has for it."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & ~0xFF) << 12


def device_in(packed: int) -> int:
    """The device's number as `os.mknod` takes it: the inverse of `device_out`."""
    return os.makedev(packed >> 8 & 0xFFF, packed & 0xFF | packed >> 12 & 0xFFF00)
