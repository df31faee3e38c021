"""What calls write to standard output and standard error, kept for a while.

Each worker appends to a file of its own; which part of it is of which call is noted when that has ended. So
nobody is in the way of a call that writes, whatever it uses for that, and calls that write nothing cost
nothing. Of a file the last OUTPUT_BYTES are kept, and what somebody who follows a call has not read yet: what
lies before is given back to the file system, which leaves positions as they are.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from virgo.kernel.at import punch
from virgo.limits import OUTPUT_BYTES, OUTPUT_ENTRIES_MAX, OUTPUT_FILES_MAX, OUTPUT_UNREAD_S

_UNFINISHED: Final = -1


@dataclass(slots=True)
class Entry:
    """The part of a file that one call has written.

    Attributes:
        end: -1 while it may write more.
        followed: whether somebody reads it as it comes, so that nothing is lost that he has not read.
        read: how much of it he has read.
        looked: when he looked last, in monotonic time.
    """

    worker: int
    label: str
    owner: str
    start: int
    end: int = _UNFINISHED
    followed: bool = False
    read: int = 0
    looked: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether the call writes no more."""
        return self.end != _UNFINISHED


@dataclass(slots=True)
class _File:
    descriptor: int
    floor: int = 0  # before that nothing is kept
    entries: int = 0
    alive: bool = True


class Outputs:
    """The files of the workers of a node.

    Args:
        directory: where they lie; whatever else is there is removed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Outputs of {len(self._files)} workers, {len(self._entries)} calls>"

    def start(self) -> None:
        """Make the directory, and leave nothing in it of an earlier node. Raises OSError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            path.unlink()

    def open(self, worker: int) -> int:
        """A descriptor for a new worker to append to, to be closed by who asked. Raises OSError."""
        path = self._directory / str(worker)
        flags = os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        given = os.open(path, flags | os.O_WRONLY | os.O_APPEND, 0o600)
        try:
            self._files[worker] = _File(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError:
            os.close(given)
            raise
        finally:
            path.unlink()  # the descriptors are enough, and nothing can be left behind
        return given

    def size(self, worker: int) -> int:
        """How much a worker has written."""
        file = self._files.get(worker)
        return 0 if file is None else os.fstat(file.descriptor).st_size

    def began(self, task: str, worker: int, label: str, owner: str, *, followed: bool = False) -> None:
        """A call begins, which may write."""
        now = time.monotonic()
        self._note(task, Entry(worker, label, owner, self.size(worker), followed=followed, looked=now))

    def ended(self, task: str) -> None:
        """It has ended; if it has written nothing it is forgotten."""
        entry = self._entries.get(task)
        if entry is not None:
            entry.end = self.size(entry.worker)
            if entry.end <= entry.start:
                self._forget(task)

    def wrote(self, task: str, worker: int, label: str, owner: str, start: int, end: int) -> None:
        """A call has ended that has written this."""
        if start < end <= self.size(worker):
            self._note(task, Entry(worker, label, owner, start, end))

    def find(self, task: str) -> Entry | None:
        """The part that a call has written, None if it has written nothing that is kept."""
        return self._entries.get(task)

    def read(self, entry: Entry, offset: int, count: int, *, follows: bool = False) -> tuple[int, bytes]:
        """What a call has written from an offset on, or from where it is kept on, and that offset.

        Args:
            entry: of the call.
            offset, count: from where on, and how much at most.
            follows: whether who asks has read all before that, and needs no more of it.
        """
        file = self._files.get(entry.worker)
        if file is None:
            return offset, b""
        if follows:
            entry.read, entry.looked = max(entry.read, offset), time.monotonic()
        end = entry.end if entry.ended else self.size(entry.worker)
        start = max(entry.start + offset, file.floor)
        data = os.pread(file.descriptor, max(0, min(count, end - start)), start)
        return start - entry.start, data

    def gone(self, worker: int) -> None:
        """A worker has died."""
        file = self._files.get(worker)
        if file is None:
            return
        file.alive = False
        for task, entry in list(self._entries.items()):
            if entry.worker == worker and not entry.ended:
                self.ended(task)
        self._let_go(worker)
        dead = [number for number, each in self._files.items() if not each.alive]
        for number in dead[: max(0, len(dead) - OUTPUT_FILES_MAX)]:
            self._drop(number)

    def unread(self) -> dict[int, int]:
        """How much is not read yet of calls that run and are followed, by worker."""
        return {
            entry.worker: self.size(entry.worker) - entry.start - entry.read
            for entry in self._entries.values()
            if entry.followed and not entry.ended
        }

    def trim(self) -> None:
        """Give back what is beyond the bound of each file."""
        wanted: dict[int, int] = {}  # from where on, by worker
        forgotten = time.monotonic() - OUTPUT_UNREAD_S
        for entry in self._entries.values():
            if entry.followed and (not entry.ended or entry.looked > forgotten):
                place = entry.start + entry.read
                wanted[entry.worker] = min(place, wanted.get(entry.worker, place))
        for worker, file in self._files.items():
            size = os.fstat(file.descriptor).st_size
            floor = min(size - OUTPUT_BYTES, wanted.get(worker, size))
            if floor > file.floor + OUTPUT_BYTES // 4:
                punch(file.descriptor, file.floor, floor - file.floor)
                file.floor = floor

    def close(self) -> None:
        """Keep nothing any more."""
        for number in list(self._files):
            self._drop(number)

    def _note(self, task: str, entry: Entry) -> None:
        file = self._files.get(entry.worker)
        if file is None:
            return
        self._forget(task)
        self._entries[task] = entry
        file.entries += 1
        if len(self._entries) > OUTPUT_ENTRIES_MAX:
            self._forget(next(iter(self._entries)))

    def _forget(self, task: str) -> None:
        entry = self._entries.pop(task, None)
        if entry is not None:
            file = self._files[entry.worker]
            file.entries -= 1
            self._let_go(entry.worker)

    def _let_go(self, worker: int) -> None:
        """Close the file of a dead worker of which nothing is noted."""
        file = self._files.get(worker)
        if file is not None and not file.alive and not file.entries:
            os.close(file.descriptor)
            del self._files[worker]

    def _drop(self, worker: int) -> None:
        file = self._files[worker]
        file.alive = False
        for task in [task for task, entry in self._entries.items() if entry.worker == worker]:
            self._forget(task)
        self._let_go(worker)
