"""A segment: the bytes of a shared region as one preallocated file, which its users map.

The file has the region's bytes from 0 on, and behind them, in a page of its own, whose they are (store, id,
size) and how long the value is. Whoever has its descriptor has the region.

Promises:

- All its pages are there before anybody hears of it, so no access is a SIGBUS.
- `write` takes place whole or not at all, also if the writer is killed midway, and `read` gives the bytes of
  one moment between two writes: before the first byte is changed all that will be lies in a file beside it,
  the redo, and whoever comes next finishes what is begun.
- The right to write in place is one holder's at a time. It is a lock of the kernel's, which falls with the
  process; threads that hold leases of their own exclude each other too, and a forked child has none.
- Nobody waits without end for a process that is stopped: Busy comes first. Who maps it maps whole values too:
  what a killed writer had begun is finished first.

Does not promise what memory does not: whoever writes in place is seen at it, and killed midway leaves what it
wrote. Does not know which regions there are: that is the node's business.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import time
from typing import Final, NamedTuple

from virgo.errors import Busy, DiskFull, FileRefused, NotRunning, VirgoError
from virgo.limits import MEMORY_SEGMENT_WAIT_S, MiB
from virgo.memory import core
from virgo.memory.descriptors import opened, shut

_PAGE: Final = mmap.PAGESIZE
_MAGIC: Final = b"VIRGOSEG"
_HEAD: Final = struct.Struct("<8s16sQQ")  # magic, store, id, size
_STATE: Final = struct.Struct("<QQQQ")  # see State
_REDO: Final = struct.Struct("<QQQQ")  # offset, count, from where on zeros are before it, length afterwards
_FLOCK: Final = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, length, pid
_LOCKS_AT: Final = 1 << 62  # behind every file
# Who reads or writes waits for the content in the gate, so that others that come again and again do not keep
# him out; who writes in place has the lease alone, who writes otherwise shares it for as long as that takes.
_GATE, _CONTENT, _LEASE = range(3)
_POLL_S_MIN = 0.00002
_CONTENT_POLL_S_MAX, _LEASE_POLL_S_MAX = 0.0002, 0.002  # whoever came first must not look more seldom
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
_HINT: Final = "Make room there, or set memory.shared_directory to a place that has some."


class State(NamedTuple):
    """What changes of a segment beside its bytes.

    Attributes:
        length: of the value.
        used: bytes that were ever part of one; behind them are zeros.
        redo: whether the redo is to be finished.
        holder: the process that had the lease last.
    """

    length: int = 0
    used: int = 0
    redo: int = 0
    holder: int = 0

    def after(self, length: int) -> State:
        """Once the value is so long."""
        return self._replace(length=length, used=max(self.used, length), redo=0)


def total_bytes(size: int) -> int:
    """What the file of a region of that size takes."""
    return -(-size // _PAGE) * _PAGE + _PAGE


def refused(path: str, error: OSError) -> VirgoError:
    """The typed error for one of the file system."""
    if error.errno in _NO_ROOM:
        return DiskFull(f"there is no room for {path}: {error.strerror}", hint=_HINT)
    name = errno.errorcode.get(error.errno or errno.EIO, "EIO")
    return FileRefused(f"{path}: {error.strerror} ({name})", hint=_HINT)


class Taken(Busy):
    """Somebody reads or writes it now: that passes, unless he is stopped."""


class Segment:
    """One segment, by name: its file is opened for each use. Safe for use from several threads.

    Args:
        directory: of the segments of a store.
        identity: of the store, in hexadecimal.
        identifier: of the region.
        size: declared bytes.

    Each method raises NotRunning if there is no such segment here, and FileRefused or DiskFull if the file
    system refuses.
    """

    __slots__ = ("_end", "_head", "identifier", "path", "size")

    def __init__(self, directory: str, identity: str, identifier: int, size: int) -> None:
        self.identifier = identifier
        self.size = size
        self.path = f"{directory}/{identifier:016x}"
        self._head = _HEAD.pack(_MAGIC, bytes.fromhex(identity), identifier, size)
        self._end = total_bytes(size) - _PAGE

    def __repr__(self) -> str:
        return f"<Segment {self.path} of {self.size} bytes>"

    # --- life ---------------------------------------------------------------------------------

    def create(self, *, full: bool = False) -> None:
        """Make it, whole or not at all: without a value, or full of zeros."""
        state = State(self.size, self.size) if full else State()
        try:
            descriptor = opened(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                os.posix_fallocate(descriptor, 0, self._end + _PAGE)
                os.pwrite(descriptor, self._head + _STATE.pack(*state), self._end)
            except BaseException:
                os.unlink(self.path)  # noqa: PTH108 - a path of the hot path is text
                raise
            finally:
                shut(descriptor)
        except OSError as error:
            raise refused(self.path, error) from error

    def remove(self) -> None:
        """Remove the file, if it is there; who has it mapped keeps the pages."""
        for path in (self.path, self.redo_path):
            try:
                os.unlink(path)  # noqa: PTH108
            except FileNotFoundError:
                continue
            except OSError as error:
                raise refused(path, error) from error

    def exists(self) -> bool:
        """Whether there is a file of its name."""
        return os.path.exists(self.path)  # noqa: PTH110

    @property
    def redo_path(self) -> str:
        """Where a writer lays down what it is about to write."""
        return f"{self.path}.redo"

    def open(self, *, write: bool = False) -> int:
        """A descriptor of the file, to be closed by `shut` or by the caller's own means."""
        try:
            descriptor = opened(self.path, os.O_RDWR if write else os.O_RDONLY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS):
                raise NotRunning(f"{self.path} cannot be opened here: {error.strerror}") from error
            raise refused(self.path, error) from error
        try:
            if os.pread(descriptor, _HEAD.size, self._end) != self._head:
                raise NotRunning(f"{self.path} is not the segment of region {self.identifier:#x}")
        except BaseException:
            shut(descriptor)
            raise
        return descriptor

    def map(self, *, write: bool = False) -> mmap.mmap:
        """The bytes, mapped; they stay so until the last user of the mapping is gone. Raises Busy."""
        self.settle()
        descriptor = self.open(write=write)
        try:
            rights = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
            return mmap.mmap(descriptor, self.size, flags=mmap.MAP_SHARED, prot=rights)
        except OSError as error:
            raise refused(self.path, error) from error
        finally:
            shut(descriptor)

    def sync(self) -> None:
        """Have it on disk, if it lies on one."""
        descriptor = self.open()
        try:
            os.fsync(descriptor)
        finally:
            shut(descriptor)

    # --- reads and writes ---------------------------------------------------------------------

    def length(self) -> int:
        """Of the value."""
        descriptor = self.open()
        try:
            return self._state(descriptor).length
        finally:
            shut(descriptor)

    def read(
        self,
        offset: int = 0,
        count: int | None = None,
        *,
        wait_s: float | None = None,
        bytes_max: int | None = None,
    ) -> bytes:
        """Bytes of the value, of one moment. Raises BadArgument, Busy, TooLarge (see `bytes_max`)."""
        core.check_part(offset, count, self.size, self.identifier)
        while True:
            descriptor = self.open()
            try:
                self._enter(descriptor, fcntl.F_RDLCK, wait_s)
                state = self._state(descriptor)
                if not state.redo:
                    there = max(0, state.length - offset)
                    wanted = there if count is None else min(there, count)
                    core.check_answer(wanted, bytes_max, self.identifier)
                    return _pread(descriptor, offset, wanted)
            finally:
                shut(descriptor)
            self.finish(wait_s)

    def write(
        self, data: bytes | memoryview, offset: int | None = None, *, wait_s: float | None = None
    ) -> None:
        """Replace the value, or write over a part of it. Raises TooLarge, BadArgument, Busy."""
        count, begin = len(data), offset or 0
        if offset is None:
            core.check_fits(count, self.size, self.identifier)
        else:
            core.check_span(count, offset, self.size, self.identifier)
            if not count:
                return
        descriptor = self.open(write=True)
        try:
            if not _lock(descriptor, _LEASE, fcntl.F_RDLCK):
                raise self._busy(descriptor)
            self._enter(descriptor, fcntl.F_WRLCK, wait_s)
            state = self._settled(descriptor)
            length = count if offset is None else max(state.length, begin + count)
            if length == state.length and begin % _PAGE + count <= _PAGE:
                _pwrite(descriptor, data, begin)  # within a page the kernel is not interrupted
                return
            self._lay_down(_REDO.pack(begin, count, state.length, length), data)
            self._change(descriptor, state._replace(redo=1))
            _fill(descriptor, state.length, min(begin, state.used))
            _pwrite(descriptor, data, begin)
            self._change(descriptor, state.after(length))
            os.unlink(self.redo_path)  # noqa: PTH108
        except OSError as error:
            raise refused(self.path, error) from error
        finally:
            shut(descriptor)

    def settle(self) -> None:
        """Finish what a killed writer had begun, if one had; wait for one that is at it. Raises Busy."""
        descriptor = self.open()
        try:
            pending = self._state(descriptor).redo
        finally:
            shut(descriptor)
        if pending:
            with contextlib.suppress(NotRunning):  # who may only read sees what is there
                self.finish()

    def finish(self, wait_s: float | None = None) -> None:
        """Finish what a writer that was killed had begun, and remove what it left. Raises Busy."""
        descriptor = self.open(write=True)
        try:
            self._enter(descriptor, fcntl.F_WRLCK, wait_s)
            self._settled(descriptor)
            if os.path.exists(self.redo_path):  # noqa: PTH110
                os.unlink(self.redo_path)  # noqa: PTH108
        except OSError as error:
            raise refused(self.path, error) from error
        finally:
            shut(descriptor)

    # --- the lease ----------------------------------------------------------------------------

    def lease(self, timeout_s: float) -> int:
        """A descriptor that has the right to write in place, until it is `shut`. Raises Busy."""
        deadline = time.monotonic() + timeout_s
        patience = time.monotonic() + max(timeout_s, MEMORY_SEGMENT_WAIT_S)
        descriptor = self.open(write=True)
        try:
            delay = _POLL_S_MIN
            while not _lock(descriptor, _LEASE, fcntl.F_WRLCK):
                # Who shares it is just writing, which takes moments.
                if time.monotonic() > (deadline if _leased(descriptor) else patience):
                    raise self._busy(descriptor)
                time.sleep(delay)
                delay = min(delay * 2, _LEASE_POLL_S_MAX)
            self._enter(descriptor, fcntl.F_WRLCK)
            state = self._settled(descriptor)
            _fill(descriptor, state.length, state.used)
            self._change(descriptor, state.after(self.size)._replace(holder=os.getpid()))
            _lock(descriptor, _CONTENT, fcntl.F_UNLCK)
        except OSError as error:
            shut(descriptor)
            raise refused(self.path, error) from error
        except BaseException:
            shut(descriptor)
            raise
        return descriptor

    # --- within -------------------------------------------------------------------------------

    def _enter(self, descriptor: int, kind: int, wait_s: float | None = None) -> None:
        """Have the content to oneself, or with other readers. Raises Taken, NotRunning."""
        deadline = time.monotonic() + (MEMORY_SEGMENT_WAIT_S if wait_s is None else wait_s)
        for lock in (_GATE, _CONTENT):
            delay = _POLL_S_MIN
            while not _lock(descriptor, lock, kind):
                if time.monotonic() >= deadline:
                    raise Taken(
                        f"region {self.identifier:#x} is being written by a process that does not go on",
                        hint="Is one stopped (Ctrl-Z)? Let it go on; or kill it, and others finish its work.",
                    )
                time.sleep(delay)
                delay = min(delay * 2, _CONTENT_POLL_S_MAX)
        _lock(descriptor, _GATE, fcntl.F_UNLCK)
        if kind == fcntl.F_WRLCK and not os.fstat(descriptor).st_nlink:
            raise NotRunning(f"{self.path} was removed")

    def _state(self, descriptor: int) -> State:
        return State(*_STATE.unpack(os.pread(descriptor, _STATE.size, self._end + _HEAD.size)))

    def _change(self, descriptor: int, state: State) -> None:
        """As one step: the record lies within a page."""
        os.pwrite(descriptor, _STATE.pack(*state), self._end + _HEAD.size)

    def _settled(self, descriptor: int) -> State:
        """The state, after what a killed writer had begun is finished. The content is ours alone."""
        state = self._state(descriptor)
        if not state.redo:
            return state
        redo = opened(self.redo_path, os.O_RDONLY)
        try:
            begin, count, zeros, length = _REDO.unpack(os.pread(redo, _REDO.size, 0))
            _fill(descriptor, zeros, min(begin, state.used))
            for place in range(0, count, MiB):
                piece = _pread(redo, _REDO.size + place, min(MiB, count - place))
                _pwrite(descriptor, piece, begin + place)
        finally:
            shut(redo)
        state = state.after(length)
        self._change(descriptor, state)
        os.unlink(self.redo_path)  # noqa: PTH108
        return state

    def _lay_down(self, redo: bytes, data: bytes | memoryview) -> None:
        """Write the redo, or nothing."""
        descriptor = opened(self.redo_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            _pwrite(descriptor, redo, 0)
            _pwrite(descriptor, data, len(redo))
        except BaseException:
            os.unlink(self.redo_path)  # noqa: PTH108
            raise
        finally:
            shut(descriptor)

    def _busy(self, descriptor: int) -> Busy:
        holder = self._state(descriptor).holder
        return Busy(
            f"region {self.identifier:#x} is leased to a writer (process {holder} had it last)",
            hint="Wait for it (timeout_s=...), or have it release the array; if it is killed, it lets go.",
        )


def _lock(descriptor: int, lock: int, kind: int) -> bool:
    """Take or drop one of the locks; False if another one has it."""
    wanted = _FLOCK.pack(kind, os.SEEK_SET, _LOCKS_AT + lock, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _leased(descriptor: int) -> bool:
    """Whether somebody else has the lease alone."""
    asked = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, _LOCKS_AT + _LEASE, 1, 0)
    return bool(_FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK)


def _pread(descriptor: int, offset: int, count: int) -> bytes:
    """That many bytes."""
    parts = []
    while count > 0:
        part = os.pread(descriptor, count, offset)
        if not part:
            raise OSError(errno.EIO, "the file is shorter than it was made")
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _pwrite(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """All of it."""
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def _fill(descriptor: int, start: int, stop: int) -> None:
    """Zeros, from `start` to `stop`."""
    zeros = bytes(min(MiB, max(0, stop - start)))
    for place in range(start, stop, MiB):
        _pwrite(descriptor, memoryview(zeros)[: stop - place], place)
