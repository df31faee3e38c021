"""The journal of the table of open files: JSON lines, one per change, rewritten when most are stale.

A line is written in one piece or not at all; a torn or damaged one costs what it says, and is counted.
Serials are set aside in blocks, with fsync, before any of them is used; changes themselves are not synced.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from virgo.limits import DESCRIPTOR_LINES_SPARE_MAX


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


class Line(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One line of the journal: a serial opened with `entry`, or closed without; or serials set aside."""

    serial: int = 0
    entry: Entry | None = None
    reserved: int = 0


class Journal:
    """Lines on disk: appended in one write each, rewritten when most of them are stale."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self._size_bytes = 0
        self._waiting: list[Line] = []
        self.lines = 0
        self.spare_lines = DESCRIPTOR_LINES_SPARE_MAX
        self.damaged = 0

    def load(self) -> tuple[dict[int, Entry], int]:
        """The open entries and the highest serial set aside."""
        entries: dict[int, Entry] = {}
        reserved = 0
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        decoder = msgspec.json.Decoder(Line)
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

    def postpone(self, line: Line) -> None:
        """Write it together with the next append."""
        self._waiting.append(line)

    def append(self, lines: tuple[Line, ...], *, sync: bool) -> None:
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
        lines = [Line(reserved=reserved)] + [
            Line(serial=serial, entry=kept) for serial, kept in entries.items()
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
