"""The table of open files: descriptors that outlive connections, and the process.

A descriptor is a cloud-unique number that leads to its node; behind it are a root, a path, flags and the
identity of the file. The table is kept in a journal of JSON lines, one per change, so that a descriptor
stays valid until it is closed, also across `kill -9` and restart of the node. A file is opened in the
kernel when it is used, and at most DESCRIPTORS_LIVE_MAX are held; the least recently used is let go and
opened again on its next use, without truncation, and only if it is still the same file.

Promises: a serial is never given twice (they are set aside in blocks, with fsync); a kernel descriptor is
never closed under a read or write in progress; a removed file that is still open is let go last, since it
cannot be opened again. All methods may be called from any thread; those that touch the disk say so.

Does not promise: that descriptors opened in the last seconds before a power loss are known afterwards
(the journal is not fsynced at each open). They answer BadDescriptor then, never another file.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from virgo.errors import BadDescriptor, Busy
from virgo.limits import (
    DESCRIPTOR_LINES_SPARE_MAX,
    DESCRIPTOR_SERIALS_RESERVED,
    DESCRIPTORS_LIVE_MAX,
    DESCRIPTORS_MAX,
)
from virgo.members import SERIAL_BITS, compose_id


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """An open file: where it is, how it is opened, and which file it was.

    `name` is the path as bytes in Latin-1, since JSON holds no bytes that are not UTF-8.
    """

    root: str
    name: str
    flags: int
    identity: str

    @property
    def path(self) -> str:
        """The path below the root."""
        return os.fsdecode(self.name.encode("latin-1"))


def entry(root: str, path: str, flags: int, identity: str) -> Entry:
    """The entry of a file that was just opened; what must happen only once is taken off the flags."""
    kept = flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC)
    return Entry(root, os.fsencode(path).decode("latin-1"), kept, identity)


class Live:
    """A file that is open in the kernel. Held by `DescriptorTable.use` while it is worked with."""

    __slots__ = ("cached", "descriptor", "doomed", "entry", "named", "pins")

    def __init__(self, opened: Entry, descriptor: int) -> None:
        self.entry = opened
        self.descriptor = descriptor
        self.named = False  # whether the directories that lead to it are known to be on the disk
        self.cached = True  # whether the file system can say what is cached (RWF_NOWAIT)
        self.pins = 0
        self.doomed = False


class _Line(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One line of the journal: a serial opened with `entry`, or closed without; or serials set aside."""

    serial: int = 0
    entry: Entry | None = None
    reserved: int = 0


