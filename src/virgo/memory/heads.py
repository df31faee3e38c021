"""The two heads of a store's file, of which LMDB writes one with each change, in turns (MDB_meta in mdb.c).

What is in them is found nowhere else: the number of the last change, as others' processes see it right now,
and how many records the list of free pages has.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

from virgo.errors import FileRefused

PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")  # LMDB's pages are the system's
_HEAD_AT: Final = 16  # behind a page's own head
_FREE_AT: Final = _HEAD_AT + 4 + 4 + 8 + 8  # the free pages' table, behind magic, version, address, size
_RECORDS_AT: Final = _FREE_AT + 8 + 3 * 8  # behind its flags and depth, and its counts of pages
NUMBER_AT: Final = _FREE_AT + 2 * 48 + 8  # behind both tables, and the last page
_U64 = struct.Struct("<Q")


def free_records(path: Path) -> int:
    """How many records list the free pages of the file."""
    with path.open("rb") as file:
        heads = [file.read(PAGE_BYTES) for _ in range(2)]
    newest = max(heads, key=_number)
    return int(_U64.unpack_from(newest, _RECORDS_AT)[0])


def renumber(path: Path, number: int) -> None:
    """Let the only change of a compact copy, which nobody has open, have that number or the next one.

    Raises:
        FileRefused: it is no such copy.
    """
    number += 1 - number % 2  # it is in the second head, where the odd ones are
    with path.open("r+b") as file:
        heads = [file.read(PAGE_BYTES) for _ in range(2)]
        if [_number(head) for head in heads] != [0, 1]:
            raise FileRefused(f"{path} is no compact copy", hint="LMDB writes these in another way now.")
        file.seek(PAGE_BYTES + NUMBER_AT)
        file.write(_U64.pack(number))


def _number(head: bytes) -> int:
    return int(_U64.unpack_from(head, NUMBER_AT)[0])
