"""Which items were fetched, and when they were last used: what the meta protocol's flags `h` and `l` say.

memcached keeps both in the item. Here a fetch would then be a change of the store, so they are kept in the
node's memory: exact for the items used last, `MEMCACHED_USES_MAX` of them, since the node started. Of any
other item it is only known that it was used no later than the last one that was forgotten. What comes by
other ways than this protocol, a mapped read for one, is not noted.
"""

from __future__ import annotations

from collections.abc import Callable

from virgo.limits import MEMCACHED_USES_MAX


class Uses:
    """The items used last, by their stored key.

    Args:
        now_s: a clock that does not go back, in seconds.
        most: how many are kept.
    """

    def __init__(self, now_s: Callable[[], float], most: int = MEMCACHED_USES_MAX) -> None:
        self._now_s = now_s
        self._most = most
        self._known: dict[bytes, tuple[int, bool, float]] = {}  # version, fetched, when; the oldest first
        self._since_s = now_s()  # no item that is not known was used later

    def __repr__(self) -> str:
        return f"<Uses of {len(self._known)} items>"

    def note(self, stored: bytes, version: int, *, fetched: bool) -> None:
        """The item of that version was stored, or fetched."""
        known = self._known
        found = known.pop(stored, None)
        if found is None and len(known) >= self._most:
            oldest = next(iter(known))
            self._since_s = known.pop(oldest)[2]
        fetched = fetched or (found is not None and found[0] == version and found[1])
        known[stored] = version, fetched, self._now_s()

    def carry(self, stored: bytes, old: int, new: int) -> None:
        """The item got another version and is the same otherwise."""
        found = self._known.get(stored)
        if found is not None and found[0] == old:
            self._known[stored] = new, found[1], found[2]

    def look(self, stored: bytes, version: int) -> tuple[bool, int]:
        """Whether it was fetched, and how many seconds ago it was used, at least."""
        found = self._known.get(stored)
        if found is None or found[0] != version:
            return False, int(self._now_s() - self._since_s)
        return found[1], int(self._now_s() - found[2])