class DescriptorTable:
    """The open files of one node.

    Args:
        path: the journal.
        number: the node's number, the top bits of its descriptors.
        reopen: opens an entry's file in the kernel again; raises if it is not there or another.
    """

    def __init__(
        self,
        path: Path,
        *,
        number: int,
        reopen: Callable[[Entry], int],
        live_max: int = DESCRIPTORS_LIVE_MAX,
        descriptors_max: int = DESCRIPTORS_MAX,
    ) -> None:
        self._number = number
        self._reopen_file = reopen
        self._live_max = live_max
        self._descriptors_max = descriptors_max
        self._state = threading.Lock()  # the two dictionaries and pins; held for an instant
        self._change = threading.Lock()  # one change at a time: memory, then journal
        self._live: OrderedDict[int, Live] = OrderedDict()
        self._journal = _Journal(path)
        self._entries, self._reserved = self._journal.load()
        self._serial = self._reserved
        self.evictions = 0
        self.reopened = 0

    def __repr__(self) -> str:
        return f"<DescriptorTable {len(self._entries)} open, {len(self._live)} in the kernel>"

    def stats(self) -> dict[str, Any]:
        """How many are open, and what the bounds did."""
        return {
            "open": len(self._entries),
            "live": len(self._live),
            "evictions": self.evictions,
            "reopened": self.reopened,
            "journal_lines": self._journal.lines,
            "damaged_lines": self._journal.damaged,
        }

    def entries(self) -> dict[int, Entry]:
        """All open files by descriptor."""
        with self._state:
            return {compose_id(self._number, serial): kept for serial, kept in self._entries.items()}

    # --- changes, on the disk -----------------------------------------------------------------

    def check_room(self) -> None:
        """Raise Busy if no more files can be opened."""
        if len(self._entries) >= self._descriptors_max:
            raise Busy(
                f"this node has {self._descriptors_max} files open",
                hint="End them with VIRGO_CLOSE; FILES.DESCRIPTORS lists them.",
            )

    def add(self, opened: Entry, descriptor: int) -> int:
        """Take over a kernel descriptor and return the new number; on failure it is closed."""
        try:
            with self._change:
                self.check_room()
                serial = self._next_serial()
                with self._state:
                    self._entries[serial] = opened
                try:
                    self._write(_Line(serial=serial, entry=opened))
                except OSError:
                    with self._state:
                        del self._entries[serial]
                    raise
        except BaseException:
            os.close(descriptor)
            raise
        with self._state:
            self._live[serial] = Live(opened, descriptor)
        self._let_go()
        return compose_id(self._number, serial)

    def close(self, identifier: int) -> None:
        """End a descriptor. Raises BadDescriptor, and OSError if closing says that a write was lost."""
        serial = self._serial_of(identifier)
        with self._change:
            with self._state:
                if self._entries.pop(serial, None) is None:
                    raise _unknown(identifier)
                live = self._live.pop(serial, None)
            # On a full disk this line waits for the next change: the descriptor is closed all the same.
            self._journal.postpone(_Line(serial=serial))
            with contextlib.suppress(OSError):
                self._write()
        if live is not None:
            self._doom(live)

    def renamed(self, root: str, path: str, new_root: str, new_path: str) -> None:
        """A file or directory got another name: let open files in it be found there."""
        old, new = (os.fsencode(item).decode("latin-1") for item in (path, new_path))
        with self._change:
            with self._state:
                moved = {
                    serial: msgspec.structs.replace(kept, root=new_root, name=new + kept.name[len(old) :])
                    for serial, kept in self._entries.items()
                    if kept.root == root and (kept.name == old or kept.name.startswith(old + "/"))
                }
                self._entries.update(moved)
                for serial, kept in moved.items():
                    if serial in self._live:
                        self._live[serial].entry = kept
                        self._live[serial].named = False
            if moved:
                for serial, kept in moved.items():
                    self._journal.postpone(_Line(serial=serial, entry=kept))
                with contextlib.suppress(OSError):  # a full disk: the lines wait for the next change
                    self._write()

    def shut(self) -> None:
        """Close everything in the kernel; the descriptors stay valid for the next life."""
        with self._state:
            lives = list(self._live.values())
            self._live.clear()
        for live in lives:
            self._doom(live)
        self._journal.close()

    # --- use ----------------------------------------------------------------------------------

    def pin(self, identifier: int) -> Live | None:
        """The file if it is open in the kernel, to be given back with `unpin`; no disk is touched."""
        serial = self._serial_of(identifier)
        with self._state:
            live = self._live.get(serial)
            if live is None:
                if serial not in self._entries:
                    raise _unknown(identifier)
                return None
            self._live.move_to_end(serial)
            live.pins += 1
            return live

    def unpin(self, live: Live) -> None:
        """Give it back."""
        with self._state:
            live.pins -= 1
            last = live.doomed and live.pins == 0
        if last:
            os.close(live.descriptor)

    @contextlib.contextmanager
    def use(self, identifier: int) -> Iterator[Live]:
        """The file for the block, opened in the kernel again if need be.

        Raises:
            BadDescriptor, and what `reopen` raises.
        """
        live = self.pin(identifier) or self._reopen(identifier)
        try:
            yield live
        finally:
            self.unpin(live)

    def writes(self, identifier: int) -> bool:
        """Whether the descriptor was opened for writing; False for one that is not open."""
        with self._state:
            kept = self._entries.get(self._serial_of(identifier))
        return kept is not None and kept.flags & os.O_ACCMODE != os.O_RDONLY

    def _reopen(self, identifier: int) -> Live:
        serial = self._serial_of(identifier)
        with self._state:
            kept = self._entries.get(serial)
        if kept is None:
            raise _unknown(identifier)
        descriptor = self._reopen_file(kept)
        with self._state:
            live = self._live.get(serial)
            if live is None and serial in self._entries:
                live = self._live[serial] = Live(self._entries[serial], descriptor)
                self.reopened += 1
                descriptor = -1
            if live is not None:
                live.pins += 1
        if descriptor >= 0:  # another thread was faster, or it was closed meanwhile
            os.close(descriptor)
        if live is None:
            raise _unknown(identifier)
        self._let_go()
        return live

    def _let_go(self) -> None:
        """Close the least recently used beyond the bound; removed files last, since they are lost by it."""
        doomed = []
        with self._state:
            for removed_too in (False, True):
                for serial, live in list(self._live.items()):
                    if len(self._live) <= self._live_max:
                        break
                    if live.pins == 0 and (removed_too or os.fstat(live.descriptor).st_nlink > 0):
                        del self._live[serial]
                        doomed.append(live)
            self.evictions += len(doomed)
        for live in doomed:
            self._doom(live)

    def _doom(self, live: Live) -> None:
        with self._state:
            live.doomed = True
            idle = live.pins == 0
        if idle:
            os.close(live.descriptor)

    # --- journal ------------------------------------------------------------------------------

    def _serial_of(self, identifier: int) -> int:
        if identifier >> SERIAL_BITS != self._number:
            raise _unknown(identifier)
        return identifier & (1 << SERIAL_BITS) - 1

    def _next_serial(self) -> int:
        if self._serial >= self._reserved:
            reserved = self._serial + DESCRIPTOR_SERIALS_RESERVED
            self._write(_Line(reserved=reserved), sync=True)
            self._reserved = reserved
        self._serial += 1
        return self._serial

    def _write(self, *lines: _Line, sync: bool = False) -> None:
        self._journal.append(lines, sync=sync)
        if self._journal.lines > 2 * len(self._entries) + self._journal.spare_lines:
            with self._state:
                entries = dict(self._entries)
            self._journal.shorten(entries, self._reserved)


