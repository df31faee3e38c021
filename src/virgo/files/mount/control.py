"""Mounts of this machine from outside: start one, find them, stop one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import msgspec

from virgo.config import Config
from virgo.errors import FileRefused, NodeLost, NotRunning, VirgoError, from_line
from virgo.files.mount import counters
from virgo.files.mount.process import Keeper, Options, Peer, Record, check_place
from virgo.files.roots import Root
from virgo.home import log_file, mount_record_path, read_record
from virgo.kernel.fuse import device
from virgo.kernel.load import machine_id
from virgo.kernel.process import ProcessMark, spawn, terminate
from virgo.limits import MOUNT_START_S, NODE_STOP_S
from virgo.members import Member
from virgo.wire.address import of_member
from virgo.wire.client import Client
from virgo.wire.tls import client_context

OPTIONS: Final = "VIRGO_MOUNT"
FAILURE: Final = "VIRGO_MOUNT_FAILURE"  # where a failed start says why
_POLL_S: Final = 0.02


def survey(client: Client, config: Config, *, afar: Collection[str] = ()) -> tuple[list[Root], list[Peer]]:
    """What the nodes of the cloud have, asked of each, and where they are reached.

    Args:
        client: of any node.
        config: of this machine, whose certificate opens the way to the others.
        afar: nodes to be taken for those of another machine, as tests and benchmarks do.

    Raises:
        NotRunning: no node that can be asked has files.
    """
    roots: list[Root] = []
    peers: list[Peer] = []
    for member in msgspec.json.decode(client.execute("NODES"), type=list[Member]):
        address = of_member(member, machine_id())
        if address is None:
            continue
        tls = client_context(config.home, config.security) if address.tls else None
        with contextlib.suppress(NotRunning, NodeLost), Client(address, tls=tls) as asked:
            roots += msgspec.json.decode(asked.execute("FILES.ROOTS"), type=list[Root])
            elsewhere = not address.path or member.name in afar
            peers.append(Peer(member.name, member.number, str(address), elsewhere))
    if not roots:
        raise NotRunning("no node can be reached whose files could be mounted", hint="`virgo up` starts one.")
    return roots, peers


def run(home: Path, options: Options) -> None:
    """Mount in this process, until it is unmounted. Raises FileRefused."""
    place = Path(options.place)
    check_place(place)
    Keeper(options, mount_record_path(home, place)).run()


def start(home: Path, options: Options) -> Record:
    """Mount in processes of their own; returns when it answers.

    Raises:
        FileRefused: it cannot be mounted there.
        NotRunning: it ended at its start, and the log says why.
    """
    place = Path(options.place)
    check_place(place)
    log, failure = log_file(home, "mount"), _failure_path(home, os.getpid())
    words = msgspec.json.encode(options).decode()
    environment = {**os.environ, "VIRGO_HOME": str(home), OPTIONS: words, FAILURE: str(failure)}
    pid = spawn("virgo.files.mount", environment, log)
    deadline = time.monotonic() + MOUNT_START_S
    while time.monotonic() < deadline:
        record = find(home, place)
        if record is not None and record.process["pid"] == pid:
            return record
        if os.waitpid(pid, os.WNOHANG)[0]:
            reason = read_record(failure)
            failure.unlink(missing_ok=True)
            if reason:
                raise from_line(str(reason["error"]))
            raise NotRunning(f"the mount of {place} ended at its start", hint=f"Its log is {log}.")
        time.sleep(_POLL_S)
    os.kill(pid, signal.SIGTERM)
    raise NotRunning(f"{place} does not answer after {MOUNT_START_S:g} s", hint=f"The log is {log}.")


def _failure_path(home: Path, pid: int) -> Path:
    """Where a mount that the process of that pid has started says why it cannot be."""
    return mount_record_path(home, Path(f"{pid}.failure")).with_suffix("")


def find(home: Path, place: Path) -> Record | None:
    """The mount of a place, if one of this home is alive there."""
    found = read_record(mount_record_path(home, place))
    if found is None:
        return None
    record = msgspec.convert(found, Record)
    return record if ProcessMark.from_json(record.process).alive() else None


def mounts(home: Path) -> list[Record]:
    """All mounts of this home that are alive."""
    records = [read_record(path) for path in sorted((home / "run" / "mounts").glob("*.json"))]
    found = [msgspec.convert(record, Record) for record in records if record is not None]
    return [record for record in found if ProcessMark.from_json(record.process).alive()]


def stats(record: Record) -> dict[str, Any]:
    """What a mount has done: `upcalls` by operation, files passed through and served, faults, ..."""
    return counters.read(Path(record.state_directory) / "counters")


def stop(home: Path, place: Path, *, force: bool = False) -> None:
    """Unmount; `force`: also from under those who use it.

    Raises:
        NotRunning: nothing of the cloud is mounted there.
        FileRefused: it is in use.
    """
    record = find(home, place)
    if device.mounted_at(place) is None:
        raise NotRunning(f"nothing of the cloud is mounted on {place}", hint="`virgo mounts` lists them.")
    try:
        device.unmount(place, busy_too=force)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise FileRefused(
                f"unmount {str(place)!r}: it is in use (EBUSY)",
                hint="Close what uses it (`fuser -vm` names it), or --force: then its users get errors.",
            ) from error
        if error.errno != errno.EINVAL:  # somebody was faster
            raise FileRefused(
                f"unmount {str(place)!r}: {error.strerror} (EPERM)", hint="Be who mounted it."
            ) from error
    if record is not None:
        mark = ProcessMark.from_json(record.process)
        if force:
            with contextlib.suppress(VirgoError):
                mark.signal(signal.SIGTERM)
        _await_end(mark)
    left = read_record(mount_record_path(home, place))
    if left is not None:  # who looked after it was killed, and could not tidy up
        shutil.rmtree(left["state_directory"], ignore_errors=True)
        mount_record_path(home, place).unlink(missing_ok=True)


def _await_end(mark: ProcessMark) -> None:
    deadline = time.monotonic() + NODE_STOP_S
    while mark.alive() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    terminate(mark, 0.0)
