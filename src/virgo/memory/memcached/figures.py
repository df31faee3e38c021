"""What a node has served by memcached's protocol, in the words of `stats`.

Only what is true is said: there are no figures of slabs, since there are none.
Counts are of this node's listener, since it started or since `stats reset`; sizes are of this node's store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from virgo.errors import DiskFull, PoolFull, VirgoError

# By command, and what its answer begins with: the figure that is counted.
_BY_ANSWER: Mapping[tuple[str, bytes], tuple[str, ...]] = {
    ("DELETE", b"D"): ("delete_hits",),
    ("DELETE", b"N"): ("delete_misses",),
    ("TOUCH", b"T"): ("cmd_touch", "touch_hits"),
    ("TOUCH", b"N"): ("cmd_touch", "touch_misses"),
    ("incr", b"N"): ("incr_misses",),
    ("decr", b"N"): ("decr_misses",),
    ("incr", b""): ("incr_hits",),
    ("decr", b""): ("decr_hits",),
    ("cas", b"S"): ("cmd_set", "cas_hits"),
    ("cas", b"E"): ("cmd_set", "cas_badval"),
    ("cas", b"N"): ("cmd_set", "cas_misses"),
    ("STORE", b""): ("cmd_set",),
    ("REFUSE", b""): ("store_too_large",),
    ("MG", b"H"): ("cmd_get", "get_hits"),
    ("MG", b"V"): ("cmd_get", "get_hits"),
    ("MG", b""): ("cmd_get", "get_misses"),
    ("MS", b""): ("cmd_set",),
    ("MD", b"N"): ("delete_misses",),
    ("MD", b"E"): ("delete_misses",),
    ("MD", b""): ("delete_hits",),
    ("ME", b""): ("cmd_meta",),
}
NAMES = (
    *("cmd_get", "cmd_set", "cmd_flush", "cmd_touch", "cmd_meta", "get_hits", "get_misses"),
    *("delete_misses", "delete_hits", "incr_misses", "incr_hits", "decr_misses", "decr_hits"),
    *("cas_misses", "cas_hits", "cas_badval", "touch_hits", "touch_misses", "auth_cmds", "auth_errors"),
    *("store_too_large", "store_no_memory"),
)


class Figures:
    """Counts of one listener."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Figures {self.counts.total()} counted>"

    def count(self, what: str, answer: bytes) -> None:
        """Take note of a command by what it answered."""
        if what != "REFUSE" and answer.startswith((b"CLIENT_ERROR", b"SERVER_ERROR")):
            return
        for name in _BY_ANSWER.get((what, answer[:1])) or _BY_ANSWER.get((what, b""), ()):
            self.counts[name] += 1

    def failed(self, error: VirgoError) -> None:
        """Take note of a command that failed."""
        if isinstance(error, PoolFull | DiskFull):
            self.counts["store_no_memory"] += 1

    def got(self, hits: int, misses: int, *, touched: bool) -> None:
        """Take note of a get of so many keys."""
        kind, hit, miss = (
            ("cmd_touch", "touch_hits", "touch_misses") if touched else ("cmd_get", "get_hits", "get_misses")
        )
        self.counts[kind] += hits + misses
        self.counts[hit] += hits
        self.counts[miss] += misses

    def values(self) -> list[tuple[str, object]]:
        """All counts, also those that are 0."""
        return [(name, self.counts[name]) for name in NAMES]


def lines(values: Iterable[tuple[str, object]]) -> bytes:
    """The answer to a `stats`."""
    return b"".join(f"STAT {name} {value}\r\n".encode() for name, value in values) + b"END\r\n"
