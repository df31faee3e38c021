"""Start, find and stop what `virgo up` runs, from outside: by records and marks, never by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from virgo.errors import DiskFull, NotLoaded, NotRunning, VirgoError, from_line
from virgo.home import log_file, read_record, record_path, run_directory, socket_path
from virgo.kernel.process import ProcessMark, spawn, terminate
from virgo.limits import NODE_START_S, NODE_STOP_S, START_ROOM_BYTES
from virgo.members import Member
from virgo.wire.address import Address
from virgo.wire.call import Call
from virgo.wire.client import Client

if TYPE_CHECKING:
    from virgo.node.supervisor import UpOptions

RECORD: Final = "up"


def _members(reply: Any) -> list[Member]:
    return msgspec.json.decode(reply, type=list[Member])


# Who is up, as any node says.
NODES: Final[Call[list[Member]]] = Call(("NODES",), _members)
_POLL_S = 0.05


def running(home: Path) -> dict[str, Any] | None:
    """The record of the running supervisor, or None."""
    record = read_record(record_path(home, RECORD))
    if record is None or not ProcessMark.from_json(record["process"]).alive():
        return None
    return record


def unsettled(home: Path) -> bool:
    """Whether what runs here is still starting, or about to end: told to, or its owner is gone."""
    record = running(home)
    if record is None:
        return False
    owner = record.get("owner")
    return record["state"] != "serving" or (owner is not None and not ProcessMark.from_json(owner).alive())


def leftovers(home: Path) -> dict[str, ProcessMark]:
    """Living processes that records name: nodes, and the engine's servers."""
    found: dict[str, ProcessMark] = {}
    for path in sorted((home / "run").glob("*.json")):
        record = read_record(path)
        if record is None or path.stem == RECORD or "process" not in record:
            continue
        mark = ProcessMark.from_json(record["process"])
        if mark.alive():
            found[path.stem] = mark
    return found


def stop_leftovers(home: Path) -> list[str]:
    """Stop nodes first, then the engine; returns their names."""
    found = leftovers(home)
    for name in sorted(found, key=lambda name: name.startswith("engine")):
        terminate(found[name], NODE_STOP_S)
        record_path(home, name).unlink(missing_ok=True)
    return list(found)


def check_room(home: Path) -> None:
    """Raise DiskFull if there is not even room to start and to write a log."""
    place = next(each for each in (home, *home.absolute().parents) if each.exists())
    found = os.statvfs(place)
    if found.f_bavail * found.f_frsize < START_ROOM_BYTES:
        raise DiskFull(f"the disk under {home} is full", hint="Make room, or put VIRGO_HOME on another disk.")


def failure_path(home: Path, pid: int) -> Path:
    """Where the supervisor with that pid says why it did not start: several may try at once."""
    return record_path(home, f"{RECORD}-{pid}.failure")


