"""The cloud as a file system: a handler for each operation of the kernel.

A handler takes a request apart, asks the tree whose node it is about, and packs the answer; what the kernel
has been told stands in the table. The kernel checks permissions (`default_permissions`), and keeps what it
was told of names and attributes for MOUNT_VALID_S. Handlers run in any thread of any worker.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from typing import Final

from virgo.clock import wall_ms
from virgo.files.mount.listing import Listing
from virgo.files.mount.shown import NOTHING, Shown, attributes_out, entry_out
from virgo.files.mount.table import top, tree_of
from virgo.files.mount.tree import Tree
from virgo.files.posix import Found, Owner, Settings
from virgo.kernel import at
from virgo.kernel.fuse import protocol
from virgo.kernel.fuse.protocol import Can, Change, Operation
from virgo.kernel.fuse.serving import Handler, Request
from virgo.limits import MOUNT_RELEASE_S

WANTED: Final = (
    Can.ASYNC_READ | Can.ATOMIC_O_TRUNC | Can.EXPLICIT_INVAL_DATA | Can.DO_READDIRPLUS | Can.READDIRPLUS_AUTO
    | Can.ASYNC_DIO | Can.PARALLEL_DIROPS | Can.CACHE_SYMLINKS | Can.HANDLE_KILLPRIV_V2 | Can.ABORT_ERROR
    | Can.DIRECT_IO_ALLOW_MMAP | Can.PASSTHROUGH
)  # fmt: skip
_NODE: Final = struct.Struct("=Q")
_COPY_BYTES_MAX: Final = 1 << 30  # what one answer can count
_SETS_ID: Final = stat.S_ISUID | stat.S_ISGID
_OPEN_FLAGS: Final = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_NOATIME
_DIRECTORY_MODE: Final = stat.S_IFDIR | 0o755


class FileSystem:
    """See the module. One of each worker."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown
        self._table = shown.table
        self._listing = Listing(shown)
        self._begun = wall_ms() // 1000

    def __repr__(self) -> str:
        return f"<FileSystem {self._shown!r}>"

    def handlers(self) -> dict[int, Handler]:
        """All handlers by operation."""
        return self._listing.handlers() | self._of_names() | self._of_files()

    def _of_names(self) -> dict[int, Handler]:
        return {
            Operation.LOOKUP: self._lookup,
            Operation.FORGET: self._forget,
            Operation.BATCH_FORGET: self._forget_many,
            Operation.GETATTR: self._getattr,
            Operation.SETATTR: self._setattr,
            Operation.READLINK: lambda request: self._shown.tree(request.node).target(request.node),
            Operation.SYMLINK: self._symlink,
            Operation.MKNOD: self._mknod,
            Operation.MKDIR: self._mkdir,
            Operation.UNLINK: lambda request: self._remove(request, directory=False),
            Operation.RMDIR: lambda request: self._remove(request, directory=True),
            Operation.RENAME: self._rename,
            Operation.RENAME2: self._rename,
            Operation.LINK: self._link,
            Operation.STATFS: self._statfs,
            Operation.SETXATTR: self._setxattr,
            Operation.GETXATTR: self._getxattr,
            Operation.LISTXATTR: self._listxattr,
            Operation.REMOVEXATTR: self._removexattr,
        }

    def _of_files(self) -> dict[int, Handler]:
        return {
            Operation.OPEN: self._open,
            Operation.CREATE: self._create,
            Operation.READ: self._read,
            Operation.WRITE: self._write,
            Operation.RELEASE: self._release,
            Operation.FSYNC: self._fsync,
            Operation.FALLOCATE: self._fallocate,
            Operation.LSEEK: self._lseek,
            Operation.COPY_FILE_RANGE: lambda request: protocol.WRITE_OUT.pack(self._copy(request), 0),
            Operation.COPY_FILE_RANGE_64: lambda request: protocol.COPY_OUT.pack(self._copy(request)),
        }

    # --- what the kernel is told --------------------------------------------------------------

    def _lookup(self, request: Request) -> bytes:
        name = request.names()[0]
        number = self._shown.top(request.node, name)
        if number is not None:
            return entry_out(top(number), self._shown.tree(top(number)).attributes(top(number)))
        if request.node == protocol.ROOT:
            raise OSError(errno.ENOENT, "")
        try:
            found = self._shown.tree(request.node).look(request.node, name)
        except FileNotFoundError:
            return NOTHING
        return self._told(request, name, found)

    def _told(self, request: Request, name: bytes, found: Found) -> bytes:
        """The entry of a name in the request's directory, of which the kernel knows from now on."""
        node = self._table.learn(request.node, name, found.identity)
        request.undo = lambda: self._table.forget(((node, 1),))
        return entry_out(node, found.attributes)

    def _forget(self, request: Request) -> None:
        self._table.forget(((request.node, protocol.FORGET_IN.unpack_from(request.body)[0]),))

    def _forget_many(self, request: Request) -> None:
        count, _ = protocol.BATCH_FORGET_IN.unpack_from(request.body)
        body = request.body[protocol.BATCH_FORGET_IN.size :][: count * protocol.FORGET_ONE.size]
        self._table.forget(protocol.FORGET_ONE.iter_unpack(body))

    # --- attributes ---------------------------------------------------------------------------

    def _getattr(self, request: Request) -> bytes:
        node = request.node
        if node == protocol.ROOT:
            return attributes_out(node, self._mounted())
        return attributes_out(node, self._shown.tree(node).attributes(node))

    def _mounted(self) -> bytes:
        """Attributes of the mounted directory itself."""
        times = (self._begun, self._begun, self._begun, 0, 0, 0)
        owner = (2 + len(self._shown.nodes), os.getuid(), os.getgid())
        return protocol.ATTRIBUTES.pack(protocol.ROOT, 0, 0, *times, _DIRECTORY_MODE, *owner, 0, 4096, 0)

    def _setattr(self, request: Request) -> bytes:
        valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = (
            protocol.SETATTR_IN.unpack_from(request.body)
        )
        wanted = Settings(
            mode=mode if valid & Change.MODE else None,
            user=uid if valid & Change.UID else None,
            group=gid if valid & Change.GID else None,
            size=size if valid & Change.SIZE else None,
            accessed=_time(valid, Change.ATIME, Change.ATIME_NOW, (atime, atime_ns)),
            modified=_time(valid, Change.MTIME, Change.MTIME_NOW, (mtime, mtime_ns)),
            drop_privileges=bool(valid & Change.KILL_PRIVILEGES),
        )
        tree = self._shown.tree(request.node)
        if (wanted.mode or 0) & _SETS_ID:
            self._await_writers(tree, request.node)
        return attributes_out(request.node, tree.change(request.node, wanted))

    @staticmethod
    def _await_writers(tree: Tree, node: int) -> None:
        """Let those close the file who write to it without our knowledge; the kernel tells of it late."""
        deadline = time.monotonic() + MOUNT_RELEASE_S
        while not tree.files.may_be_privileged(node):
            if time.monotonic() > deadline:
                raise OSError(errno.ETXTBSY, "")
            time.sleep(0.001)

    def _statfs(self, request: Request) -> bytes:
        if request.node == protocol.ROOT:
            return protocol.STATFS_OUT.pack(0, 0, 0, 0, 0, 4096, 255, 4096, 0)
        return self._shown.tree(request.node).statistics(request.node)

    def _setxattr(self, request: Request) -> bytes:
        size, flags = protocol.SETXATTR_IN.unpack_from(request.body)
        name, _, rest = bytes(request.body[protocol.SETXATTR_IN.size :]).partition(b"\0")
        self._shown.tree(request.node).set_extended(request.node, name, rest[:size], flags)
        return b""

    def _getxattr(self, request: Request) -> bytes:
        size, _ = protocol.GETXATTR_IN.unpack_from(request.body)
        name = request.names(protocol.GETXATTR_IN.size)[0]
        if request.node == protocol.ROOT:
            raise OSError(errno.ENODATA, "")
        return _sized(self._shown.tree(request.node).get_extended(request.node, name), size)

    def _listxattr(self, request: Request) -> bytes:
        size, _ = protocol.GETXATTR_IN.unpack_from(request.body)
        if request.node == protocol.ROOT:
            return _sized(b"", size)
        names = self._shown.tree(request.node).extended(request.node)
        return _sized(b"".join([name + b"\0" for name in names]), size)

    def _removexattr(self, request: Request) -> bytes:
        self._shown.tree(request.node).remove_extended(request.node, request.names()[0])
        return b""

    # --- names --------------------------------------------------------------------------------

    def _symlink(self, request: Request) -> bytes:
        name, target = request.names()
        tree = self._shown.free(request.node, name)
        return self._told(request, name, tree.make_link(request.node, name, target, _owner(request)))

    def _mknod(self, request: Request) -> bytes:
        mode, packed, _, _ = protocol.MKNOD_IN.unpack_from(request.body)
        name = request.names(protocol.MKNOD_IN.size)[0]
        tree = self._shown.free(request.node, name)
        number = protocol.device_in(packed)
        return self._told(request, name, tree.make_node(request.node, name, mode, number, _owner(request)))

    def _mkdir(self, request: Request) -> bytes:
        mode, _ = protocol.MKDIR_IN.unpack_from(request.body)
        name = request.names(protocol.MKDIR_IN.size)[0]
        tree = self._shown.free(request.node, name)
        return self._told(request, name, tree.make_directory(request.node, name, mode, _owner(request)))

    def _link(self, request: Request) -> bytes:
        (node,) = protocol.LINK_IN.unpack_from(request.body)
        name = request.names(protocol.LINK_IN.size)[0]
        tree = self._shown.free(request.node, name)
        if tree_of(node) != tree.number:
            raise OSError(errno.EXDEV, "")
        return self._told(request, name, tree.link(node, request.node, name))

    def _remove(self, request: Request, *, directory: bool) -> bytes:
        name = request.names()[0]
        self._shown.taken(request.node, name).remove(request.node, name, directory=directory)
        self._table.unbind(request.node, name)
        return b""

    def _rename(self, request: Request) -> bytes:
        layout, flags = protocol.RENAME_IN, 0
        if request.operation == Operation.RENAME2:
            layout = protocol.RENAME2_IN
            flags = layout.unpack_from(request.body)[1]
        parent = layout.unpack_from(request.body)[0]
        name, new_name = request.names(layout.size)
        tree = self._shown.taken(request.node, name)
        if self._shown.taken(parent, new_name) is not tree:
            raise OSError(errno.EXDEV, "")
        tree.rename(request.node, name, parent, new_name, flags)
        swap = bool(flags & at.RENAME_EXCHANGE)
        self._table.rename(request.node, name, parent, new_name, swap=swap)
        return b""

    # --- open files ---------------------------------------------------------------------------

    def _open(self, request: Request) -> bytes:
        flags, how = protocol.OPEN_IN.unpack_from(request.body)
        node, tree = request.node, self._shown.tree(request.node)
        handle = tree.open(node, flags & _OPEN_FLAGS, drop=bool(how & protocol.OPEN_KILL_PRIVILEGES))
        answer = tree.files.opened(node, flags, handle)
        request.undo = lambda: tree.files.release(node)
        return answer

    def _create(self, request: Request) -> bytes:
        flags, mode, _, _ = protocol.CREATE_IN.unpack_from(request.body)
        name = request.names(protocol.CREATE_IN.size)[0]
        tree = self._shown.free(request.node, name)
        wanted = flags & (_OPEN_FLAGS | os.O_EXCL)
        found, handle = tree.create(request.node, name, wanted, mode, _owner(request))
        entry = self._told(request, name, found)
        node = _NODE.unpack_from(entry)[0]
        answer = entry + tree.files.opened(node, flags, handle)

        def undo() -> None:
            tree.files.release(node)
            self._table.forget(((node, 1),))

        request.undo = undo
        return answer

    def _release(self, request: Request) -> bytes:
        self._shown.tree(request.node).files.release(request.node)
        return b""

    def _read(self, request: Request) -> bytes:
        _, offset, size, *_ = protocol.READ_IN.unpack_from(request.body)
        return self._shown.tree(request.node).files.read(request.node, offset, size)

    def _write(self, request: Request) -> bytes:
        _, offset, size, how, _, flags, _ = protocol.WRITE_IN.unpack_from(request.body)
        data = request.body[protocol.WRITE_IN.size :][:size]
        append, drop = bool(flags & os.O_APPEND), bool(how & protocol.WRITE_KILL_PRIVILEGES)
        files = self._shown.tree(request.node).files
        return protocol.WRITE_OUT.pack(files.write(request.node, offset, data, append=append, drop=drop), 0)

    def _fsync(self, request: Request) -> bytes:
        _, flags, _ = protocol.FSYNC_IN.unpack_from(request.body)
        data_only = bool(flags & protocol.FSYNC_DATA_ONLY)
        self._shown.tree(request.node).files.sync(request.node, data_only=data_only)
        return b""

    def _fallocate(self, request: Request) -> bytes:
        _, offset, length, mode, _ = protocol.FALLOCATE_IN.unpack_from(request.body)
        self._shown.tree(request.node).files.allocate(request.node, mode, offset, length)
        return b""

    def _lseek(self, request: Request) -> bytes:
        _, offset, whence, _ = protocol.LSEEK_IN.unpack_from(request.body)
        found = self._shown.tree(request.node).files.seek(request.node, offset, whence)
        return protocol.LSEEK_OUT.pack(found)

    def _copy(self, request: Request) -> int:
        _, offset, target, _, target_offset, length, _ = protocol.COPY_FILE_RANGE_IN.unpack_from(request.body)
        tree = self._shown.tree(request.node)
        if tree_of(target) != tree.number:
            raise OSError(errno.EXDEV, "")
        length = min(length, _COPY_BYTES_MAX)
        return tree.files.copy(request.node, offset, target, target_offset, length)


def _owner(request: Request) -> Owner:
    return Owner(request.uid, request.gid)


def _time(valid: int, given: Change, now: Change, value: tuple[int, int]) -> tuple[int, int] | None:
    if valid & now:
        return 0, at.TIME_NOW
    return value if valid & given else None


def _sized(value: bytes, size: int) -> bytes:
    """An extended attribute for who has room for so much; without room, how much it takes."""
    if not size:
        return protocol.XATTR_OUT.pack(len(value), 0)
    if len(value) > size:
        raise OSError(errno.ERANGE, "")
    return value
