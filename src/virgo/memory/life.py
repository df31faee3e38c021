"""What must be known of a store before its files are opened: whose boot wrote them, and what ids it gave.

Kept in two small files of fixed size that are overwritten in turns, each time flushed to disk, so that one
of them is whole at any moment and that a full disk does not keep a node from starting or stopping.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec

from virgo.errors import DiskFull

_RECORD_BYTES = 512  # one sector
_NAMES = ("life-0", "life-1")


class Life(msgspec.Struct, frozen=True):
    """One state of the record.

    Attributes:
        turn: counts the states; the files take turns.
        boot: id of the machine's boot in which the store was last open.
        clean: whether it was closed in an orderly way since.
        serial_ceiling: no serial above this has been given.
        format: of the store's records; files of another one cannot be read.
    """

    turn: int = 0
    boot: str = ""
    clean: bool = False
    serial_ceiling: int = 0
    format: int = 0


def boot_id() -> str:
    """The id of this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class LifeFile:
    """The record in `directory`.

    Attributes:
        life: its state on disk.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        states = [self._read(directory / name) for name in _NAMES]
        self.life = max(states, key=lambda life: life.turn)

    def __repr__(self) -> str:
        return f"<LifeFile {self.life}>"

    def _read(self, path: Path) -> Life:
        """The state in one file; the first state of all if it is absent or was cut short."""
        try:
            checksum, _, rest = path.read_bytes().partition(b" ")
            record = rest.rstrip(b"\n ")
            if checksum and int(checksum, 16) == crc32(record):
                return msgspec.json.decode(record, type=Life)
        except (FileNotFoundError, ValueError, msgspec.DecodeError):
            pass
        return Life()

    def change(self, **changes: Any) -> None:
        """Have this on disk. Raises DiskFull."""
        life = msgspec.structs.replace(self.life, turn=self.life.turn + 1, **changes)
        record = msgspec.json.encode(life)
        data = (b"%08x %b" % (crc32(record), record)).ljust(_RECORD_BYTES - 1) + b"\n"
        path = self._directory / _NAMES[life.turn % 2]
        try:
            new = not path.exists()
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.pwrite(descriptor, data, 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if new:
                self._flush_directory()
        except OSError as error:
            raise DiskFull(f"{path} cannot be written: {error.strerror}") from error
        self.life = life

    def _flush_directory(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
