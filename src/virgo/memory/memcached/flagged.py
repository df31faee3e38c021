"""The meta commands of memcached, on the node that holds the key; as in `items`.

The flags of an answer stand in the order of the request's. A get that changes nothing stays a read: only a
new time to live, an item made since there was none, and somebody who is told to renew it are changes.
"""

from __future__ import annotations

from virgo.memory.batch import Batch
from virgo.memory.entries import live, now_ms, use
from virgo.memory.keyspace import Entry, stored_key
from virgo.memory.memcached.items import BINARY, NOT_NUMBER, SENT, STALE, Items, total_of
from virgo.memory.memcached.meta import Flags, checked
from virgo.memory.memcached.numbers import encoded, left_s, until_ms

_CODES = {b"STORED\r\n": b"HD", b"EXISTS\r\n": b"EX", b"NOT_FOUND\r\n": b"NF", b"NOT_STORED\r\n": b"NS"}
_MODES = {ord("E"): b"add", ord("A"): b"append", ord("P"): b"prepend", ord("R"): b"replace"}


class Flagged:
    """The meta commands on the items of one node."""

    def __init__(self, items: Items) -> None:
        self._items = items

    def __repr__(self) -> str:
        return f"<Flagged {self._items!r}>"

    # --- mg -----------------------------------------------------------------------------------

    def get(self, batch: Batch, request: list[bytes]) -> bytes:
        """MG key quiet flag..."""
        key, wanted = request[1], checked(request[3:])
        stored = stored_key(key)
        entry = live(batch, stored) if wanted.has(b"u") else use(batch, stored)
        if entry is not None and not self._changes(entry, wanted):
            batch.count_get(True)
            return self._hit(stored, key, entry, entry, wanted, won=False)
        if entry is None and not wanted.has(b"N"):
            batch.count_get(False)
            return (
                b"" if wanted.has(b"q") else _flagged(b"EN", wanted, k=_key(key, wanted.has(b"b"))) + b"\r\n"
            )
        return self._get_changing(batch.writing(), stored, key, wanted)

    def _get_changing(self, batch: Batch, stored: bytes, key: bytes, wanted: Flags) -> bytes:
        """As the item is now that nobody else changes it."""
        now = now_ms()
        entry, made = live(batch, stored), False
        if entry is None:
            if not wanted.has(b"N"):  # it was deleted a moment ago
                batch.count_get(False)
                return (
                    b""
                    if wanted.has(b"q")
                    else _flagged(b"EN", wanted, k=_key(key, wanted.has(b"b"))) + b"\r\n"
                )
            made = True
            fresh = Entry(b"", state=BINARY if wanted.has(b"b") else 0)
            entry = fresh._replace(version=self._items.keep(batch, stored, fresh))
        before, won = entry, self._wins(entry, wanted, now)
        for letter in wanted.seen:
            if letter == ord("T"):
                entry = entry._replace(expires_ms=until_ms(wanted.seconds, now), sliding_ms=0)
            elif letter == ord("N") and made:
                entry, won = entry._replace(expires_ms=until_ms(wanted.vivify_s, now)), True
        batch.count_get(True)
        answer = self._hit(stored, key, before, entry, wanted, won=won)
        if won:
            entry = entry._replace(state=entry.state | SENT)
        if entry != before:
            self._items.renew(batch, stored, entry)
        return answer

    def _changes(self, entry: Entry, wanted: Flags) -> bool:
        return wanted.has(b"T") or self._wins(entry, wanted, now_ms())

    def _wins(self, entry: Entry, wanted: Flags, now: int) -> bool:
        """Whether the caller is the one who shall renew the item."""
        if entry.state & SENT:
            return False
        if entry.state & STALE:
            return True
        if not wanted.has(b"R"):
            return False
        expires_ms = entry.expires_ms
        if wanted.has(b"T") and wanted.seen.index(b"T") < wanted.seen.index(b"R"):
            expires_ms = until_ms(wanted.seconds, now)
        limit_ms = until_ms(wanted.recache_s, now)
        return bool(expires_ms) and left_s(expires_ms, now) < left_s(limit_ms, now)

    def _hit(
        self, stored: bytes, key: bytes, before: Entry, entry: Entry, wanted: Flags, *, won: bool
    ) -> bytes:
        fetched, idle_s = self._items.uses.look(stored, entry.version)
        length = len(entry.value)
        answer = _flagged(
            b"VA %d" % length if wanted.has(b"v") else b"HD",
            wanted,
            s=b"%d" % length,
            t=_time_left(before, entry, wanted),
            c=b"%d" % entry.version,
            f=b"%d" % entry.mark,
            l=b"%d" % idle_s,
            h=b"1" if fetched else b"0",
            k=_key(key, bool(entry.state & BINARY)),
        )
        for holds, flag in ((entry.state & SENT, b" Z"), (entry.state & STALE, b" X"), (won, b" W")):
            if holds:
                answer += flag
        if not wanted.has(b"u"):
            self._items.uses.note(stored, entry.version, fetched=True)
        return b"%b\r\n%b\r\n" % (answer, entry.value) if wanted.has(b"v") else answer + b"\r\n"

    # --- the others -----------------------------------------------------------------------------

    def store(self, batch: Batch, request: list[bytes]) -> bytes:
        """MS key quiet value flag..."""
        key, value, wanted = request[1], request[3], checked(request[4:])
        mode = _MODES.get(wanted.mode, b"set")
        if wanted.has(b"C") and mode in (b"set", b"replace"):
            mode = b"cas"
        state = BINARY if wanted.has(b"b") else 0
        expires_ms = until_ms(wanted.seconds, now_ms())
        new = Entry(value, expires_ms, mark=wanted.mark, version=wanted.cas, state=state)
        outcome, version = self._items.put(batch, key, mode, new, accept_old=wanted.has(b"I"))
        code = _CODES.get(outcome)
        if code is None:
            return outcome
        if code == b"HD" and wanted.has(b"q"):
            return b""
        shown = _key(key, wanted.has(b"b"))
        return _flagged(code, wanted, k=shown, c=b"%d" % version) + b"\r\n"

    def delete(self, batch: Batch, request: list[bytes]) -> bytes:
        """MD key quiet flag..."""
        key, wanted = request[1], checked(request[3:])
        stored = stored_key(key)
        entry = live(batch, stored)
        if entry is None:
            code = b"NF"
        elif wanted.has(b"C") and entry.version != wanted.cas:
            code = b"EX"
        else:
            code = b"HD"
            if wanted.has(b"I"):
                self._invalidate(batch, stored, entry, wanted)
            else:
                batch.delete_key(stored)
            if wanted.has(b"q"):
                return b""
        return _flagged(code, wanted, k=_key(key, wanted.has(b"b"))) + b"\r\n"

    def _invalidate(self, batch: Batch, stored: bytes, entry: Entry, wanted: Flags) -> None:
        """Mark an item as stale, so that the next who gets it is told to renew it."""
        stale = entry._replace(state=(entry.state | STALE) & ~SENT)
        if wanted.has(b"T"):
            stale = stale._replace(expires_ms=until_ms(wanted.seconds, now_ms()), sliding_ms=0)
        version = batch.put_entry(stored, stale)
        self._items.uses.carry(stored, entry.version, version)
        if stale.expires_ms and stale.expires_ms <= now_ms():
            batch.delete_key(stored)

    def add(self, batch: Batch, request: list[bytes]) -> bytes:
        """MA key quiet flag..."""
        key, wanted = request[1], checked(request[3:])
        stored, shown = stored_key(key), _key(request[1], wanted.has(b"b"))
        old, now = live(batch, stored), now_ms()
        if old is None and not wanted.has(b"N"):
            return _flagged(b"NF", wanted, k=shown) + b"\r\n"
        if old is None:
            state = BINARY if wanted.has(b"b") else 0
            before = Entry(b"", until_ms(wanted.vivify_s, now), state=state)
            total: int | None = wanted.initial
        elif wanted.cas and old.value and old.version != wanted.cas:
            return _flagged(b"EX", wanted, k=shown) + b"\r\n"
        else:
            before, total = old, total_of(old.value, wanted.mode not in b"D-", wanted.amount)
        if total is None:
            return NOT_NUMBER
        after = before
        if wanted.has(b"T"):
            after = before._replace(expires_ms=until_ms(wanted.seconds, now), sliding_ms=0)
        number = b"%d" % total
        if old is None:
            version = self._items.keep(batch, stored, after._replace(value=number))
        else:
            version = self._items.count(batch, stored, after, total)
            if after.expires_ms and after.expires_ms <= now:
                batch.delete_key(stored)
            if wanted.has(b"q"):
                return b""
        answer = _flagged(
            b"VA %d" % len(number) if wanted.has(b"v") else b"HD",
            wanted,
            c=b"%d" % version,
            t=_time_left(Entry(b"") if old is None else old, after, wanted),
            k=shown,
        )
        return b"%b\r\n%b\r\n" % (answer, number) if wanted.has(b"v") else answer + b"\r\n"


def _flagged(code: bytes, wanted: Flags, **known: bytes) -> bytes:
    """The code and, in the request's order, the flags that are known; an opaque is repeated."""
    answer = [code]
    for word in wanted.words:
        letter = chr(word[0])
        if letter == "O":
            answer.append(word)
        elif letter in known:
            answer.append(word[:1] + known[letter])
    return b" ".join(answer)


def _key(key: bytes, binary: bool) -> bytes:
    return b"%b b" % encoded(key) if binary else key


def _time_left(before: Entry, after: Entry, wanted: Flags) -> bytes:
    """The time as of the place of `t` among the flags: those before it that set one have done so."""
    ahead = wanted.seen.partition(b"t")[0]
    entry = after if b"T" in ahead or b"N" in ahead else before
    return b"%d" % left_s(entry.expires_ms, now_ms()) if entry.expires_ms else b"-1"
