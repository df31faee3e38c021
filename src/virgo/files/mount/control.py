"""Mounts of this machine from outside: start one, find them, stop one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
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
from virgo.home import log_file, read_record
from virgo.kernel.fuse import device
from virgo.kernel.load import machine_id
from virgo.kernel.process import ProcessMark, terminate
from virgo.limits import MOUNT_START_S, NODE_STOP_S
from virgo.members import Member
from virgo.wire.address import Address
from virgo.wire.client import Client
from virgo.wire.tls import client_context

OPTIONS: Final = "VIRGO_MOUNT"
TELL: Final = "VIRGO_MOUNT_TELL"  # descriptor to which a failed start says why
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
        address = reach(member)
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


def reach(member: Member) -> Address | None:
    """Where a node is reached: by its socket on this machine, else by TLS; None if it listens to nobody."""
    if member.machine == machine_id() and member.socket:
        return Address(path=member.socket)
    port = member.ports.get("files", 0)
    return Address(host=member.address, port=port, tls=True) if member.address and port else None


def record_path(home: Path, place: Path) -> Path:
    """Where the record of a mount is: under its path, with what cannot stand in a name written out."""
    directory = home / "run" / "mounts"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return directory / (str(place).strip("/").replace("%", "%25").replace("/", "%2F") + ".json")


def run(home: Path, options: Options) -> None:
    """Mount in this process, until it is unmounted. Raises FileRefused."""
    place = Path(options.place)
    check_place(place)
    Keeper(options, record_path(home, place)).run()


def start(home: Path, options: Options) -> Record:
    """Mount in processes of their own; returns when it answers.

    Raises:
        FileRefused: it cannot be mounted there.
        NotRunning: it ended at its start, and the log says why.
    """
    place = Path(options.place)
    check_place(place)
    log = log_file(home, "mount")
    environment = {**os.environ, "VIRGO_HOME": str(home), OPTIONS: msgspec.json.encode(options).decode()}
    reading, writing = os.pipe()
    with log.open("ab") as output:
        started = subprocess.Popen(
            [sys.executable, "-m", "virgo.files.mount"],
            env={**environment, TELL: str(writing)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[writing],
            start_new_session=True,
        )
    os.close(writing)
    try:
        return _await(home, place, started, reading, log)
    finally:
        os.close(reading)
        started.returncode = started.returncode or 0  # it is not ours to wait for


def _await(home: Path, place: Path, started: subprocess.Popen[bytes], reading: int, log: Path) -> Record:
    deadline = time.monotonic() + MOUNT_START_S
    while time.monotonic() < deadline:
        record = find(home, place)
        if record is not None and record.process["pid"] == started.pid:
            return record
        if started.poll() is not None:
            said = os.read(reading, 65_536).decode("utf-8", "replace")
            if said:
                raise from_line(said)
            raise NotRunning(f"the mount of {place} ended at its start", hint=f"Its log is {log}.")
        time.sleep(_POLL_S)
    started.send_signal(signal.SIGTERM)
    raise NotRunning(f"{place} does not answer after {MOUNT_START_S:g} s", hint=f"The log is {log}.")


def find(home: Path, place: Path) -> Record | None:
    """The mount of a place, if one of this home is alive there."""
    found = read_record(record_path(home, place))
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
    left = read_record(record_path(home, place))
    if left is not None:  # who looked after it was killed, and could not tidy up
        shutil.rmtree(left["state_directory"], ignore_errors=True)
        record_path(home, place).unlink(missing_ok=True)


def _await_end(mark: ProcessMark) -> None:
    deadline = time.monotonic() + NODE_STOP_S
    while mark.alive() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    terminate(mark, 0.0)
