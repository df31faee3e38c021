"""The directory in which a store's segments lie: where it is, that it is ours, what others left beside it.

By default it is below /dev/shm, if that is large enough for a good part of the pool, else beside the store;
the setting `memory.shared_directory` names another place. The store and the directory point to each other by
symbolic links, `segments` and `store`, so that segments are found again whatever the setting says by then,
and that a directory whose store was removed is known as nobody's, and goes. A third one, `mounts`, names the
view of the file system in which that is so: in a container other stores are there, and none is judged from
outside. A copy of a store gets a directory of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import threading
from pathlib import Path
from typing import Final
from zlib import crc32

from virgo.clock import wall_ms
from virgo.errors import BadConfig, FileRefused
from virgo.limits import MEMORY_SEGMENTS_STRAY_S
from virgo.memory.segments import refused

log = logging.getLogger("virgo.memory")
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where Linux has it
_MOUNTS: Final = Path("/proc/self/mounts")
_POOL_SHARE: Final = 4  # of the pool's bytes a quarter, for many a machine lets /dev/shm have half its memory
_LINK, _BACK, _VIEW = "segments", "store", "mounts"
_OWN_VIEW: Final = Path("/proc/self/ns/mnt")


class Shelf:
    """The directory of one store's segments: `make` makes it, `leave` removes it once it is empty.

    Attributes:
        path: of the directory.
        emptied: whether what an earlier life had in it is gone for good, with the machine's memory. Files on
            a disk may only be out of reach: it is mounted again some day.

    Raises:
        BadConfig: `memory.shared_directory` cannot be used.
    """

    def __init__(self, store: Path, identity: str, configured: str, capacity_bytes: int) -> None:
        self._store = store.resolve()
        self._mutex = threading.Lock()
        before = self._before()
        earlier = self._earlier(before)
        self._home = home_for(configured, capacity_bytes) or store / "shared"
        self.path = self._free_name(identity)
        self.emptied = before is not None and earlier is None and (is_memory(before) or before.exists())
        if earlier is not None and earlier != self.path:
            if earlier.name.startswith(identity) and _files(earlier):
                log.warning("shared regions stay in %s until they are freed, and so do new ones", earlier)
                self.path, self._home = earlier, earlier.parent
            else:
                shutil.rmtree(earlier, ignore_errors=True)  # if it stays it is a stray
        for stray in _strays(self.path):
            log.warning("%s belongs to no pool any more, and is removed", stray)
            shutil.rmtree(stray, ignore_errors=True)

    def __repr__(self) -> str:
        return f"<Shelf {self.path}>"

    @property
    def in_memory(self) -> bool:
        """Whether its files take memory at once, and are gone with it."""
        return is_memory(self.path)

    def _before(self) -> Path | None:
        """Where the segments of the store were, if it has any."""
        link = self._store / _LINK
        return link.readlink() if link.is_symlink() else None

    def _earlier(self, found: Path | None) -> Path | None:
        """That, if they are there: here, or where the store was moved from."""
        if found is None:
            return None
        with contextlib.suppress(OSError):
            owner = (found / _BACK).readlink()
            if self._is(owner) or not _leads(owner / _LINK, found):
                return found
        return None

    def _is(self, owner: Path) -> bool:
        """Whether that is the store, by this or another name."""
        return owner == self._store or (owner.is_dir() and owner.samefile(self._store))

    def _free_name(self, identity: str) -> Path:
        """The store's identity, unless the store that this one is a copy of has that."""
        path = self._home / identity
        back = path / _BACK
        if not back.is_symlink() or self._is(back.readlink()) or not _leads(back.readlink() / _LINK, path):
            return path
        return self._home / f"{identity}-{crc32(bytes(self._store)):08x}"

    def make(self) -> None:
        """Make it, if it is not there. Raises BadConfig, DiskFull, FileRefused."""
        try:
            with self._mutex:
                self._make()
        except OSError as error:
            raise refused(str(self.path), error) from error

    def _make(self) -> None:
        self._home.mkdir(mode=0o700, exist_ok=True)
        _check(self._home)
        _link(self._store / _LINK, self.path)
        self.path.mkdir(mode=0o700, exist_ok=True)
        _link(self.path / _VIEW, _OWN_VIEW.readlink())
        _link(self.path / _BACK, self._store)

    def leave(self) -> None:
        """Remove it, if it is there with nothing in it."""
        link, there = self._store / _LINK, self.path.is_dir()
        if _files(self.path) if there else link.is_symlink():  # or it is out of reach, and may come back
            return
        with contextlib.suppress(OSError):  # it is a stray then, at worst
            if there:
                for each in (link, self.path / _BACK, self.path / _VIEW):
                    each.unlink(missing_ok=True)
                self.path.rmdir()
            self._home.rmdir()  # which fails while others use it

    def names(self) -> list[str]:
        """The files in it."""
        try:
            return _files(self.path)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FileRefused(f"{self.path}: {error.strerror}", hint="It must be the node's own.") from error


