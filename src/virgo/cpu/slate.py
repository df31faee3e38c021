"""The slate of a lease: a page of shared memory on which worker, client and node see how far the worker is.

Calls of a lease are numbered from 0 in the order in which they were sent. The worker notes the number of each
call before it begins it, and lays its outcome down here before it begins the next; outcomes are sent many at
once. So whatever happens to the worker, its client knows for each call whether it has begun and whether it
has ended, and misses no outcome. The client may take back calls that have not begun.

| word | written by | |
| --- | --- | --- |
| `BEGUN` | worker | calls that it has begun: all below this number, but for those taken back |
| `UNSENT`, `UNSENT_FIRST` | worker | bytes of outcomes laid down and not sent; number of their first |
| `LET_GO` | worker | 1 when it has given the lease back; what has not begun never will |
| `RESTING` | worker | 1 while it has nothing to do |
| `SINCE_NS` | worker | since when it rests, or is at the calls that it was sent (monotonic) |
| `TAKEN_FROM`, `TAKEN_TO` | client | calls that it has taken back |
| `WANTED` | node | 1 when the lease is to be given back after the call that runs |

To take calls back is Dekker's pattern: the client writes which, the worker writes `BEGUN`, and each reads
what the other has written. The worker does so with each call and the client seldom, so the client has the
kernel run the barrier for both (`kernel.barrier`).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import sys
from typing import Final

import hiredis

from virgo.limits import LEASE_OUTCOMES_BYTES

BEGUN: Final = 0
UNSENT: Final = 1
UNSENT_FIRST: Final = 2
LET_GO: Final = 3
RESTING: Final = 4
SINCE_NS: Final = 5
TAKEN_FROM: Final = 8
TAKEN_TO: Final = 9
WANTED: Final = 10

NONE: Final = (1 << 64) - 1  # for TAKEN_FROM

_WORDS: Final = 16
_LABEL_AT: Final = 256
_LABEL_BYTES: Final = 256
_PAGE: Final = 4096
SIZE: Final = _PAGE + LEASE_OUTCOMES_BYTES


def create() -> int:
    """A descriptor of a new slate, whose size nobody can change; nothing is taken back on it."""
    descriptor = os.memfd_create("virgo-lease", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(descriptor, SIZE)
        os.pwrite(descriptor, NONE.to_bytes(8, sys.byteorder), 8 * TAKEN_FROM)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class Slate:
    """A mapped slate.

    Args:
        descriptor: of the slate; it may be closed afterwards. Raises ValueError if it is too short for one.

    Attributes:
        words: the words above, by their names.
        outcomes: where outcomes are laid down.
    """

    __slots__ = ("_label", "_whole", "outcomes", "words")

    def __init__(self, descriptor: int) -> None:
        if os.fstat(descriptor).st_size != SIZE:
            raise ValueError("this is no slate")
        self._use(memoryview(mmap.mmap(descriptor, SIZE)))

    def _use(self, whole: memoryview) -> None:
        self._whole = whole
        self.words = whole[: 8 * _WORDS].cast("Q")
        self.outcomes = whole[_PAGE:]
        self._label = whole[_LABEL_AT : _LABEL_AT + _LABEL_BYTES]

    def __repr__(self) -> str:
        words = self.words
        return f"<Slate begun={words[BEGUN]}{' let go' if words[LET_GO] else ''}>"

    def leave(self) -> None:
        """Remember what is on it now, and let go of it, which takes a descriptor as long as it is mapped."""
        self._use(memoryview(bytearray(self._whole)))

    @property
    def label(self) -> str:
        """What the call that runs, or ran last, is called."""
        text = bytes(self._label)
        return text.partition(b"\0")[0].decode("utf-8", "replace")

    @property
    def running(self) -> bool:
        """Whether a call has begun and has no outcome yet; exact while the worker is stopped."""
        reader = hiredis.Reader()
        reader.feed(bytes(self.outcomes[: self.words[UNSENT]]))
        ended = self.words[UNSENT_FIRST]
        with contextlib.suppress(hiredis.ProtocolError):  # it has sent them meanwhile, and is at others
            while reader.gets() is not False:
                ended += 1
        return self.words[BEGUN] > ended

    def show(self, label: str) -> None:
        """Say what the next calls are called."""
        text = label.encode("utf-8", "replace")[: _LABEL_BYTES - 1]
        self._label[: len(text) + 1] = text + b"\0"
