"""The table of open files: descriptors that outlive connections, and the process.

A descriptor is a cloud-unique number that leads to its node; behind it are a root, a path, flags and the
identity of the file. The table is kept in a journal of JSON lines, one per change, so that a descriptor
stays valid until it is closed, also across `kill -9` and restart of the node. A file is opened in the
kernel when it is used, and at most DESCRIPTORS_LIVE_MAX are held; the least recently used is let go and
opened again on its next use, without truncation, and only if it is still the same file.

Clients vanish without closing, so a descriptor that nobody has used for DESCRIPTOR_IDLE_S is closed, and in a
full table the least recently used one after DESCRIPTOR_IDLE_FULL_S. A restart of the node counts as a use.
Whoever comes back to it is told that it has expired.

Promises: a serial is never given twice (they are set aside in blocks, with fsync); a kernel descriptor is
never closed under a read or write in progress; a removed file that is still open is let go last, since it
cannot be opened again. All methods may be called from any thread; those that touch the disk say so.

Does not promise: that descriptors opened in the last seconds before a power loss are known afterwards
(the journal is not fsynced at each open). They answer BadDescriptor then, never another file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from virgo.errors import BadDescriptor, Busy
from virgo.files.journal import Entry, Journal, Line
from virgo.limits import (
    DESCRIPTOR_IDLE_FULL_S,
    DESCRIPTOR_IDLE_S,
    DESCRIPTOR_SERIALS_RESERVED,
    DESCRIPTORS_EXPIRED_MAX,
    DESCRIPTORS_LIVE_MAX,
    DESCRIPTORS_MAX,
)
from virgo.members import SERIAL_BITS, compose_id

log = logging.getLogger("virgo.files")


class Live:
    """A file that is open in the kernel. Held by `DescriptorTable.use` while it is worked with."""

    __slots__ = ("cached", "descriptor", "doomed", "entry", "named", "pins", "used")

    def __init__(self, opened: Entry, descriptor: int, used: float) -> None:
        self.entry = opened
        self.descriptor = descriptor
        self.named = False  # whether the directories that lead to it are known to be on the disk
        self.cached = True  # whether the file system can say what is cached (RWF_NOWAIT)
        self.pins = 0
        self.doomed = False
        self.used = used  # when it was used last


class DescriptorTable:
    """The open files of one node.

    Args:
        path: the journal.
        number: the node's number, the top bits of its descriptors.
        reopen: opens an entry's file in the kernel again; raises if it is not there or another.
        clock: seconds that only rise, to tell how long a descriptor has been idle.
    """

    def __init__(
        self,
        path: Path,
        *,
        number: int,
        reopen: Callable[[Entry], int],
        live_max: int = DESCRIPTORS_LIVE_MAX,
        descriptors_max: int = DESCRIPTORS_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._number = number
        self._reopen_file = reopen
        self._live_max = live_max
        self._descriptors_max = descriptors_max
        self._clock = clock
        self._state = threading.Lock()  # the dictionaries and pins; held for an instant
        self._change = threading.Lock()  # one change at a time: memory, then journal
        self._live: OrderedDict[int, Live] = OrderedDict()  # by last use
        self._journal = Journal(path)
        self._entries, self._reserved = self._journal.load()
        # Those that are not open in the kernel, in the order in which they were let go: when each was used.
        self._asleep: dict[int, float] = dict.fromkeys(self._entries, clock())
        self._expired: dict[int, float] = {}  # the last ones, with the idle time that was too long
        self._serial = self._reserved
        self.evictions = 0
        self.expired = 0
        self.reopened = 0

    def __repr__(self) -> str:
        return f"<DescriptorTable {len(self._entries)} open, {len(self._live)} in the kernel>"

    def stats(self) -> dict[str, Any]:
        """How many are open, and what the bounds did."""
        return {
            "open": len(self._entries),
            "live": len(self._live),
            "evictions": self.evictions,
            "expired": self.expired,
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
        """Make room for one more descriptor if need be. Raises Busy if all are in use."""
        if len(self._entries) >= self._descriptors_max:
            with self._change:
                self._make_room()

    def expire(self) -> None:
        """Close what nobody has used for too long."""
        with self._change:
            self._expire(DESCRIPTOR_IDLE_S, self._descriptors_max)

    def add(self, opened: Entry, descriptor: int) -> int:
        """Take over a kernel descriptor and return the new number; on failure it is closed."""
        try:
            with self._change:
                self._make_room()
                serial = self._next_serial()
                with self._state:
                    self._entries[serial] = opened
                try:
                    self._write(Line(serial=serial, entry=opened))
                except OSError:
                    with self._state:
                        del self._entries[serial]
                    raise
        except BaseException:
            os.close(descriptor)
            raise
        with self._state:
            self._live[serial] = Live(opened, descriptor, self._clock())
        self._let_go()
        return compose_id(self._number, serial)

    def close(self, identifier: int) -> None:
        """End a descriptor. Raises BadDescriptor, and OSError if closing says that a write was lost."""
        serial = self._serial_of(identifier)
        with self._change:
            with self._state:
                if self._entries.pop(serial, None) is None:
                    raise self._unknown(identifier)
                self._asleep.pop(serial, None)
                live = self._live.pop(serial, None)
            # On a full disk this line waits for the next change: the descriptor is closed all the same.
            self._journal.postpone(Line(serial=serial))
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
                    self._journal.postpone(Line(serial=serial, entry=kept))
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
                    raise self._unknown(identifier)
                return None
            self._live.move_to_end(serial)
            live.used = self._clock()
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
            raise self._unknown(identifier)
        descriptor = self._reopen_file(kept)
        with self._state:
            live = self._live.get(serial)
            if live is None and serial in self._entries:
                live = self._live[serial] = Live(self._entries[serial], descriptor, self._clock())
                self._asleep.pop(serial, None)
                self.reopened += 1
                descriptor = -1
            if live is not None:
                live.pins += 1
        if descriptor >= 0:  # another thread was faster, or it was closed meanwhile
            os.close(descriptor)
        if live is None:
            raise self._unknown(identifier)
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
                        self._asleep[serial] = live.used
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

    # --- expiry -------------------------------------------------------------------------------

    def _make_room(self) -> None:
        if len(self._entries) < self._descriptors_max:
            return
        self._expire(DESCRIPTOR_IDLE_FULL_S, 1)
        if len(self._entries) >= self._descriptors_max:
            raise Busy(
                f"this node has {self._descriptors_max} files open, all of them used in the last"
                f" {DESCRIPTOR_IDLE_FULL_S:g} s",
                hint="End them with VIRGO_CLOSE; FILES.DESCRIPTORS lists them.",
            )

    def _expire(self, idle_s: float, count_max: int) -> None:
        """Close at most so many that have been idle for longer; within a change."""
        serials: list[int] = []
        doomed: list[Live] = []
        oldest_s = self._clock() - idle_s
        with self._state:
            while len(serials) < count_max and (serial := self._longest_idle(oldest_s)) is not None:
                serials.append(serial)
                del self._entries[serial]
                self._asleep.pop(serial, None)
                live = self._live.pop(serial, None)
                doomed += [live] if live is not None else []
                self._expired[serial] = idle_s
                if len(self._expired) > DESCRIPTORS_EXPIRED_MAX:
                    del self._expired[next(iter(self._expired))]
        for serial in serials:
            self._journal.postpone(Line(serial=serial))
        if serials:
            self.expired += len(serials)
            with contextlib.suppress(OSError):  # a full disk: the lines wait for the next change
                self._write()
        for live in doomed:
            try:
                self._doom(live)
            except OSError as error:  # its client is not there to be told
                log.warning("the expired descriptor of %r: a write was lost: %s", live.entry.path, error)

    def _longest_idle(self, before: float) -> int | None:
        """The descriptor that was used last the longest ago, if that was before then; in use is none."""
        asleep = next(iter(self._asleep.items()), (0, before))
        awake = next(
            ((serial, live.used) for serial, live in self._live.items() if not live.pins), (0, before)
        )
        serial, used = min(asleep, awake, key=lambda item: item[1])
        return serial if used < before else None

    def _unknown(self, identifier: int) -> BadDescriptor:
        mine = identifier >> SERIAL_BITS == self._number
        idle_s = self._expired.get(identifier & (1 << SERIAL_BITS) - 1) if mine else None
        if idle_s is None:
            return BadDescriptor(f"no file is open as {identifier}")
        return BadDescriptor(
            f"the descriptor {identifier} has expired: nobody used it for {idle_s:g} s",
            hint="Open the path again; what was written through it is in the file.",
        )

    # --- journal ------------------------------------------------------------------------------

    def _serial_of(self, identifier: int) -> int:
        if identifier >> SERIAL_BITS != self._number:
            raise self._unknown(identifier)
        return identifier & (1 << SERIAL_BITS) - 1

    def _next_serial(self) -> int:
        if self._serial >= self._reserved:
            reserved = self._serial + DESCRIPTOR_SERIALS_RESERVED
            self._write(Line(reserved=reserved), sync=True)
            self._reserved = reserved
        self._serial += 1
        return self._serial

    def _write(self, *lines: Line, sync: bool = False) -> None:
        self._journal.append(lines, sync=sync)
        if self._journal.lines > 2 * len(self._entries) + self._journal.spare_lines:
            with self._state:
                entries = dict(self._entries)
            self._journal.shorten(entries, self._reserved)