def home_for(configured: str, capacity_bytes: int) -> Path | None:
    """This user's directory in the place that is configured, or in shared memory; None if neither does.

    Raises:
        BadConfig: what is configured does not.
    """
    name = f"virgo-{os.geteuid()}"
    if configured:
        base = Path(configured).expanduser()
        if not base.is_absolute() or not base.is_dir() or not os.access(base, os.W_OK | os.X_OK):
            raise BadConfig(
                f"memory.shared_directory is {configured!r}, but must be a directory that we may write to",
                hint=f"An absolute path, {SHARED_MEMORY} for example; or leave it out.",
            )
        _check(base / name)
        return base / name
    if not is_memory(SHARED_MEMORY) or _total_bytes(SHARED_MEMORY) < capacity_bytes // _POOL_SHARE:
        return None
    try:
        _check(SHARED_MEMORY / name)
    except BadConfig as error:
        log.warning("shared regions lie on the disk, since %s", error.message)
        return None
    return SHARED_MEMORY / name


def _check(path: Path) -> None:
    """Raise BadConfig if others can enter it: in a place like /dev/shm anybody may have made it first."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise BadConfig(
            f"{path} is not this user's alone",
            hint="Remove it, or make it a directory of yours with mode 700; it is not safe as it is.",
        )


def _link(link: Path, target: Path) -> None:
    """Have a symbolic link lead there."""
    if not _leads(link, target):
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def _leads(link: Path, target: Path) -> bool:
    """Whether it is a symbolic link that leads there."""
    return link.is_symlink() and link.readlink() == target


def is_memory(path: Path) -> bool:
    """Whether files there are in memory: on a tmpfs."""
    found, kind = -1, ""
    real = path.resolve()
    for line in _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _device, mount, mounted, *_rest = line.split(" ")
        point = Path(mount.replace("\\040", " "))
        if real.is_relative_to(point) and len(point.parts) >= found:
            found, kind = len(point.parts), mounted
    return kind == "tmpfs"


def _total_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize


def _files(path: Path) -> list[str]:
    return [name for name in os.listdir(path) if name not in (_BACK, _VIEW)]  # noqa: PTH208


def _strays(own: Path) -> list[Path]:
    """Directories beside it whose store is gone or has another one by now."""
    found: list[Path] = []
    if not own.parent.is_dir():
        return found
    for each in own.parent.iterdir():
        if each == own or each.is_symlink() or not each.is_dir():
            continue
        try:
            seen = _leads(each / _VIEW, _OWN_VIEW.readlink())
            stray = seen and not _leads((each / _BACK).readlink() / _LINK, each)
        except FileNotFoundError:  # in the making, or left there by who was killed at it
            stray = wall_ms() / 1000 - each.stat().st_mtime > MEMORY_SEGMENTS_STRAY_S
        except OSError:  # not to be looked at, and so not ours to judge
            stray = False
        if stray:
            found.append(each)
    return found
