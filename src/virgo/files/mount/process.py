"""The processes of a mount: one that looks after it, and workers that answer the kernel.

The first mounts, starts the workers, starts them again if they end before their time, and unmounts when it
is told to end. It holds the mount's descriptor, so that the mount outlives any worker: what a killed one
had begun is answered with ECONNABORTED by the kernel, and the others go on. Should it be killed itself, the
workers go on too, and end with the mount.

Nothing of this is in the node: a node that is restarted, or gone, leaves the mount of local files working.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Final

import msgspec

from virgo import config as configuration
from virgo.errors import FileRefused
from virgo.files.mount import counters
from virgo.files.mount.far import Far, FarNode
from virgo.files.mount.filesystem import WANTED, FileSystem
from virgo.files.mount.local import LocalTree
from virgo.files.mount.opens import LocalOpens
from virgo.files.mount.pool import PoolTree
from virgo.files.mount.remote import RemoteTree
from virgo.files.mount.remoteopens import RemoteOpens, always
from virgo.files.mount.shown import Shown
from virgo.files.mount.table import Table
from virgo.files.mount.tree import Tree
from virgo.files.roots import Root
from virgo.home import write_record
from virgo.kernel.fuse import device, serving
from virgo.kernel.fuse.protocol import Can
from virgo.kernel.process import ProcessMark
from virgo.limits import FUSE_IO_BYTES_MAX, MOUNT_THREADS, MOUNT_WORKER_LIFE_S, MOUNT_WORKERS_MAX, KiB
from virgo.wire.address import parse
from virgo.wire.client import Client
from virgo.wire.tls import client_context

log = logging.getLogger("virgo.files.mount")
_ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_WATCHED: Final = frozenset((*_ENDING, signal.SIGCHLD))
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - made there under a name of its own


class Peer(msgspec.Struct, frozen=True):
    """A node of the cloud, as a mount sees it.

    Attributes:
        name, number: the node's.
        address: where it is reached, see `virgo.wire.address`.
        afar: its files are not of this machine.
    """

    name: str
    number: int
    address: str
    afar: bool


class Options(msgspec.Struct, frozen=True):
    """What a mount is to be.

    Attributes:
        place: the directory.
        roots: what it shows of the nodes.
        peers: the nodes; with any, the pool is shown too.
        shared: other users may use it too.
        passes: pass files through where the kernel allows it.
        workers: how many processes answer; 0 for as many as help.
    """

    place: str
    roots: list[Root]
    peers: list[Peer] = []
    shared: bool = True
    passes: bool = True
    workers: int = 0


class Record(msgspec.Struct, frozen=True):
    """A mount, as those see it who look from outside; in `run/mounts`."""

    place: str
    process: dict[str, object]
    nodes: list[str]
    passes: bool
    workers: int
    state_directory: str


class Keeper:
    """The process that looks after a mount.

    Args:
        options: what is mounted.
        record: where the record of it is written.
    """

    def __init__(self, options: Options, record: Path) -> None:
        self._options = options
        self._record = record
        self._place = Path(options.place)
        self._workers: dict[int, tuple[int, float]] = {}  # row and start by pid
        self._resting: list[tuple[float, int]] = []  # when to start a row again, if its worker ended at once
        self._unmounting = False

    def __repr__(self) -> str:
        return f"<Keeper of {self._place} with {len(self._workers)} workers>"

    def run(self) -> None:
        """Mount and serve; returns when it is unmounted. Raises FileRefused."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        os.umask(0)
        base = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
        self._state = Path(tempfile.mkdtemp(prefix="virgo-mount-", dir=base))
        try:
            self._mount()
            self._look_after()
        finally:
            self._record.unlink(missing_ok=True)
            shutil.rmtree(self._state, ignore_errors=True)

    def _mount(self) -> None:
        config = configuration.load()
        encrypted = any(parse(peer.address).tls for peer in self._options.peers)
        self._tls = client_context(config.home, config.security) if encrypted else None
        counters.create(self._state / "counters")
        self._counts = counters.row(self._state / "counters", MOUNT_WORKERS_MAX)
        self._device = device.mount(self._place, shared=self._options.shared)
        self._minor = device.mounted_at(self._place) or 0
        try:
            wanted = WANTED if self._options.passes else WANTED & ~Can.PASSTHROUGH
            self._can = serving.greet(self._device, wanted)
            privileged = self._may_pass()
            if not privileged:
                self._can &= ~Can.PASSTHROUGH
            # Only who may take descriptors of each other's can share open files.
            default = min(os.cpu_count() or 1, MOUNT_WORKERS_MAX) if privileged else 1
            count = self._options.workers or default
            for row in range(min(count, MOUNT_WORKERS_MAX)):
                self._start(row)
            with contextlib.suppress(OSError):  # then it reads less at once
                device.read_ahead(self._minor, FUSE_IO_BYTES_MAX // KiB)
            self._note(count, passes=Can.PASSTHROUGH in self._can)
        except BaseException:
            device.unmount(self._place, busy_too=True)
            raise

    def _may_pass(self) -> bool:
        """Whether this process may register a file to be passed through; tried with one."""
        if Can.PASSTHROUGH not in self._can:
            return os.geteuid() == 0
        probe = os.open(self._state / "counters", os.O_RDONLY | os.O_CLOEXEC)
        try:
            device.backing_close(self._device, device.backing_open(self._device, probe))
        except OSError as error:
            log.warning("files are not passed through (%s): data goes through this process", error.strerror)
            return False
        finally:
            os.close(probe)
        return True

    def _note(self, workers: int, *, passes: bool) -> None:
        record = Record(
            place=str(self._place),
            process=ProcessMark.of(os.getpid()).to_json(),
            nodes=sorted({root.node for root in self._options.roots}),
            passes=passes,
            workers=workers,
            state_directory=str(self._state),
        )
        write_record(self._record, record)

    def _start(self, row: int) -> None:
        pid = os.fork()
        if pid:
            self._workers[pid] = (row, time.monotonic())
            return
        status = 1
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the keeper
            self._serve(row)
            status = 0
        except BaseException:
            log.exception("a worker of %s ends", self._place)
        finally:
            os._exit(status)

    def _serve(self, row: int) -> None:
        """A worker's life."""
        own = device.clone(self._device)
        os.close(self._device)
        counts = counters.row(self._state / "counters", row)
        table = Table(self._state)
        trees = self._trees(own, table, counts)
        handlers = FileSystem(Shown(table, trees)).handlers()
        serving.Server(own, handlers, counts).run(MOUNT_THREADS)

    def _trees(self, own: int, table: Table, counts: memoryview[int]) -> list[Tree]:
        silences = counters.silences(self._state / "counters")
        peers = self._options.peers
        nodes = {
            peer.number: FarNode(
                peer.name, Client(parse(peer.address), tls=self._tls), silences[index : index + 1]
            )
            for index, peer in enumerate(peers)
        }
        afar = {peer.name: nodes[peer.number] for peer in peers if peer.afar}
        trees: list[Tree] = []
        for number, root in enumerate(self._options.roots, 1):
            if root.node in afar:
                far = Far(afar[root.node], root.name)
                remote = RemoteOpens(own, table, always(far), counts)
                trees.append(RemoteTree(number, root, table, far, remote))
            else:
                passes = Can.PASSTHROUGH in self._can
                local = LocalOpens(own, table, passes=passes, counts=counts)
                trees.append(LocalTree(number, root, table, local))
        if peers:
            near = [nodes[peer.number] for peer in sorted(peers, key=lambda peer: parse(peer.address).tls)]
            trees.append(PoolTree(len(trees) + 1, table, nodes, near, own, counts))
        return trees

    def _look_after(self) -> None:
        while self._workers:
            received = signal.sigtimedwait(_WATCHED, 1.0)
            if received is not None and received.si_signo in _ENDING:
                self._unmount()
            self._reap()
            while self._resting and self._workers and self._resting[0][0] < time.monotonic():
                self._restart(self._resting.pop(0)[1])

    def _reap(self) -> None:
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            row, started = self._workers.pop(pid)
            if status == 0 or self._unmounting:
                continue
            log.error("a worker of %s ended with %s", self._place, os.waitstatus_to_exitcode(status))
            if time.monotonic() - started >= MOUNT_WORKER_LIFE_S:
                self._restart(row)
            elif self._workers:
                self._resting.append((time.monotonic() + MOUNT_WORKER_LIFE_S, row))
            else:
                self._unmount()

    def _restart(self, row: int) -> None:
        self._counts[counters.RESTARTS] += 1
        self._start(row)

    def _unmount(self) -> None:
        """Unmount, also from under those who use it; whoever waits for an answer gets an error."""
        self._unmounting = True
        with contextlib.suppress(OSError):  # somebody was faster
            device.unmount(self._place, busy_too=True)
        device.abort(self._minor)
        for pid in self._workers:
            os.kill(pid, signal.SIGTERM)


def check_place(place: Path) -> None:
    """Make the directory if need be, and take away what a killed mount has left there.

    Raises:
        FileRefused: something else is there.
    """
    if device.mounted_at(place) is not None:
        _clear(place)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with os.scandir(place) as entries:
            used = next(entries, None) is not None
    except OSError as error:
        raise FileRefused(
            f"{place} cannot be mounted on: {error.strerror}", hint="Name an empty directory, or a new one."
        ) from error
    if used:
        raise FileRefused(f"{place} is not empty", hint="Name an empty directory, or a new one.")


def _clear(place: Path) -> None:
    """Take a mount away whose processes are gone. Raises FileRefused if it answers."""
    try:
        os.statvfs(place)  # asked of those who serve it: of its attributes the kernel remembers some
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            device.unmount(place, busy_too=True)
            return
        log.warning("%s answers with %s", place, error.strerror)
    raise FileRefused(f"{place} is mounted already", hint=f"`virgo umount {place}` takes it away.")
