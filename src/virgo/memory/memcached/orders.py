"""Requests as the listener and the nodes pass them on: their names and forms.

Every request on a key has the key at 1 and, at 2, b"1" if no answer is wanted at all (`noreply`).

    GET     cas seconds key...                  seconds b"" unless they are touched
    STORE   key quiet mode mark seconds cas value
    DELTA   key quiet sign amount
    TOUCH   key quiet seconds
    DELETE  key quiet
    REFUSE  key quiet answer                    forgets the key, since what should replace it was refused
    MG MD MA  key quiet flag...                 flags as they came; the key is decoded
    MS      key quiet value flag...
    ME      key quiet form                      form b"b" if the key came in base64

and of the listener alone: SAY answer outcome, where the answer is b"" if nobody wants it; LINE word... for
what is about no key; QUIT.
"""

from __future__ import annotations

from typing import Final, NamedTuple

PREFIX: Final = "MEMORY.MC."
GET, STORE, DELTA, TOUCH = b"MEMORY.MC.GET", b"MEMORY.MC.STORE", b"MEMORY.MC.DELTA", b"MEMORY.MC.TOUCH"
DELETE, REFUSE, PAGE = b"MEMORY.MC.DELETE", b"MEMORY.MC.REFUSE", b"MEMORY.MC.PAGE"
MG, MS, MD = b"MEMORY.MC.MG", b"MEMORY.MC.MS", b"MEMORY.MC.MD"
MA, ME = b"MEMORY.MC.MA", b"MEMORY.MC.ME"
SAY, LINE, SET, QUIT, WIDE = b"MC.SAY", b"MC.LINE", b"MC.SET", b"MC.QUIT", b"MC.GET"

KEY_BYTES_MAX: Final = 250  # memcached's own bound
ERROR: Final = b"ERROR\r\n"
BAD_FORMAT: Final = b"CLIENT_ERROR bad command line format\r\n"
BAD_CHUNK: Final = b"CLIENT_ERROR bad data chunk\r\n"
TOO_LARGE: Final = b"SERVER_ERROR object too large for cache\r\n"


class Order(NamedTuple):
    """What one line asks for.

    Attributes:
        request: complete, or without its value.
        data_bytes: the value that follows the line, without its line end; -1 for none.
        refused: the value is read and thrown away.
        place: where in the request the value belongs.
    """

    request: list[bytes]
    data_bytes: int = -1
    refused: bool = False
    place: int = 0


def say(answer: bytes, *, quiet: bool = False) -> Order:
    """An answer that is known already; none if nobody wants one."""
    return Order([SAY, b"" if quiet else answer, answer])


def item_bytes(key: bytes, value_bytes: int) -> int:
    """What memcached counts against the largest size of an item: its head, key, value and line end."""
    return 60 + len(key) + value_bytes


def words_of(line: bytes) -> list[bytes]:
    """Words of a line: parted by blanks alone; nothing counts from a NUL on."""
    return [word for word in line.partition(b"\0")[0].split(b" ") if word]
