"""Items, listed: `lru_crawler metadump`, `stats cachedump` and `me`, on the node that has them."""

from __future__ import annotations

from urllib.parse import quote_from_bytes

from virgo.limits import MEMORY_SCAN_KEYS_MAX, MEMORY_SLOTS_ALL
from virgo.memory.batch import Batch
from virgo.memory.entries import live, now_ms, number
from virgo.memory.keyspace import Entry, stored_key
from virgo.memory.memcached.items import Items
from virgo.memory.memcached.numbers import encoded, left_s
from virgo.memory.memcached.orders import KEY_BYTES_MAX, item_bytes

CLASS = 1  # memcached sorts items into slabs by size; here they are all of one class


class Dump:
    """Listings of the items of one node."""

    def __init__(self, items: Items) -> None:
        self._items = items

    def __repr__(self) -> str:
        return f"<Dump {self._items!r}>"

    def page(self, batch: Batch, request: list[bytes]) -> tuple[int, list[bytes]]:
        """PAGE slot count form: a line for each item of whole slots, and the slot to go on from.

        The form is `keys` for the lines of metadump, `items` for those of cachedump. Keys that are none
        for memcached, longer ones for example, are shown too.
        """
        slot = number(request[1], "the slot", low=0, high=MEMORY_SLOTS_ALL - 1)
        count = number(request[2], "the count", low=1, high=MEMORY_SCAN_KEYS_MAX)
        onward, keys = batch.scan(slot, count, None)
        lines = []
        for key in keys:
            stored = stored_key(key)
            entry = live(batch, stored)
            if entry is not None:
                lines.append(
                    self._keys_line(stored, key, entry) if request[3] == b"keys" else _item(key, entry)
                )
        return onward, lines

    def _keys_line(self, stored: bytes, key: bytes, entry: Entry) -> bytes:
        fetched, idle_s = self._items.uses.look(stored, entry.version)
        now = now_ms()
        return b"key=%b exp=%d la=%d cas=%d fetch=%b cls=%d size=%d\n" % (
            quote_from_bytes(key).encode(),
            entry.expires_ms // 1000 if entry.expires_ms else -1,
            now // 1000 - idle_s,
            entry.version,
            b"yes" if fetched else b"no",
            CLASS,
            item_bytes(key, len(entry.value)),
        )

    def show(self, batch: Batch, request: list[bytes]) -> bytes:
        """ME key quiet form."""
        key = request[1]
        stored = stored_key(key)
        entry = live(batch, stored)
        if entry is None:
            return b"EN\r\n"
        fetched, idle_s = self._items.uses.look(stored, entry.version)
        return b"ME %b exp=%d la=%d cas=%d fetch=%b cls=%d size=%d\r\n" % (
            encoded(key) if request[3] else key,
            left_s(entry.expires_ms, now_ms()) if entry.expires_ms else -1,
            idle_s,
            entry.version,
            b"yes" if fetched else b"no",
            CLASS,
            item_bytes(key, len(entry.value)),
        )


def _item(key: bytes, entry: Entry) -> bytes:
    """A key that is none for memcached has no place in this form, whose words are parted by blanks."""
    if len(key) > KEY_BYTES_MAX or any(byte <= 32 or byte == 127 for byte in key):
        return b""
    return b"ITEM %b [%d b; %d s]\r\n" % (key, len(entry.value), entry.expires_ms // 1000)
