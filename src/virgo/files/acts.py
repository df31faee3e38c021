"""What a node does with its files for those who have mounted them elsewhere: the far side of `mount.remote`.

An act is a name, and arguments in MessagePack; so is the answer. A file is named by its path below a root,
by its identity, and by the cloud's descriptor if it is open: what has the path must be what was met under
it, else the descriptor counts, and without one the act is refused with ESTALE, so that the asker looks for
the file anew.

Promises: nothing outside of the root is touched (`beneath`), a name is one name, and arguments of another
type than an act takes are BadArgument. Errors of the kernel arrive with their errno. An act may change
owners and make devices, so only nodes and administrators may ask for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from virgo.errors import BadArgument
from virgo.files import beneath, posix
from virgo.files.faults import translating
from virgo.files.local import LocalFiles
from virgo.files.posix import Found, Owner, Settings
from virgo.kernel import at
from virgo.limits import FILE_ACT_ENTRIES_BYTES_MAX, FILE_NAME_BYTES_MAX, PATH_BYTES_MAX

Where = tuple[bytes, bytes, int]  # path, identity (empty for whatever has the path), descriptor or 0
_PATH: Final = os.O_PATH | os.O_NOFOLLOW
_DIRECTORY: Final = _PATH | os.O_DIRECTORY
_OPEN_FLAGS: Final = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_NOATIME


@dataclass(frozen=True, slots=True)
class _Act:
    run: Callable[..., Any]
    decoder: msgspec.msgpack.Decoder[tuple[Any, ...]]
    changes: bool


class Acts:
    """See the module.

    Args:
        local: this node's files.
        keeps_owners: new files become those of whoever makes them; else they are this process's.
        umask: this process's, which is not to be heeded: the asker's is.
    """

    def __init__(self, local: LocalFiles, *, keeps_owners: bool, umask: int) -> None:
        self._local = local
        self._keeps_owners = keeps_owners
        self._umask = umask
        self._acts = {
            name: _Act(run, _decoder(*kinds), changes) for name, run, changes, *kinds in self._table()
        }

    def __repr__(self) -> str:
        return f"<Acts on {self._local!r}>"

    def _table(self) -> list[tuple[Any, ...]]:
        """Name, function, whether it changes anything, types of its arguments."""
        return [
            ("LOOK", self._look, False, bytes, bytes),
            ("ATTRIBUTES", self._attributes, False, Where),
            ("CHANGE", self._change, True, Where, Settings),
            ("MAKE_NODE", self._make_node, True, bytes, bytes, int, int, Owner),
            ("MAKE_DIRECTORY", self._make_directory, True, bytes, bytes, int, Owner),
            ("MAKE_LINK", self._make_link, True, bytes, bytes, bytes, Owner),
            ("CREATE", self._create, True, bytes, bytes, int, int, Owner),
            ("OPEN", self._open, False, Where, int, bool),
            ("LINK", self._link, True, Where, bytes, bytes),
            ("REMOVE", self._remove, True, bytes, bytes, bool),
            ("RENAME", self._rename, True, bytes, bytes, bytes, bytes, int),
            ("ENTRIES", self._entries, False, Where, int, int, bool),
            ("TARGET", self._target, False, Where),
            ("STATISTICS", self._statistics, False, Where),
            ("EXTENDED", self._extended, False, Where),
            ("GET_EXTENDED", self._get_extended, False, Where, bytes),
            ("SET_EXTENDED", self._set_extended, True, Where, bytes, bytes, int),
            ("REMOVE_EXTENDED", self._remove_extended, True, Where, bytes),
            ("SYNC_DIRECTORY", self._sync_directory, False, Where),
            ("APPEND", self._append, True, int, bytes),
            ("DROP_PRIVILEGES", self._drop_privileges, True, int),
            ("ALLOCATE", self._allocate, True, int, int, int, int),
            ("SEEK", self._seek, False, int, int, int),
            ("COPY", self._copy, True, int, int, int, int, int),
        ]

    def run(self, root: str, name: str, packed: bytes) -> bytes:
        """Do it.

        Args:
            root: name of the root, see `core.Spot`.
            name: of the act.
            packed: its arguments.

        Raises:
            BadArgument: there is no such act, or its arguments are of another kind.
            VirgoError: what the kernel said.
        """
        act = self._acts.get(name)
        if act is None:
            raise BadArgument(f"FILES.AT knows no act {name[:40]!r}", hint="It is for nodes and mounts.")
        try:
            arguments = act.decoder.decode(packed)
        except msgspec.MsgspecError as error:
            raise BadArgument(f"{name}: wrong arguments: {error}", hint="It is for nodes.") from None
        with translating(name.lower()), self._local.root_of(root, change=act.changes) as opened:
            return msgspec.msgpack.encode(act.run(_Root(opened, root), *arguments))

    # --- names --------------------------------------------------------------------------------

    def _look(self, root: _Root, path: bytes, name: bytes) -> Found:
        with root.directory(path) as directory:
            return posix.look(directory, _one(name))

    def _make_node(
        self, root: _Root, path: bytes, name: bytes, mode: int, device: int, owner: Owner
    ) -> Found:
        with root.directory(path) as directory:
            posix.make_node(directory, _one(name), mode, device, self._owner(owner), self._umask)
            return posix.look(directory, name)

    def _make_directory(self, root: _Root, path: bytes, name: bytes, mode: int, owner: Owner) -> Found:
        with root.directory(path) as directory:
            posix.make_directory(directory, _one(name), mode, self._owner(owner), self._umask)
            return posix.look(directory, name)

    def _make_link(self, root: _Root, path: bytes, name: bytes, target: bytes, owner: Owner) -> Found:
        with root.directory(path) as directory:
            posix.make_link(directory, _one(name), target, self._owner(owner), self._umask)
            return posix.look(directory, name)

    def _create(
        self, root: _Root, path: bytes, name: bytes, flags: int, mode: int, owner: Owner
    ) -> tuple[Found, int]:
        with root.directory(path) as directory:
            wanted = flags & (_OPEN_FLAGS | os.O_EXCL)
            file = posix.create(directory, _one(name), wanted, mode, self._owner(owner), self._umask)
        found = posix.look_at(file)
        return found, self._local.keep(root.name, os.fsdecode(_join(path, name)), posix.access_of(file), file)

    def _link(self, root: _Root, where: Where, path: bytes, name: bytes) -> Found:
        with self._reached(root, where) as file, root.directory(path) as directory:
            posix.link(file, directory, _one(name))
            return posix.look(directory, name)

    def _remove(self, root: _Root, path: bytes, name: bytes, directory: bool) -> None:
        with root.directory(path) as above:
            (os.rmdir if directory else os.unlink)(_one(name), dir_fd=above)

    def _rename(
        self, root: _Root, path: bytes, name: bytes, new_path: bytes, new_name: bytes, flags: int
    ) -> None:
        with root.directory(path) as above, root.directory(new_path) as new_above:
            posix.rename(above, _one(name), new_above, _one(new_name), flags)
        old, new = os.fsdecode(_join(path, name)), os.fsdecode(_join(new_path, new_name))
        self._local.table.renamed(root.name, old, root.name, new)

    def _entries(self, root: _Root, where: Where, offset: int, size: int, plus: bool) -> list[Any]:
        with root.opened(where[0], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) as directory:
            _check(directory, where)
            size = min(size, FILE_ACT_ENTRIES_BYTES_MAX)
            return list(posix.entries(directory, offset, size, plus=plus))

    def _sync_directory(self, root: _Root, where: Where) -> None:
        with root.opened(where[0], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) as directory:
            _check(directory, where)
            os.fsync(directory)

    def _owner(self, owner: Owner) -> Owner | None:
        return owner if self._keeps_owners else None

    # --- attributes ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reached(self, root: _Root, where: Where) -> Iterator[int]:
        """A descriptor of the file, opened with O_PATH if it has its path."""
        path, _, descriptor = where
        with contextlib.ExitStack() as stack:
            try:
                found = stack.enter_context(root.opened(path, _PATH))
                _check(found, where)
            except OSError:
                if not descriptor:
                    raise
                found = stack.enter_context(self._local.table.use(descriptor)).descriptor
            yield found

    def _attributes(self, root: _Root, where: Where) -> bytes:
        with self._reached(root, where) as file:
            return posix.look_at(file).attributes

    def _change(self, root: _Root, where: Where, wanted: Settings) -> bytes:
        with self._reached(root, where) as file:
            if wanted.size is not None:
                self._resize(root, where, wanted.size)
            posix.change(file, wanted)
            return posix.look_at(file).attributes

    def _resize(self, root: _Root, where: Where, size: int) -> None:
        if where[2]:
            with self._local.table.use(where[2]) as live:
                if live.entry.flags & os.O_ACCMODE != os.O_RDONLY:
                    os.ftruncate(live.descriptor, size)
                    return
        with root.opened(where[0], os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as file:
            _check(file, where)
            os.ftruncate(file, size)

    def _target(self, root: _Root, where: Where) -> bytes:
        with self._reached(root, where) as file:
            return os.readlink(b"", dir_fd=file)

    def _statistics(self, root: _Root, where: Where) -> bytes:
        with self._reached(root, where) as file:
            return posix.statistics(file)

    def _extended(self, root: _Root, where: Where) -> list[bytes]:
        with self._reached(root, where) as file:
            return [os.fsencode(name) for name in os.listxattr(posix.by_descriptor(file))]

    def _get_extended(self, root: _Root, where: Where, name: bytes) -> bytes:
        with self._reached(root, where) as file:
            return os.getxattr(posix.by_descriptor(file), name)

    def _set_extended(self, root: _Root, where: Where, name: bytes, value: bytes, flags: int) -> None:
        with self._reached(root, where) as file:
            os.setxattr(posix.by_descriptor(file), name, value, flags)

    def _remove_extended(self, root: _Root, where: Where, name: bytes) -> None:
        with self._reached(root, where) as file:
            os.removexattr(posix.by_descriptor(file), name)

    # --- open files ---------------------------------------------------------------------------

    def _open(self, root: _Root, where: Where, flags: int, drop: bool) -> tuple[bytes, int]:
        path = where[0]
        flags &= _OPEN_FLAGS
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            self._local.check_writable(root.name)
        with self._reached(root, where) as found:  # looked at before: to open a FIFO has effects
            if not stat.S_ISREG(os.fstat(found).st_mode):
                raise posix.stale()
            file = posix.open_again(found, flags)
        if drop:
            posix.drop_privileges(file)
        attributes = posix.look_at(file).attributes
        return attributes, self._local.keep(root.name, os.fsdecode(path), posix.access_of(file), file)

    def _append(self, _root: _Root, descriptor: int, data: bytes) -> int:
        """Write at the end, wherever that is by now; the position behind what was written."""
        with self._local.table.use(descriptor) as live:
            written = 0
            while written < len(data):
                written += os.pwritev(live.descriptor, [memoryview(data)[written:]], 0, os.RWF_APPEND)
            return os.fstat(live.descriptor).st_size

    def _drop_privileges(self, _root: _Root, descriptor: int) -> None:
        with self._local.table.use(descriptor) as live:
            posix.drop_privileges(live.descriptor)

    def _allocate(self, _root: _Root, descriptor: int, mode: int, offset: int, length: int) -> None:
        with self._local.table.use(descriptor) as live:
            at.allocate(live.descriptor, mode, offset, length)

    def _seek(self, _root: _Root, descriptor: int, offset: int, whence: int) -> int:
        with self._local.table.use(descriptor) as live:
            own = os.open(posix.by_descriptor(live.descriptor), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.lseek(own, offset, whence)
        finally:
            os.close(own)

    def _copy(
        self, _root: _Root, descriptor: int, offset: int, target: int, target_offset: int, length: int
    ) -> int:
        with self._local.table.use(descriptor) as source, self._local.table.use(target) as sink:
            return os.copy_file_range(source.descriptor, sink.descriptor, length, offset, target_offset)


class _Root:
    """A root that is open for the time of an act."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self.name = name

    @contextlib.contextmanager
    def opened(self, path: bytes, flags: int) -> Iterator[int]:
        """What is at a path below it, which may be longer than the kernel takes at once."""
        with contextlib.ExitStack() as stack:
            above = self._descriptor
            while len(path) >= PATH_BYTES_MAX:
                part = path[: PATH_BYTES_MAX - 1].rpartition(b"/")[0]
                path = path[len(part) + 1 :]
                above = stack.enter_context(beneath.opened(above, os.fsdecode(part), _DIRECTORY))
            yield stack.enter_context(beneath.opened(above, os.fsdecode(path), flags))

    def directory(self, path: bytes) -> contextlib.AbstractContextManager[int]:
        """A directory below it."""
        return self.opened(path, _DIRECTORY)


def _decoder(*kinds: Any) -> msgspec.msgpack.Decoder[tuple[Any, ...]]:
    return msgspec.msgpack.Decoder(tuple[kinds])  # type: ignore[valid-type]


def _check(file: int, where: Where) -> None:
    """Raise ESTALE if it is not the file that was meant."""
    if where[1] and posix.identity_of(file) != where[1]:
        raise posix.stale()


def _one(name: bytes) -> bytes:
    """The name, if it is a single one. Raises BadArgument, OSError if it is too long."""
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise BadArgument(f"{name[:40]!r} is not the name of one file", hint="It is for nodes and mounts.")
    if len(name) > FILE_NAME_BYTES_MAX:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    return name


def _join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name
