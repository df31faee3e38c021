"""/dev/fuse: mounting, further descriptors, files that are passed through, and what the kernel is told.

A file that is passed through is read, written and mapped by the kernel itself: nobody is asked.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path
from typing import Final

from virgo.errors import FileRefused
from virgo.kernel.fuse import protocol

_CLONE: Final = 0x8004E500
_BACKING_OPEN: Final = 0x4010E501
_BACKING_CLOSE: Final = 0x4004E502
_MNT_DETACH: Final = 2
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
SUBTYPE: Final = "fuse.virgo"
_HELPERS: Final = ("fusermount3", "fusermount")

_libc = ctypes.CDLL(None, use_errno=True)


def mount(place: Path, *, shared: bool) -> int:
    """Mount a file system that does not answer yet, and return the descriptor at which it is to be served.

    Args:
        place: an empty directory.
        shared: users other than this one may use it too; the kernel checks permissions by mode and owner.

    Raises:
        FileRefused: the kernel has no FUSE, or does not let this user mount.
    """
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EACCES:
            return _by_helper(place, shared=shared)
        raise FileRefused(
            f"mount {str(place)!r}: /dev/fuse cannot be opened: {error.strerror}",
            hint="`modprobe fuse`; a container needs --device /dev/fuse --cap-add SYS_ADMIN.",
        ) from error
    options = [f"fd={device}", "rootmode=40000", f"user_id={os.getuid()}", f"group_id={os.getgid()}"]
    options += ["default_permissions", *(["allow_other"] if shared else [])]
    flags = 0 if os.geteuid() == 0 else _MS_NOSUID | _MS_NODEV
    if _libc.mount(b"virgo", os.fsencode(place), SUBTYPE.encode(), flags, ",".join(options).encode()):
        code = ctypes.get_errno()
        os.close(device)
        if code == errno.EPERM:
            return _by_helper(place, shared=shared)
        raise FileRefused(
            f"mount {str(place)!r}: {os.strerror(code)} ({errno.errorcode.get(code, code)})",
            hint="It must be a directory that is no mount yet; `virgo umount` takes an old one away.",
        )
    return device


def _by_helper(place: Path, *, shared: bool) -> int:
    """Let fusermount, which may mount for everybody, do it; it sends the descriptor back."""
    helper = next(filter(None, map(shutil.which, _HELPERS)), None)
    if helper is None:
        raise FileRefused(
            f"mount {str(place)!r}: this user may not mount",
            hint="Install fuse3, whose fusermount3 mounts for every user, or mount as root.",
        )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        options = "fsname=virgo,subtype=virgo,default_permissions" + (",allow_other" if shared else "")
        done = subprocess.run(  # noqa: S603 - the helper that was found, with our own words
            [helper, "-o", options, "--", str(place)],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}, pass_fds=[theirs.fileno()],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise FileRefused(
                f"mount {str(place)!r}: {done.stderr.strip() or helper + ' failed'}",
                hint="--private mounts for this user alone; or set user_allow_other in /etc/fuse.conf.",
            )
        descriptors = array.array("i")
        _, found, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(descriptors.itemsize))
    descriptors.frombytes(found[0][2])
    os.set_inheritable(descriptors[0], False)
    return int(descriptors[0])


def unmount(place: Path, *, busy_too: bool = False) -> None:
    """Take the mount away; `busy_too`: also from under those who use it, who then see what they have open.

    Raises:
        OSError: it is no mount (EINVAL), is in use (EBUSY), or this user may not (EPERM).
    """
    if _libc.umount2(os.fsencode(place), _MNT_DETACH if busy_too else 0):
        code = ctypes.get_errno()
        helper = next(filter(None, map(shutil.which, _HELPERS)), None)
        if code != errno.EPERM or helper is None:
            raise OSError(code, os.strerror(code), str(place))
        words = [helper, "-u", *(["-z"] if busy_too else []), "--", str(place)]
        done = subprocess.run(  # noqa: S603 - likewise
            words, capture_output=True, text=True, check=False
        )
        if done.returncode:
            code = errno.EBUSY if "busy" in done.stderr else errno.EPERM
            raise OSError(code, done.stderr.strip(), str(place))


def mounted_at(place: Path) -> int | None:
    """Number of the mount of ours that is there, whoever serves it; looked up without asking that."""
    wanted = str(place)
    for plain, quoted in (("\\", "\\134"), (" ", "\\040"), ("\t", "\\011"), ("\n", "\\012")):
        wanted = wanted.replace(plain, quoted)
    number = None
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    for line in text.splitlines():
        fields = line.split()
        if fields[4] == wanted:  # the last of several lies on top
            ours = fields[fields.index("-") + 1] == SUBTYPE
            number = int(fields[2].partition(":")[2]) if ours else None
    return number


def read_ahead(number: int, kibibytes: int) -> None:
    """Set how far the kernel reads ahead in a mount, see `mounted_at`. Raises OSError: only root may."""
    setting = Path(f"/sys/class/bdi/0:{number}/read_ahead_kb")
    setting.write_text(str(kibibytes), encoding="ascii")


def clone(device: int) -> int:
    """A further descriptor of the same mount, with requests of its own, for another thread or process."""
    further = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(further, _CLONE, struct.pack("=I", device))
    except BaseException:
        os.close(further)
        raise
    return further


def abort(number: int) -> None:
    """End the connection of a mount, see `mounted_at`: whoever waits for an answer gets an error."""
    with contextlib.suppress(FileNotFoundError):
        Path(f"/sys/fs/fuse/connections/{number}/abort").write_text("1", encoding="ascii")


def backing_open(device: int, descriptor: int) -> int:
    """Register an open file as one to be passed through; its number. Raises OSError: EPERM, ELOOP, ..."""
    number: int = _libc.ioctl(device, _BACKING_OPEN, struct.pack("=iIQ", descriptor, 0, 0))
    if number < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return number


def backing_close(device: int, number: int) -> None:
    """Forget a registered file; those who have opened it keep it."""
    if _libc.ioctl(device, _BACKING_CLOSE, struct.pack("=I", number)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def invalidate_node(device: int, node: int, offset: int = 0, length: int = 0) -> bool:
    """Let the kernel forget attributes and, from `offset` on, content (0 for all); False if it knew nothing.

    It waits for reads of that content which are under way, so it must not be called by who answers them.
    """
    return _notify(device, protocol.NOTIFY_INVAL_INODE, protocol.INVAL_INODE_OUT.pack(node, offset, length))


def _notify(device: int, code: int, body: bytes) -> bool:
    try:
        os.write(device, protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size + len(body), code, 0) + body)
    except FileNotFoundError:
        return False
    return True
