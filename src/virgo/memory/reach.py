"""How a client of a node gets at what it holds: by mapping where it can, else by asking the node."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any, TypeVar
from zlib import crc32

from virgo.errors import NotRunning, UnknownCommand
from virgo.limits import MEMORY_KEY_BYTES_MAX, MEMORY_SLOTS
from virgo.memory import calls, generic
from virgo.memory.batch import Batch
from virgo.memory.calls import Local
from virgo.memory.keyspace import SLOT_PREFIXES, stored_key
from virgo.memory.mapped import MISSING, step_aside
from virgo.memory.recall import Recall
from virgo.memory.verbs import BY_NAME
from virgo.wire.call import Call, Runner

T = TypeVar("T")
_TABLE_AGE_S_MIN = 0.05  # the slot table is not asked for more often


class Reach:
    """One node and, if it is near, its store. Safe for use from several threads, and after a fork.

    Args:
        runner: runs the calls.
        mapped: whether to read and write by mapping where that is possible.

    Attributes:
        local: the store as mapped; None if it is not, or was not looked for yet (see `attach`).
        recall, regions: values that were read by mapping, by key and by id.
    """

    __slots__ = ("_runner", "_seek", "_table_at", "local", "recall", "regions")

    def __init__(self, runner: Runner, *, mapped: bool) -> None:
        self._runner = runner
        self._seek = mapped
        self._table_at = 0.0
        self.local: Local | None = None
        self.recall, self.regions = Recall(), Recall()

    def __repr__(self) -> str:
        return f"{self._runner!r}{' mapped' if self.local is not None else ''}"

    def attach(self) -> Local | None:
        """The store as mapped; looked for once."""
        if self._seek:
            try:
                self.local = Local(self.run(calls.LOCAL), self.run(calls.SLOTS))
            except (NotRunning, UnknownCommand):
                self.local = None
            self._seek = False
        return self.local

    def detach(self) -> None:
        """Map it no longer."""
        self.local = None
        self.recall.forget()
        self.regions.forget()

    def run(self, call: Call[T]) -> T:
        """Have the node do it."""
        step_aside()
        return self._runner.run(call)

    # --- keys ---------------------------------------------------------------------------------

    def find(self, raw: bytes, name: Any = None) -> bytes | None:
        """The value of a key, None if it is absent. If it is mapped `recall` knows it then. Raises NodeLost.

        Args:
            raw: the key.
            name: what `recall` is to know it by, if not by that.
        """
        if name is None:
            name = raw
        local = self.local
        if local is not None:
            # As `Local.key`, spelt out for the most frequent case of the most frequent call.
            slot = crc32(raw) % MEMORY_SLOTS
            if local.table[slot] == local.number and b"{" not in raw and len(raw) <= MEMORY_KEY_BYTES_MAX:
                try:
                    found = local.read(SLOT_PREFIXES[slot] + raw, self.recall, name)
                except NotRunning:
                    self.local = None
                else:
                    return self._ask(raw) if found is MISSING else found
        return self._find(raw, name)

    def _find(self, raw: bytes, name: Any) -> bytes | None:
        local = self.local or self.attach()
        if local is None:
            return self._ask(raw)
        try:
            found = local.key(raw, self.recall, name)
        except NotRunning:
            self.local = None
            return self._ask(raw)
        return self._ask(raw) if found is MISSING else found

    def _ask(self, raw: bytes) -> bytes | None:
        """A key's value from the node, for those that are not mapped or not here."""
        found = self.run(calls.get_key(raw))
        if found is not None:
            self.learn(raw)
        return found

    def view(self, raw: bytes) -> AbstractContextManager[memoryview] | None:
        """The value of a key for the time of a `with` block, without a copy if possible; None if absent."""
        local = self.local or self.attach()
        held = None if local is None else local.view(raw)
        if held is not None:
            return held
        found = self.find(raw)
        return None if found is None else memoryview(found)

    def there(self, raw: bytes) -> bool:
        """Whether a key is there."""
        local = self.local or self.attach()
        if local is not None:
            try:
                found = local.key(raw)
            except NotRunning:
                self.local = None
            else:
                if found is not MISSING:
                    return found is not None
        return self.run(calls.exists(raw))

    def put(self, raw: bytes, data: bytes) -> None:
        """Set a key that does not expire."""
        local = self.local or self.attach()
        if local is None or not local.put(raw, data):
            self.run(calls.set_key(raw, data, None, ""))
            self.learn(raw)

    def find_many(self, raws: list[bytes]) -> list[bytes | None]:
        """The values of keys, None for those that are absent; those not here are asked for in one request."""
        local = self.local or self.attach()
        found: list[Any] = [MISSING] * len(raws)
        if local is not None:
            try:
                found = [local.key(raw) for raw in raws]
            except NotRunning:
                self.local = None
        asked = [place for place, value in enumerate(found) if value is MISSING]
        if asked:
            values = self.run(calls.get_keys([raws[place] for place in asked]))
            for place, value in zip(asked, values, strict=True):
                found[place] = value
            self.learn(raws[asked[0]])
        return found

    def put_many(self, pairs: list[tuple[bytes, bytes]]) -> None:
        """Set keys that do not expire: those that are here in one change, the others in one request."""
        local = self.local or self.attach()
        here = [pair for pair in pairs if local.here(pair[0])] if local is not None else []
        if here and local is not None:

            def put(batch: Batch) -> None:
                for raw, data in here:
                    batch.put_plain(stored_key(raw), data)

            if local.change(put) is not MISSING:
                pairs = [pair for pair in pairs if not local.here(pair[0])]
        if pairs:
            self.run(calls.set_keys(pairs))
            self.learn(pairs[0][0])

    def drop_many(self, raws: list[bytes]) -> int:
        """Delete keys, likewise; returns how many there were."""
        local = self.local or self.attach()
        here = [raw for raw in raws if local.here(raw)] if local is not None else []
        count = 0
        if here and local is not None:
            deleted = local.change(lambda batch: generic.delete(batch.writing(), [b"DEL", *here]))
            if deleted is not MISSING:
                count, raws = deleted, [raw for raw in raws if not local.here(raw)]
        return count + (self.run(calls.delete_keys(raws)) if raws else 0)

    def do(self, call: Call[T]) -> T:
        """A command on one key: here if the key is, else by the node."""
        local = self.local or self.attach()
        if local is not None:
            found = local.run(BY_NAME[str(call.request[0])], call.request)
            if found is not MISSING:
                return call.decode(found)
        result = self.run(call)
        self.learn(calls.encode_key(call.request[1]))  # type: ignore[arg-type]
        return result

    def learn(self, raw: bytes) -> None:
        """Know where a key is that the node has just found or made."""
        local = self.local
        if local is not None and local.lacks(raw) and time.monotonic() - self._table_at >= _TABLE_AGE_S_MIN:
            self._table_at = time.monotonic()
            local.learn(self.run(calls.SLOTS))