def start_detached(
    home: Path, options: UpOptions, *, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Start a supervisor of its own session; returns when all nodes serve.

    Raises:
        VirgoError: what kept it from that.
    """
    run_directory(home)
    environment = {
        **os.environ,
        **options.environment,
        "VIRGO_HOME": str(home),
        "VIRGO_UP": msgspec.json.encode(options).decode(),
    }
    pid = spawn("virgo.node.supervisor", environment, log_file(home, RECORD))
    try:
        _await_serving(home, options, pid, progress)
    except KeyboardInterrupt:  # who gives up the wait does not want the cloud either
        os.kill(pid, signal.SIGTERM)
        _await_end(pid)
        raise


def _await_end(pid: int) -> None:
    """Wait for a supervisor that was told to stop."""
    deadline = time.monotonic() + 4 * NODE_STOP_S
    while not os.waitpid(pid, os.WNOHANG)[0] and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _await_serving(home: Path, options: UpOptions, pid: int, progress: Callable[[str], None]) -> None:
    """Return when all nodes serve. Raises what kept them from that."""
    deadline = time.monotonic() + 2 * NODE_START_S
    told: set[str] = set()
    while time.monotonic() < deadline:
        record = read_record(record_path(home, RECORD))
        mine = record is not None and record["process"]["pid"] == pid
        if record is not None and mine and record["state"] == "serving":
            return
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            reason = read_record(failure_path(home, pid))
            failure_path(home, pid).unlink(missing_ok=True)
            if reason:
                raise from_line(str(reason["error"]))
            if not status:
                raise NotRunning("`virgo up` was told to stop while it started", hint="Start it again.")
            check_room(home)  # without it the log may say nothing
            raise NotRunning(
                f"`virgo up` ended at its start with status {os.waitstatus_to_exitcode(status)}",
                hint=f"Its log is {log_file(home, RECORD)}.",
            )
        for name in options.nodes:
            if mine and name not in told and record_path(home, name).exists():
                told.add(name)
                progress(f"node {name} serves")
        time.sleep(_POLL_S)
    os.kill(pid, signal.SIGTERM)
    raise NotRunning(
        f"the nodes do not serve after {2 * NODE_START_S:g} s", hint=f"The logs are in {home / 'log'}."
    )


def stop(home: Path) -> list[str]:
    """Stop what `virgo up` started under this home; returns what was stopped.

    Raises:
        NotRunning: nothing runs here, or only what ends with the program that started it.
    """
    record = running(home)
    if record is not None and record.get("owner") is not None:
        owner = ProcessMark.from_json(record["owner"])
        if owner.alive() and owner.pid != os.getpid():
            raise NotRunning(
                f"no `virgo up` runs under {home}: the node there was started by the program with pid"
                f" {owner.pid}, and ends with it",
                hint=f"`kill {owner.pid}` ends that program, and the node with it.",
            )
    found = list(leftovers(home))
    if record is None and not found:
        raise NotRunning(f"nothing runs under {home}", hint="`virgo up` starts a cloud.")
    if record is not None:
        mark = ProcessMark.from_json(record["process"])
        mark.signal(signal.SIGTERM)
        deadline = time.monotonic() + 4 * NODE_STOP_S
        while mark.alive() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if mark.alive():
            terminate(mark, 0.0)
    return sorted({*found, *stop_leftovers(home)})


def local_nodes(home: Path) -> list[str]:
    """Names of nodes whose sockets are here, serving ones first."""
    names = [path.stem for path in sorted((home / "run").glob("*.sock"))]
    return sorted(names, key=lambda name: not record_path(home, name).exists())


def any_client(home: Path, *, timeout_s: float = 5.0) -> Client:
    """A client of a node under this home that answers.

    Raises:
        NotRunning: none does.
    """
    for name in local_nodes(home):
        client = Client(Address(path=str(socket_path(home, name))), timeout_s=timeout_s)
        try:
            client.execute("PING")
        except VirgoError:
            client.close()
            continue
        return client
    raise NotRunning(f"no node runs under {home}", hint="`virgo up` starts one.")


def status(home: Path) -> dict[str, Any]:
    """The cloud as `virgo status --json` shows it; without nodes if none answers."""
    record = running(home) or {}
    engine = dict(record.get("engine") or {})
    shown: list[dict[str, Any]] = []
    try:
        with any_client(home) as client:
            members = msgspec.json.decode(client.execute("NODES", "ALL"), type=list[Member])
            own = msgspec.json.decode(client.execute("STATUS"))
            engine = {**own["engine"], **engine}
            if "pid" not in engine:  # whoever started it is gone
                marks = leftovers(home)
                engine["pid"] = next((marks[name].pid for name in marks if name.startswith("engine")), None)
            shown = [msgspec.to_builtins(member) for member in members]
    except (NotRunning, NotLoaded):  # the second by a node that has only just begun to start
        pass
    known = {entry["name"] for entry in shown}
    for name in record.get("nodes", []):
        if name not in known:
            shown.append(
                {"name": name, "id": "", "pid": 0, "state": "down", "socket": "", "ports": {}, "load": {}}
            )
    return {"home": str(home), "nodes": shown, "engine": engine, "up": record.get("process", {}).get("pid")}
