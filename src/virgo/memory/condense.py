"""A store's file written anew without its free pages, once these lie about in too many pieces.

While somebody looks at an old state of the store, what is replaced cannot be used again, and LMDB lists it
change by change. A long value then needs pages in a row, and LMDB looks for them in all of the list after
each record that it reads: with a hundred thousand records that takes a minute, in which nobody else can
write. So the owner copies what counts into a new file and puts that in the place of the old one.

Nothing acknowledged is lost by it, and nothing old is read after it: from before the copy on others do not
write, which is known to them by the state in the old file; and the owner acknowledges nothing before they
have seen, as they look once a second, that the file is another one. Whoever still looks at the old file keeps
it until it is done. A kill at any point leaves either file, whole: see `finish`.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virgo.limits import MEMORY_CONDENSE_AGAIN_S, MEMORY_CONDENSE_BYTES_MAX, MEMORY_FREE_RECORDS_MAX
from virgo.memory.ground import opening
from virgo.memory.heads import free_records, renumber
from virgo.memory.mapped import CHECK_S
from virgo.memory.tables import disk_free_bytes

if TYPE_CHECKING:
    from virgo.memory.store import Store

log = logging.getLogger("virgo.memory")
_NAME = "condensing"
_SPARE_S = 0.05


class Condenser:
    """Condenses one store, now and then.

    Attributes:
        done: how often it did.
    """

    def __init__(self) -> None:
        self._next = 0.0
        self.done = 0

    def __repr__(self) -> str:
        return f"<Condenser, {self.done} done>"

    def attend(self, store: Store) -> bool:
        """Condense it if that is needed and possible. To be called when no batch is open.

        Raises:
            VirgoError: the disk refused; the store is as it was.
        """
        now = time.monotonic()
        if now < self._next or store.ground is None or store.broken:
            return False
        records = free_records(store.directory / "data.mdb")
        if records <= MEMORY_FREE_RECORDS_MAX:
            return False
        self._next = now + MEMORY_CONDENSE_AGAIN_S
        used = store.live_bytes()
        if used > MEMORY_CONDENSE_BYTES_MAX or 2 * used > disk_free_bytes(store.directory):
            log.warning(
                "%s has %d lists of free pages, and is too full to be condensed: long values take long",
                *(store.directory, records),
            )
            return False
        before = store.file_bytes()
        store.condense()
        time.sleep(CHECK_S + _SPARE_S)
        self.done += 1
        log.warning(
            "%s was condensed: it had %d lists of free pages, and takes %d bytes instead of %d",
            *(store.directory, records, store.file_bytes(), before),
        )
        return True


def copy(env: Any, directory: Path) -> None:
    """Make a compact copy beside the store's file, which nobody writes, numbered as its next change."""
    place = directory / _NAME
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(mode=0o700)
    try:
        env.copy(str(place), compact=True)
        renumber(place / "data.mdb", env.info()["last_txnid"] + 1)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def put_in_place(directory: Path) -> None:
    """Put the copy in the place of the store's file, which its owner has closed."""
    with opening(directory, alone=True):
        (directory / _NAME / "data.mdb").replace(directory / "data.mdb")
        finish(directory)


def finish(directory: Path) -> None:
    """End what was begun: the locks go with the file that they were for, and so does a copy not in place."""
    place = directory / _NAME
    if place.exists():
        if not (place / "data.mdb").exists():
            (directory / "lock.mdb").unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)
