"""Lines of the classic protocol, made requests: pure, and as memcached 1.6.18 reads them.

What is refused is answered in memcached's words. `noreply` silences refusals too, as it does there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virgo.memory.memcached import meta
from virgo.memory.memcached.numbers import signed32, unsigned32, unsigned64
from virgo.memory.memcached.orders import (
    BAD_FORMAT,
    DELETE,
    DELTA,
    ERROR,
    KEY_BYTES_MAX,
    LINE,
    QUIT,
    REFUSE,
    SET,
    STORE,
    TOO_LARGE,
    TOUCH,
    WIDE,
    Order,
    item_bytes,
    say,
    words_of,
)

_BAD_TIME: Final = b"CLIENT_ERROR invalid exptime argument\r\n"
_BAD_AMOUNT: Final = b"CLIENT_ERROR invalid numeric delta argument\r\n"
_BAD_DELETE: Final = b"CLIENT_ERROR bad command line format.  Usage: delete <key> [noreply]\r\n"
_DATA_BYTES_MAX: Final = 2**31 - 3  # memcached's, where a length has 31 bits
Parse = Callable[[list[bytes]], Order]


def order(line: bytes, item_bytes_max: int) -> Order:
    """What a line, without its end, asks for."""
    words = words_of(line)
    if not words or len(words[0]) < 2:
        return say(ERROR)
    name = words[0]
    if name in _STORES:
        return _store(words, item_bytes_max)
    if name == b"ms":
        return meta.store(words, item_bytes_max)
    parse = _LINES.get(name)
    return say(ERROR) if parse is None else parse(words)


def is_http(line: bytes) -> bool:
    """Whether a web browser sent the line: a page that was led here must not get its body executed."""
    words = words_of(line)
    return bool(words) and words[-1].startswith(b"HTTP/") and words[0] not in _LINES


def _quiet(words: list[bytes]) -> bool:
    return words[-1] == b"noreply"


def _yes(flag: bool) -> bytes:
    return b"1" if flag else b"0"


def _get(words: list[bytes]) -> Order:
    """get, gets, gat, gats."""
    if len(words) < 2:
        return say(ERROR)
    cas = _yes(words[0] in (b"gets", b"gats"))
    keys, seconds = words[1:], b""
    if words[0] in (b"gat", b"gats"):
        time = signed32(words[1])
        if time is None:
            return say(_BAD_TIME)
        keys, seconds = words[2:], b"%d" % time
    if any(len(key) > KEY_BYTES_MAX for key in keys):
        return say(BAD_FORMAT)
    return Order([WIDE, cas, seconds, *keys])


def _store(words: list[bytes], item_bytes_max: int) -> Order:
    """set, add, replace, append, prepend and cas, as far as their line goes."""
    mode, extra = words[0], words[0] == b"cas"
    if len(words) - extra not in (5, 6):
        return say(ERROR)
    quiet = _quiet(words)
    key, mark, seconds = words[1], unsigned32(words[2]), signed32(words[3])
    length = signed32(words[4])
    cas = unsigned64(words[5]) if extra else 0
    if len(key) > KEY_BYTES_MAX or mark is None or seconds is None or length is None or cas is None:
        return say(BAD_FORMAT, quiet=quiet)
    if not 0 <= length <= _DATA_BYTES_MAX:
        return say(BAD_FORMAT, quiet=quiet)
    if item_bytes(key, length) > item_bytes_max:
        if mode == b"set":  # what is there must not be taken for the value that was refused
            return Order([REFUSE, key, _yes(quiet), TOO_LARGE], length, refused=True)
        return Order(say(TOO_LARGE, quiet=quiet).request, length, refused=True)
    name = SET if mode == b"set" else STORE
    request = [name, key, _yes(quiet), mode, b"%d" % mark, b"%d" % seconds, b"%d" % cas]
    return Order(request, length, place=len(request))


def _delta(words: list[bytes]) -> Order:
    """incr and decr."""
    if len(words) not in (3, 4):
        return say(ERROR)
    quiet, key = _quiet(words), words[1]
    if len(key) > KEY_BYTES_MAX:
        return say(BAD_FORMAT, quiet=quiet)
    amount = unsigned64(words[2])
    if amount is None:
        return say(_BAD_AMOUNT, quiet=quiet)
    return Order([DELTA, key, _yes(quiet), b"+" if words[0] == b"incr" else b"-", b"%d" % amount])


def _touch(words: list[bytes]) -> Order:
    if len(words) not in (3, 4):
        return say(ERROR)
    quiet, key = _quiet(words), words[1]
    if len(key) > KEY_BYTES_MAX:
        return say(BAD_FORMAT, quiet=quiet)
    seconds = signed32(words[2])
    if seconds is None:
        return say(_BAD_TIME, quiet=quiet)
    return Order([TOUCH, key, _yes(quiet), b"%d" % seconds])


def _delete(words: list[bytes]) -> Order:
    if not 2 <= len(words) <= 4:
        return say(ERROR)
    key, quiet = words[1], len(words) > 2 and _quiet(words)
    zero = len(words) > 2 and words[2] == b"0"
    if (len(words) == 3 and not (zero or quiet)) or (len(words) == 4 and not (zero and quiet)):
        return say(_BAD_DELETE, quiet=quiet)
    if len(key) > KEY_BYTES_MAX:
        return say(BAD_FORMAT, quiet=quiet)
    return Order([DELETE, key, _yes(quiet)])


def _flush_all(words: list[bytes]) -> Order:
    if len(words) > 3:
        return say(ERROR)
    quiet = _quiet(words)
    seconds: int | None = 0
    if len(words) != (2 if quiet else 1):
        seconds = signed32(words[1])
    if seconds is None:
        return say(_BAD_TIME, quiet=quiet)
    return Order([LINE, b"flush_all", _yes(quiet), b"%d" % seconds])


def _verbosity(words: list[bytes]) -> Order:
    """Accepted, and without effect: what a node logs is its own setting."""
    if len(words) not in (2, 3):
        return say(ERROR)
    return say(BAD_FORMAT if unsigned32(words[1]) is None else b"OK\r\n", quiet=_quiet(words))


def _memlimit(words: list[bytes]) -> Order:
    if len(words) not in (2, 3):
        return say(ERROR)
    quiet, megabytes = _quiet(words), unsigned32(words[1])
    if megabytes is None:
        return say(ERROR, quiet=quiet)
    if megabytes < 8:
        return say(b"MEMLIMIT_TOO_SMALL cannot set maxbytes to less than 8m\r\n", quiet=quiet)
    return Order([LINE, b"cache_memlimit", _yes(quiet), b"%d" % megabytes])


def _line(words: list[bytes]) -> Order:
    return Order([LINE, words[0], b"0", *words[1:]])


def _says(answer: bytes) -> Parse:
    return lambda _words: say(answer)


_STORES: Final = frozenset((b"set", b"add", b"replace", b"append", b"prepend", b"cas"))
_LINES: Final[dict[bytes, Parse]] = {
    b"get": _get,
    b"gets": _get,
    b"gat": _get,
    b"gats": _get,
    b"bget": _get,
    b"incr": _delta,
    b"decr": _delta,
    b"touch": _touch,
    b"delete": _delete,
    b"flush_all": _flush_all,
    b"verbosity": _verbosity,
    b"cache_memlimit": _memlimit,
    b"version": _line,
    b"stats": _line,
    b"lru_crawler": _line,
    b"quit": lambda _words: Order([QUIT]),
    b"mg": meta.get,
    b"md": meta.delete,
    b"ma": meta.add,
    b"me": meta.show,
    b"mn": _says(b"MN\r\n"),
    # What is not offered: to stop a node, and to watch what others do.
    b"shutdown": _says(b"ERROR: shutdown not enabled\r\n"),
    b"watch": _says(b"CLIENT_ERROR watch commands not allowed\r\n"),
}
