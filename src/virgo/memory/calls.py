"""Requests of the memory module and the meaning of their answers, for both clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from zlib import crc32

import msgspec

from virgo.errors import BadArgument, DiskFull, FileRefused, NotRunning, PoolFull, WrongType
from virgo.limits import MEMORY_KEY_BYTES_MAX, MEMORY_SLOTS
from virgo.members import SERIAL_BITS
from virgo.memory import keyspace
from virgo.memory.batch import Batch
from virgo.memory.core import changed
from virgo.memory.entries import TIME_MAX
from virgo.memory.figures import Pool, SpaceInfo
from virgo.memory.held import Held
from virgo.memory.keeping import OPENING
from virgo.memory.mapped import MISSING
from virgo.memory.maps import open_mapped
from virgo.memory.recall import Recall
from virgo.memory.verbs import Verb
from virgo.wire.call import Argument, Call, as_nothing, whole

Key = bytes | str
Data = bytes | bytearray | memoryview
# Why a change cannot be made from here: the node may find room, on another node too, or say it better.
_NODE_DECIDES = (NotRunning, PoolFull, DiskFull, FileRefused)


class LocalInfo(msgspec.Struct, frozen=True):
    """How a node's store can be mapped on its machine."""

    number: int
    directory: str
    identity: str
    map_bytes: int
    writable: bool = False  # whether we have the role to


def encode_key(key: Key) -> bytes:
    """Keys are bytes; text is UTF-8."""
    return key if type(key) is bytes else _other_key(key)


def _other_key(key: Any) -> bytes:
    if isinstance(key, str):
        return key.encode("utf-8", "surrogateescape")
    if isinstance(key, (bytes, bytearray, memoryview)):
        return bytes(key)
    raise WrongType(f"a key is bytes or str, not {type(key).__name__}", hint="str(key) makes one of it.")


def encode_data(data: Data) -> bytes:
    """Values are bytes."""
    if type(data) is bytes:
        return data
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    raise WrongType(f"a value is bytes, not {type(data).__name__}", hint="Encode it first, e.g. with pickle.")


def milliseconds(seconds: float, name: str = "ttl_s") -> int:
    """A time, 1 at least. Raises WrongType, BadArgument."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise WrongType(f"{name} is {seconds!r:.40}, but must be a number", hint="It is in seconds.")
    if not 0 < seconds <= TIME_MAX / 1000:
        raise BadArgument(
            f"{name} is {seconds}, but must be more than 0, and at most {TIME_MAX // 1000}",
            hint="It is in seconds; None is for ever.",
        )
    return max(1, round(seconds * 1000))


def as_is(reply: Any) -> Any:
    """Decode what needs no decoding."""
    return reply


def get_key(key: bytes) -> Call[bytes | None]:
    """A key's value or None."""
    return Call(("GET", key), as_is)


def set_key(key: Key, value: Data, ttl_s: float | None, only_if: str) -> Call[bool]:
    """Set a key; answers whether it was set."""
    options: list[Argument] = []
    if ttl_s is not None:
        options += ["PX", milliseconds(ttl_s)]
    if only_if:
        flag = {"absent": "NX", "present": "XX"}.get(only_if)
        if flag is None:
            raise BadArgument(
                f"only_if is 'absent' or 'present', not {only_if!r}",
                hint="Leave it out to set the key anyway.",
            )
        options.append(flag)
    return Call(("SET", encode_key(key), encode_data(value), *options), lambda reply: reply is not None)


def set_with(key: Key, value: Data, ttl_s: float | None, *, sliding: bool, only_if: str) -> Call[bool]:
    """Set a key with options; answers whether it was set."""
    if not sliding:
        return set_key(key, value, ttl_s, only_if)
    if only_if:
        raise BadArgument("sliding and only_if exclude each other", hint="compare_and_set has version=0.")
    call = write_key(key, value, ttl_s, sliding=True)
    return Call(call.request, lambda reply: reply is not None)


