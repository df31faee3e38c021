"""The classic commands of memcached, on the node that holds the key.

Methods get a batch and a request, as the functions of `strings` do, and answer with bytes as the client
will see them. `Entry.mark` is memcached's flags, `Entry.version` its cas unique, which stays as it is when
only the time of an item changes.

An item's state has bits that outlast the node: STALE (invalidated, and not renewed yet), SENT (somebody was
told to renew it) and BINARY (its key came in base64). They go with the value: whoever sets it anew, by any
protocol, sets them back.
"""

from __future__ import annotations

import time
from typing import Final

from virgo.memory.batch import Batch
from virgo.memory.entries import live, now_ms, use
from virgo.memory.keyspace import Entry, encode_entry, stored_key
from virgo.memory.memcached.numbers import U32_MAX, checked, seconds_of, unsigned64, until_ms
from virgo.memory.memcached.orders import TOO_LARGE, item_bytes
from virgo.memory.memcached.uses import Uses

STALE, SENT, BINARY = 1, 2, 4
STORED, EXISTS, NOT_FOUND, NOT_STORED = b"STORED\r\n", b"EXISTS\r\n", b"NOT_FOUND\r\n", b"NOT_STORED\r\n"
NOT_NUMBER: Final = b"CLIENT_ERROR cannot increment or decrement non-numeric value\r\n"
_U64: Final = 2**64


class Items:
    """The items of one node.

    Args:
        item_bytes_max: the largest item that append and prepend may make.
    """

    def __init__(self, item_bytes_max: int) -> None:
        self.item_bytes_max = item_bytes_max
        self.uses = Uses(time.monotonic)

    def __repr__(self) -> str:
        return f"<Items {self.uses!r}>"

    # --- reading ------------------------------------------------------------------------------

    def get(self, batch: Batch, request: list[bytes]) -> list[bytes]:
        """GET cas seconds key...: what the answer has for each key, b"" for one that is not there."""
        cas, seconds = request[1] == b"1", request[2]
        found = []
        for key in request[3:]:
            stored = stored_key(key)
            entry = self.touched(batch, stored, seconds_of(seconds)) if seconds else use(batch, stored)
            batch.count_get(entry is not None)
            if entry is None:
                found.append(b"")
                continue
            self.uses.note(stored, entry.version, fetched=True)
            value = entry.value
            if cas:
                head = b"VALUE %b %d %d %d\r\n" % (key, entry.mark, len(value), entry.version)
            else:
                head = b"VALUE %b %d %d\r\n" % (key, entry.mark, len(value))
            found.append(b"%b%b\r\n" % (head, value))
        return found

    def touched(self, batch: Batch, stored: bytes, seconds: int) -> Entry | None:
        """The entry, with another time to live."""
        entry = live(batch.writing(), stored)
        if entry is not None:
            entry = entry._replace(expires_ms=until_ms(seconds, now_ms()), sliding_ms=0)
            self.renew(batch, stored, entry)
        return entry

    def touch(self, batch: Batch, request: list[bytes]) -> bytes:
        """TOUCH key quiet seconds."""
        stored = stored_key(request[1])
        entry = self.touched(batch, stored, seconds_of(request[3]))
        if entry is None:
            return NOT_FOUND
        self.uses.note(stored, entry.version, fetched=True)
        return b"TOUCHED\r\n"

    # --- changing -----------------------------------------------------------------------------

    def keep(self, batch: Batch, stored: bytes, entry: Entry) -> int:
        """Keep a new value; returns its version. One whose time is over already is deleted."""
        version = batch.put_entry(stored, entry)
        if entry.expires_ms and entry.expires_ms <= now_ms():
            batch.delete_key(stored)
        else:
            self.uses.note(stored, version, fetched=False)
        return version

    def renew(self, batch: Batch, stored: bytes, entry: Entry) -> None:
        """Keep what has changed beside a value, or delete it if its time is over."""
        if entry.expires_ms and entry.expires_ms <= now_ms():
            batch.delete_key(stored)
        else:
            batch.put_record(stored, encode_entry(entry, entry.version), entry.expires_ms)

    def store(self, batch: Batch, request: list[bytes]) -> bytes:
        """STORE key quiet mode mark seconds cas value."""
        _, key, _, mode, mark, seconds, cas, value = request
        expires_ms = until_ms(seconds_of(seconds), now_ms())
        new = Entry(value, expires_ms, mark=checked(mark, U32_MAX), version=checked(cas))
        return self.put(batch, key, mode, new)[0]

    def put(
        self, batch: Batch, key: bytes, mode: bytes, new: Entry, *, accept_old: bool = False
    ) -> tuple[bytes, int]:
        """Store by one of the modes; what it came to, and the new version.

        Args:
            batch: writes.
            key: the item's.
            mode: `set`, `add`, `replace`, `append`, `prepend` or `cas`.
            new: the item; its version is the one that the old item has to have, 0 for any.
            accept_old: whether `cas` takes the value of an older version too, as a stale one.
        """
        stored = stored_key(key)
        old = live(batch, stored)
        if old is None:
            if mode in (b"set", b"add"):
                return STORED, self.keep(batch, stored, new)
            return (NOT_FOUND if mode == b"cas" else NOT_STORED), 0
        if mode == b"add":
            self.uses.note(stored, old.version, fetched=False)
            return NOT_STORED, 0
        fits = new.version == old.version
        if mode == b"cas" and not fits:
            if not (accept_old and 0 < new.version < old.version):
                return EXISTS, 0
            state = new.state | STALE | (old.state & SENT)
            new = new._replace(expires_ms=old.expires_ms, sliding_ms=old.sliding_ms, state=state)
        if mode in (b"append", b"prepend"):
            if new.version and not fits:
                return EXISTS, 0
            value = old.value + new.value if mode == b"append" else new.value + old.value
            if item_bytes(key, len(value)) > self.item_bytes_max:
                return TOO_LARGE, 0
            new = old._replace(value=value, state=0)
        return STORED, self.keep(batch, stored, new)

    def delta(self, batch: Batch, request: list[bytes]) -> bytes:
        """DELTA key quiet sign amount."""
        stored = stored_key(request[1])
        old = live(batch, stored)
        if old is None:
            return NOT_FOUND
        total = total_of(old.value, request[3] == b"+", checked(request[4]))
        if total is None:
            return NOT_NUMBER
        self.count(batch, stored, old, total)
        return b"%d\r\n" % total

    def count(self, batch: Batch, stored: bytes, old: Entry, total: int) -> int:
        """Give an item another number, in the width of the old one; returns its version."""
        value = b"%d" % total
        state = old.state if len(value) <= len(old.value) else 0
        version = batch.put_entry(stored, old._replace(value=value.ljust(len(old.value)), state=state))
        if len(value) <= len(old.value):
            self.uses.carry(stored, old.version, version)
        self.uses.note(stored, version, fetched=False)
        return version

    def delete(self, batch: Batch, request: list[bytes]) -> bytes:
        """DELETE key quiet."""
        stored = stored_key(request[1])
        there = live(batch, stored) is not None
        batch.delete_key(stored)
        return b"DELETED\r\n" if there else NOT_FOUND

    def refuse(self, batch: Batch, request: list[bytes]) -> bytes:
        """REFUSE key quiet answer."""
        batch.delete_key(stored_key(request[1]))
        return request[3]


def total_of(value: bytes, adds: bool, amount: int) -> int | None:
    """A number plus or minus an amount: in 64 bits, never below 0; None if the value is no number."""
    number = unsigned64(value)
    if number is None:
        return None
    return (number + amount) % _U64 if adds else max(0, number - amount)
