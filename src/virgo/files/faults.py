"""What the kernel says, as VIRGO's errors: what was attempted, on what, why, and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Final

from virgo.errors import Busy, DiskFull, FileMissing, FileRefused, FileThere, VirgoError

_HINTS: Final = {
    errno.EISDIR: "It is a directory; name a file in it, or list it with FILES.LIST.",
    errno.ENOTDIR: "A part of the path in front of its last name is a file.",
    errno.EACCES: "The node's user may not; see the permissions of the directory on its node.",
    errno.EPERM: "The node's user may not; see the permissions of the directory on its node.",
    errno.EROFS: "The directory is exported or mounted read-only.",
    errno.ENOTEMPTY: "Remove what is in the directory first.",
    errno.ELOOP: "Links lead in a circle, or a link is not followed here.",
    errno.ENAMETOOLONG: "Shorten the path.",
    errno.EXDEV: "The two lie on different disks or nodes; copy, then remove the old one.",
    errno.EFBIG: "The position is beyond what the node's file system can hold.",
    errno.EBUSY: "It is in use, or it is a root.",
    errno.EIO: "The disk of the node failed; see its kernel log.",
    errno.ETXTBSY: "A program runs from this file.",
}
_OTHER_HINT: Final = "The name in brackets is the kernel's: `man 3 errno`, and the log of the file's node."


def translate(error: OSError, attempt: str) -> VirgoError:
    """The error for an attempt, `open '/n1/x'` for example."""
    code = error.errno or 0
    said = error.strerror or os.strerror(code)
    name = errno.errorcode.get(code, str(code))
    if code == errno.ENOENT:
        return FileMissing(f"{attempt}: no such file or directory")
    if code == errno.EEXIST:
        return FileThere(f"{attempt}: it exists already")
    if code in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{attempt}: {said} ({name})")
    if code in (errno.EMFILE, errno.ENFILE):
        return Busy(f"{attempt}: {said} ({name})", hint="Raise the node's limit of open files (ulimit -n).")
    return FileRefused(f"{attempt}: {said} ({name})", hint=_HINTS.get(code, _OTHER_HINT))


@contextlib.contextmanager
def translating(attempt: str) -> Iterator[None]:
    """Raise the kernel's errors of the block as VIRGO's."""
    try:
        yield
    except VirgoError:
        raise
    except OSError as error:
        raise translate(error, attempt) from error