class Versioned(msgspec.Struct, frozen=True):
    """A key's value with the version of that moment.

    Attributes:
        version: changes with every change of the key, and is never given again.
        ttl_s: seconds after which it expires, None if it stays.
        sliding: whether each use gives it its time anew.
    """

    value: bytes
    version: int
    ttl_s: float | None = None
    sliding: bool = False


def read_key(key: Key) -> Call[Versioned | None]:
    """A key's value with its version."""

    def decode(reply: Any) -> Versioned | None:
        if reply is None:
            return None
        value, version, left_ms, sliding = reply
        return Versioned(value, version, None if left_ms < 0 else left_ms / 1000, bool(sliding))

    return Call(("MEMORY.READ", encode_key(key)), decode)


def compare_key(key: Key, value: Data, ttl_s: float | None, version: int) -> Call[int | None]:
    """Set a key that has that version, 0 for absent; its new version, None if it has another one."""
    return write_key(key, value, ttl_s, version=max(0, whole(version, "the version")))


def write_key(
    key: Key, value: Data, ttl_s: float | None, *, sliding: bool = False, version: int = -1
) -> Call[int | None]:
    """Set a key; answers its version, None if it was another one than `version`."""
    if sliding and ttl_s is None:
        raise BadArgument("sliding=True needs ttl_s", hint="The time that each use lets the key live.")
    time = () if ttl_s is None else ("PX", milliseconds(ttl_s))
    slides = ("SLIDING",) if sliding else ()
    expected = ("VERSION", whole(version, "the version")) if version >= 0 else ()
    request = ("MEMORY.WRITE", encode_key(key), encode_data(value), *time, *slides, *expected)
    return Call(request, as_is)


def increment_key(key: Key, step: int) -> Call[int]:
    """Add to a number."""
    return Call(("INCRBY", encode_key(key), whole(step, "the step")), int)


def append_key(key: Key, data: Data) -> Call[int]:
    """Add to the end; answers the length."""
    return Call(("APPEND", encode_key(key), encode_data(data)), int)


def expire_key(key: Key, ttl_s: float | None) -> Call[bool]:
    """Let a key expire, or no longer; answers whether it was there and that has changed something."""
    if ttl_s is None:
        return Call(("PERSIST", encode_key(key)), bool)
    return Call(("PEXPIRE", encode_key(key), milliseconds(ttl_s)), bool)


def take_key(key: Key) -> Call[bytes | None]:
    """A key's value, deleting it."""
    return Call(("GETDEL", encode_key(key)), as_is)


def delete_keys(keys: Iterable[Key]) -> Call[int]:
    """Delete; answers how many there were."""
    return Call(("DEL", *map(encode_key, keys)), int)


def exists(key: bytes) -> Call[bool]:
    """Whether the key is there."""
    return Call(("EXISTS", key), bool)


def get_keys(keys: Iterable[Key]) -> Call[list[bytes | None]]:
    """The values of keys."""
    return Call(("MGET", *map(encode_key, keys)), as_is)


def set_keys(items: Iterable[tuple[Key, Data]]) -> Call[None]:
    """Set keys."""
    flat = [part for key, value in items for part in (encode_key(key), encode_data(value))]
    return Call(("MSET", *flat), as_nothing)


def count_keys() -> Call[int]:
    """How many keys there are."""
    return Call(("DBSIZE",), int)


def scan(cursor: int, count: int, prefix: bytes = b"") -> Call[tuple[int, list[bytes]]]:
    """Some keys that begin so, and the cursor to go on with; 0 at the end."""
    matches = ("MATCH", keyspace.pattern_of(prefix)) if prefix else ()
    return Call(("SCAN", cursor, "COUNT", count, *matches), lambda reply: (int(reply[0]), reply[1]))