def _unknown(identifier: int) -> BadDescriptor:
    return BadDescriptor(f"no file is open as {identifier}")


class _Journal:
    """Lines on disk: appended in one write each, rewritten when most of them are stale."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self._size_bytes = 0
        self._waiting: list[_Line] = []
        self.lines = 0
        self.spare_lines = DESCRIPTOR_LINES_SPARE_MAX
        self.damaged = 0

    def load(self) -> tuple[dict[int, Entry], int]:
        """The open entries and the highest serial set aside."""
        entries: dict[int, Entry] = {}
        reserved = 0
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        decoder = msgspec.json.Decoder(_Line)
        data = self._path.read_bytes() if self._path.exists() else b""
        *texts, torn = data.split(b"\n")
        for text in texts:
            try:
                line = decoder.decode(text)
            except msgspec.DecodeError:  # blocks that a power loss left empty
                self.damaged += 1
                continue
            reserved = max(reserved, line.reserved, line.serial)
            if line.entry is not None:
                entries[line.serial] = line.entry
            else:
                entries.pop(line.serial, None)
        self.damaged += bool(torn)
        if self.damaged or not data or len(texts) > 2 * len(entries) + self.spare_lines:
            self.rewrite(entries, reserved)
        else:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            self._size_bytes, self.lines = len(data), len(texts)
        return entries, reserved

    def postpone(self, line: _Line) -> None:
        """Write it together with the next append."""
        self._waiting.append(line)

    def append(self, lines: tuple[_Line, ...], *, sync: bool) -> None:
        """Append all or nothing. Raises OSError (the disk is full, ...)."""
        encode = msgspec.json.encode
        data = b"".join([encode(line) + b"\n" for line in (*self._waiting, *lines)])
        try:
            _write_all(self._file, data, self._size_bytes)
            if sync:
                os.fdatasync(self._file)
        except OSError:
            os.ftruncate(self._file, self._size_bytes)
            raise
        self._size_bytes += len(data)
        self.lines += len(self._waiting) + len(lines)
        self._waiting.clear()

    def rewrite(self, entries: dict[int, Entry], reserved: int) -> None:
        """Replace it by one that holds only what is open."""
        encode = msgspec.json.encode
        lines = [_Line(reserved=reserved)] + [
            _Line(serial=serial, entry=kept) for serial, kept in entries.items()
        ]
        data = b"".join([encode(line) + b"\n" for line in lines])
        fresh = self._path.with_suffix(".new")
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(file, data, 0)
            os.fsync(file)
            fresh.replace(self._path)
            _sync_directory(self._path.parent)
        except OSError:
            os.close(file)
            raise
        self.close()
        self._file, self._size_bytes, self.lines = file, len(data), len(lines)

    def shorten(self, entries: dict[int, Entry], reserved: int) -> None:
        """Rewrite if the disk lets us; if not, go on with the long one for a while."""
        try:
            self.rewrite(entries, reserved)
            self.spare_lines = DESCRIPTOR_LINES_SPARE_MAX
        except OSError:
            self.spare_lines = 2 * self.lines

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _write_all(file: int, data: bytes, position: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], position + written)


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
