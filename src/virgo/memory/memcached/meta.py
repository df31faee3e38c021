"""Lines of the meta protocol, made requests: pure, and as memcached 1.6.18 reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from virgo.errors import BadArgument
from virgo.memory.memcached.numbers import decoded, signed32, unsigned32, unsigned64
from virgo.memory.memcached.orders import (
    BAD_FORMAT,
    ERROR,
    KEY_BYTES_MAX,
    MA,
    MD,
    ME,
    MG,
    MS,
    REFUSE,
    TOO_LARGE,
    Order,
    item_bytes,
    say,
)

_WORDS_MAX: Final = 19
_OPAQUE_BYTES_MAX: Final = 32
_BARE: Final = frozenset(b"kstcfvhulqIPLOb")  # flags that are known and carry no number
_BAD_TOKEN: Final = b"CLIENT_ERROR bad token in command line format\r\n"
_BAD_FLAG: Final = b"CLIENT_ERROR invalid or duplicate flag\r\n"
_BAD_OPAQUE: Final = b"CLIENT_ERROR opaque token too long\r\n"


@dataclass(slots=True)
class Flags:
    """The flags of a request, read.

    Attributes:
        words: as they came, in their order, in which they are answered too.
        seen: their letters.
        seconds: T, a new time to live.
        vivify_s: N, the time to live of an item made because there was none.
        recache_s: R, whoever finds less time left than this may renew the item.
        mark, cas, amount, initial: F, C, D and J.
        mode: the letter behind M, 0 for none.
        fault: the answer to flags that cannot be read, the last one found; b"" if all can.
    """

    words: Sequence[bytes]
    seen: bytes = b""
    seconds: int = 0
    vivify_s: int = 0
    recache_s: int = 0
    mark: int = 0
    cas: int = 0
    amount: int = 1
    initial: int = 0
    mode: int = 0
    fault: bytes = b""

    def has(self, letter: bytes) -> bool:
        """Whether that flag is there."""
        return letter in self.seen


_NUMBERS: Final[dict[int, tuple[str, Callable[[bytes], int | None], bytes]]] = {
    ord("T"): ("seconds", signed32, _BAD_TOKEN),
    ord("N"): ("vivify_s", signed32, _BAD_TOKEN),
    ord("R"): ("recache_s", signed32, _BAD_TOKEN),
    ord("F"): ("mark", unsigned32, b""),  # it leaves what the fault was before
    ord("C"): ("cas", unsigned64, _BAD_TOKEN),
    ord("D"): ("amount", unsigned64, b"CLIENT_ERROR invalid numeric delta value\r\n"),
    ord("J"): ("initial", unsigned64, b"CLIENT_ERROR invalid numeric initial value\r\n"),
}


def flags(words: Sequence[bytes]) -> Flags:
    """Read the flags; a `fault` is to be answered. That a key is base64 is checked by `_key`."""
    found = Flags(words)
    seen = bytearray()
    for word in words:
        letter = word[0] if word else 127
        if letter >= 127 or letter in seen:
            found.fault = b"CLIENT_ERROR duplicate flag\r\n"
            break
        seen.append(letter)
        if letter in _NUMBERS:
            name, read, fault = _NUMBERS[letter]
            value = read(word[1:])
            if value is None:
                found.fault = fault or found.fault or BAD_FORMAT
            else:
                setattr(found, name, value)
        elif letter == ord("M"):
            if len(word) != 2:
                found.fault = b"CLIENT_ERROR incorrect length for M token\r\n"
            else:
                found.mode = word[1]
        elif letter not in _BARE:
            found.fault = b"CLIENT_ERROR invalid flag\r\n"
            break
        elif letter == ord("O") and len(word) > _OPAQUE_BYTES_MAX and not found.fault:
            found.fault = _BAD_OPAQUE
    found.seen = bytes(seen)
    return found


def checked(words: Sequence[bytes]) -> Flags:
    """The flags that another node has read before. Raises BadArgument for those that nobody can read."""
    found = flags(words)
    if found.fault:
        raise BadArgument(found.fault.decode().strip(), hint="Flags are those of memcached's meta protocol.")
    return found


def _key(words: list[bytes], found: Flags) -> bytes:
    """The key, decoded if it is in base64; what cannot be decoded is a fault."""
    if not found.has(b"b"):
        return words[1]
    key = decoded(words[1])
    if key is None:
        found.fault = found.fault or b"CLIENT_ERROR error decoding key\r\n"
    return key or b""


def get(words: list[bytes]) -> Order:
    """mg key flag..."""
    return _simple(words, MG, own_faults=True)


def delete(words: list[bytes]) -> Order:
    """md key flag..."""
    return _simple(words, MD)


def add(words: list[bytes]) -> Order:
    """ma key flag..."""
    found = _simple(words, MA)
    if found.request[0] == MA and flags(found.request[3:]).mode not in b"\0ID+-":
        return say(b"CLIENT_ERROR invalid mode for ma M token\r\n")
    return found


def _simple(words: list[bytes], name: bytes, *, own_faults: bool = False) -> Order:
    if len(words) < 2:
        return say(ERROR)
    if len(words[1]) > KEY_BYTES_MAX:
        return say(BAD_FORMAT)
    if len(words) > _WORDS_MAX:
        too = b"options flags are too long" if own_faults else b"options flags too long"
        return say(b"CLIENT_ERROR %b\r\n" % too)
    found = flags(words[2:])
    key = _key(words, found)
    if found.fault:
        return say(found.fault if own_faults or found.fault == _BAD_OPAQUE else _BAD_FLAG)
    return Order([name, key, b"0", *words[2:]])


def show(words: list[bytes]) -> Order:
    """me key [b]"""
    if len(words) < 2 or len(words[1]) > KEY_BYTES_MAX:
        return say(BAD_FORMAT)
    binary = len(words) > 2 and words[2] == b"b"
    key = decoded(words[1]) if binary else words[1]
    return say(BAD_FORMAT) if key is None else Order([ME, key, b"0", b"b" if binary else b""])


def store(words: list[bytes], item_bytes_max: int) -> Order:
    """ms key length flag..., as far as its line goes."""
    if len(words) < 2:
        return say(ERROR)
    length = signed32(words[2]) if len(words) > 2 else None
    if len(words[1]) > KEY_BYTES_MAX or len(words) < 3:
        return say(BAD_FORMAT)
    if len(words) > _WORDS_MAX:
        return say(b"CLIENT_ERROR options flags too long\r\n")
    if length is None or not 0 <= length <= 2**31 - 3:
        return say(BAD_FORMAT)
    found = flags(words[3:])
    key = _key(words, found)
    if not found.fault and found.mode not in b"\0EAPRS":
        found.fault = b"CLIENT_ERROR invalid mode for ms M token\r\n"
    if found.fault:
        return Order(say(found.fault).request, length, refused=True)
    if item_bytes(key, length) > item_bytes_max:
        return Order([REFUSE, key, b"0", TOO_LARGE], length, refused=True)
    return Order([MS, key, b"0", *words[3:]], length, place=3)