def check_fill(ttl_s: float | None, stale_s: float) -> None:
    """Raise BadArgument unless these times go together."""
    if stale_s and ttl_s is None:
        raise BadArgument("stale_s needs ttl_s", hint="What is fresh for ever is never stale.")
    if ttl_s is not None:
        milliseconds(ttl_s)
    if stale_s:
        milliseconds(stale_s, "stale_s")


def fetch_key(key: bytes, token: str, fill_s: float) -> Call[tuple[bytes | None, int]]:
    """A value or None, and whether it is fresh, ours to make, or another's."""
    return Call(("MEMORY.FETCH", key, token, milliseconds(fill_s, "fill_s")), tuple)


def fill_key(key: bytes, token: str, value: bytes, ttl_s: float | None, stale_s: float) -> Call[int | None]:
    """Set a key that we have the claim to fill; its version, None if the claim is void."""
    time = () if ttl_s is None else ("PX", milliseconds(ttl_s))
    stale = ("STALE", milliseconds(stale_s, "stale_s")) if stale_s else ()
    return Call(("MEMORY.FILL", key, token, value, *time, *stale), as_is)


def release_key(key: bytes, token: str) -> Call[int]:
    """Give up the claim to fill a key."""
    return Call(("MEMORY.RELEASE", key, token), int)


def declare_space(name: bytes, cache: bool | None) -> Call[SpaceInfo]:
    """Declare a namespace."""
    if cache is not None and not isinstance(cache, bool):
        raise BadArgument(
            f"cache is {cache!r:.20}, but must be True, False or None", hint="None leaves it as it is."
        )
    option = () if cache is None else ("CACHE", "yes" if cache else "no")
    return Call(("MEMORY.NAMESPACE", name, *option), lambda reply: msgspec.json.decode(reply, type=SpaceInfo))


def drop_space(name: bytes) -> Call[None]:
    """Drop all keys of a namespace."""
    return Call(("MEMORY.DROP", name), as_nothing)


def flush() -> Call[None]:
    """Delete all keys."""
    return Call(("FLUSHDB",), as_nothing)


def stats() -> Call[dict[str, Any]]:
    """Figures of the connected node's pool."""
    return Call(("MEMORY.STATS",), msgspec.json.decode)


LOCAL: Call[LocalInfo] = Call(("MEMORY.LOCAL",), lambda reply: msgspec.json.decode(reply, type=LocalInfo))
POOL: Call[Pool] = Call(("MEMORY.POOL",), lambda reply: msgspec.json.decode(reply, type=Pool))
SPACES: Call[list[SpaceInfo]] = Call(
    ("MEMORY.NAMESPACES",), lambda reply: msgspec.json.decode(reply, type=list[SpaceInfo])
)
SLOTS: Call[list[int]] = Call(("MEMORY.SLOTS",), keyspace.decode_table)


class Local:
    """The connected node's store as read and written from here, and which keys are in it.

    Raises:
        NotRunning: it cannot be mapped: the node is elsewhere, or its files are not ours to read.
    """

    __slots__ = ("_change", "_data", "_holds", "_part", "_view", "_view_data", "number", "read", "table")

    def __init__(self, info: LocalInfo, table: list[int]) -> None:
        self.number = info.number
        self.table = table
        mapped = open_mapped(info.directory, info.identity, info.map_bytes)
        self.read = mapped.key
        self._data = mapped.data
        self._part = mapped.part
        self._holds = mapped.holds
        self._view = mapped.view
        self._view_data = mapped.view_data
        self._change = mapped.change if info.writable and mapped.writable else None

    def __repr__(self) -> str:
        return f"<Local of node {self.number}>"

    def key(self, key: bytes, recall: Recall | None = None, name: Any = None) -> Any:
        """A key's value or None; MISSING if the node is to be asked. See `Mapped.key`."""
        slot = crc32(key) % MEMORY_SLOTS if b"{" not in key else keyspace.slot_of(key)
        if self.table[slot] != self.number or len(key) > MEMORY_KEY_BYTES_MAX:
            return MISSING
        if slot < MEMORY_SLOTS:
            return self.read(keyspace.SLOT_PREFIXES[slot] + key, recall, name)
        found = self.read(keyspace.SLOT_PREFIXES[slot] + key)
        return found if self._holds(slot) else MISSING

    def view(self, key: bytes) -> Held | None:
        """A key's value where it lies; None if it is to be had otherwise."""
        slot = crc32(key) % MEMORY_SLOTS if b"{" not in key else keyspace.slot_of(key)
        if self.table[slot] != self.number or len(key) > MEMORY_KEY_BYTES_MAX or slot >= MEMORY_SLOTS:
            return None
        return self._view(keyspace.SLOT_PREFIXES[slot] + key)

    def put(self, key: bytes, value: bytes) -> bool:
        """Set a key that does not expire; False if the node is to be asked."""
        slot = crc32(key) % MEMORY_SLOTS if b"{" not in key else keyspace.slot_of(key)
        if self._change is None or self.table[slot] != self.number or len(key) > MEMORY_KEY_BYTES_MAX:
            return False
        if key.startswith(OPENING):  # it may be kept elsewhere too
            return False
        stored = keyspace.SLOT_PREFIXES[slot] + key
        try:
            self._change(lambda batch: batch.put_plain(stored, value))
        except _NODE_DECIDES:
            return False
        return True

    def here(self, key: bytes) -> bool:
        """Whether a key can be changed from here."""
        return (
            self._change is not None
            and self.table[keyspace.slot_of(key)] == self.number
            and len(key) <= MEMORY_KEY_BYTES_MAX
            and not key.startswith(OPENING)
        )

    def change(self, work: Callable[[Batch], Any]) -> Any:
        """The result of a change of keys that are here; MISSING if the node is to be asked."""
        if self._change is None:
            return MISSING
        try:
            return self._change(work)
        except _NODE_DECIDES:
            return MISSING

    def run(self, verb: Verb, request: tuple[Argument, ...]) -> Any:
        """The reply to a command on one key; MISSING if the node is to be asked."""
        words = [part if isinstance(part, bytes) else str(part).encode() for part in request]
        key = words[1]
        return self.change(lambda batch: verb.run(batch, words)) if self.here(key) else MISSING

    def set_region(self, identifier: int, data: bytes, offset: int | None = None) -> bool:
        """Change a plain region's value; False if the node is to be asked. Raises TooLarge, BadArgument."""
        if self._change is None or identifier >> SERIAL_BITS != self.number:
            return False

        def put(batch: Batch) -> bool:
            region = batch.writing().region(identifier)
            if region is None or region.spread or region.shared:
                return False
            value = changed(identifier, region, lambda: batch.data(identifier), data, offset)
            if value is not None:
                batch.put_data(identifier, value)
            return True

        try:
            return self._change(put)
        except _NODE_DECIDES:
            return False

    def region(self, identifier: int, recall: Recall) -> Any:
        """A plain region's value; MISSING if the node is to be asked."""
        if identifier >> SERIAL_BITS != self.number:
            return MISSING
        found = self._data(identifier, recall)
        return MISSING if found is None else found

    def view_region(self, identifier: int) -> Held | None:
        """A plain region's value where it lies; None if it is to be fetched."""
        return self._view_data(identifier) if identifier >> SERIAL_BITS == self.number else None

    def read_region(self, identifier: int, offset: int, size: int | None) -> Any:
        """A part of a plain region's value; MISSING if the node is to be asked."""
        if identifier >> SERIAL_BITS != self.number:
            return MISSING
        found = self._part(identifier, offset, None if size is None else offset + size)
        return MISSING if found is None else found

    def lacks(self, key: bytes) -> bool:
        """Whether the table does not say yet where the key is."""
        return not self.table[keyspace.slot_of(key)]

    def learn(self, table: list[int]) -> None:
        """Take a newer table; what it adds stays true."""
        self.table = table
