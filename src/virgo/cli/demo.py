"""`virgo demo`: a tour of about twenty seconds on three real nodes of this machine.

The nodes live under a directory of their own, see nothing of the user's configuration, and end with the
tour however it ends: at its end, on Ctrl-C, by a failure, and also when the tour itself is killed (then
the directory stays). Every claim that is printed was checked by the code; one that does not hold ends the
tour with status 1. The steps are in `tour_steps` and `tour_loss`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from virgo._version import __version__
from virgo.cli import tour_loss, tour_steps
from virgo.cli.tour_show import Show
from virgo.cli.tour_steps import Tour
from virgo.cloud import connect
from virgo.errors import BadArgument, NotRunning, PortTaken, VirgoError
from virgo.home import socket_path
from virgo.kernel.process import ProcessMark, terminate
from virgo.limits import NODE_STOP_S, MiB
from virgo.members import PORTS
from virgo.node import control
from virgo.node.supervisor import UpOptions

NODES: Final = ("n1", "n2", "n3")
# A guest on this machine: room for the 64 MiB region, no more than a few times that.
_CAPACITY_BYTES: Final = 256 * MiB
# A Unix socket's path may have 107 bytes; `/run/engine...sock` and the like come behind the directory.
_HOME_CHARS_MAX: Final = 70
_INTERRUPTED: Final = 130
_START_ATTEMPTS: Final = 3
_NEXT: Final = (
    ("virgo up --nodes 3 --detach", "the same cloud, to stay"),
    ("virgo status", "who is there, and how busy"),
    ("virgo call wordcount 'to be or not to be'", "on the least loaded node"),
    ("virgo ls /n2", "the files of n2"),
    ("python -c 'import virgo; print(virgo.virgo_clone(pow, 2, 10))'", "from Python"),
    ("REDISCLI_AUTH=$(cat ~/.virgo/token) redis-cli -p 30000 VIRGO_MALLOC 100", "from any language"),
    ("virgo down", "the end of it"),
)


def run(*, home: Path | None, port_offset: int, json_output: bool) -> int:
    """Run the tour; returns the exit status: 0, 1 if a claim does not hold, 130 when interrupted.

    Args:
        home: an absent or empty directory for the cloud, kept afterwards; None for a temporary one.
        port_offset: added to the ports; with 0 another one is found if the ports are taken.
        json_output: print one JSON object on stdout, and the lines on stderr.
    """
    show = Show(Console(stderr=json_output, highlight=False))
    figures: dict[str, Any] = {"version": __version__, "python": platform.python_version()}
    started = time.perf_counter()
    status = 0
    try:
        with _interruptible():
            _tour(home, port_offset, show, figures)
    except KeyboardInterrupt:
        status = _INTERRUPTED
        figures["failure"] = "interrupted"
        show.console.print("Interrupted; the nodes are stopped.", style="yellow")
    except VirgoError as error:
        status = 1
        figures["failure"] = str(error)
        show.console.print(f"FAILED  {error}", style="bold red", markup=False, soft_wrap=True)
    figures |= {"ok": status == 0, "seconds": round(time.perf_counter() - started, 3), "checks": show.checks}
    if json_output:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    elif status == 0:
        _farewell(show, figures["seconds"], home)
    return status


def _tour(home: Path | None, port_offset: int, show: Show, figures: dict[str, Any]) -> None:
    show.console.print("VIRGO: three nodes on this machine share processors, memory and files.", style="bold")
    with _directory(home) as place, _own_environment(place):
        try:
            with show.step("Three nodes start"):
                figures["start"] = _start(place, port_offset, show)
            with contextlib.ExitStack() as stack:
                clouds = {
                    name: stack.enter_context(connect(f"unix:{socket_path(place, name)}", home=place))
                    for name in NODES
                }
                tour = Tour(place, show, clouds)
                figures["words"] = tour_steps.count_words(tour)
                figures["memory"] = tour_steps.share_memory(tour)
                figures["files"] = tour_steps.share_files(tour)
                figures["loss"] = tour_loss.lose_a_node(tour)
            with show.step("Everything stops"):
                figures["stop"] = _stop(place, show)
        finally:
            _stop_all(place)
    if home is None:
        show.check("the temporary directory is gone", not place.exists(), otherwise=f"{place} is there")


def _start(home: Path, port_offset: int, show: Show) -> dict[str, Any]:
    started = time.perf_counter()
    with show.progress("starting the engine and three nodes", len(NODES)) as done:
        offset = _start_nodes(home, port_offset, done)
    seconds = time.perf_counter() - started
    status = control.status(home)
    up = [node["name"] for node in status["nodes"] if node["state"] == "up"]
    show.check(
        f"{', '.join(NODES)} serve after {seconds:.1f} s, on ports {PORTS['cpu'] + offset} to"
        f" {PORTS['analytics'] + offset + len(NODES) - 1} of 127.0.0.1",
        sorted(up) == list(NODES),
        otherwise=f"up are {up}",
    )
    if offset != port_offset:
        show.say("(the default ports are taken, so these are others)", style="dim")
    return {"seconds": round(seconds, 3), "port_offset": offset, "nodes": up}


def _start_nodes(home: Path, port_offset: int, done: Any) -> int:
    """Start them; returns the port offset that was free."""
    owner = ProcessMark.of(os.getpid()).to_json()
    offsets = _free_offsets() if port_offset == 0 else iter([port_offset])
    for attempt, offset in enumerate(offsets, 1):
        (home / "virgo.toml").write_text(
            f'[node]\nbind = "127.0.0.1"\nport_offset = {offset}\n\n'
            f"[memory]\ncapacity_bytes = {_CAPACITY_BYTES}\n"
        )
        serving: list[str] = []

        def progress(line: str, serving: list[str] = serving) -> None:
            serving.append(line)
            done(len(serving))

        try:
            control.start_detached(home, UpOptions(nodes=list(NODES), owner=owner), progress=progress)
        except PortTaken:
            _stop_all(home)
            if port_offset or attempt == _START_ATTEMPTS:
                raise  # else another program was faster; look again
        else:
            return offset
    raise PortTaken("no six ports for three nodes are free on 127.0.0.1", hint="Give --port-offset N.")


def _free_offsets() -> Iterator[int]:
    """Offsets at which all ports of the three nodes are free now, the default first."""
    for offset in range(0, 65_535 - PORTS["analytics"] - len(NODES), 10):
        if all(_is_free(port + offset + index) for port in PORTS.values() for index in range(len(NODES))):
            yield offset


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


# --- leaving nothing behind -----------------------------------------------------------------


def _stop(home: Path, show: Show) -> dict[str, Any]:
    """`virgo down`, and a look whether it was thorough."""
    started = time.perf_counter()
    control.stop(home)
    left = _processes(home)
    seconds = time.perf_counter() - started
    show.check(
        f"no process of the cloud is left {seconds:.1f} s after `virgo down`",
        not left,
        otherwise=f"these are: {[mark.pid for mark in left]}",
    )
    return {"seconds": round(seconds, 3)}


def _stop_all(home: Path) -> None:
    """Stop what still runs under this home, in whatever state it is; nothing that is not ours."""
    with _uninterrupted():
        with contextlib.suppress(NotRunning):
            control.stop(home)
        # A start that was interrupted has left no records yet; its supervisor, the oldest, goes first.
        for mark in _processes(home):
            terminate(mark, 2 * NODE_STOP_S)


def _processes(home: Path) -> list[ProcessMark]:
    """Living processes that were started for this home, by their own environment; the oldest first."""
    wanted = f"VIRGO_HOME={home}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError, NotRunning):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                mark = ProcessMark.of(int(entry.name))
                found.append((int(mark.started.partition(":")[2]), mark))
    return [mark for _, mark in sorted(found, key=lambda pair: pair[0])]


@contextlib.contextmanager
def _directory(home: Path | None) -> Iterator[Path]:
    """The given directory, or a temporary one that is removed at the end."""
    if home is not None:
        if home.exists() and any(home.iterdir()):
            raise BadArgument(f"{home} is not empty", hint="The tour wants a directory of its own.")
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        yield home.absolute()
        return
    parent = tempfile.gettempdir()
    if len(parent) > _HOME_CHARS_MAX:
        parent = "/tmp"  # noqa: S108 - mkdtemp makes a name of its own there
    made = Path(tempfile.mkdtemp(prefix="virgo-demo-", dir=parent))
    try:
        yield made
    finally:
        with _uninterrupted():
            shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _own_environment(home: Path) -> Iterator[None]:
    """Keep the user's VIRGO settings, and the machine's, away from the nodes of the tour."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("VIRGO_")}
    for name in kept:
        del os.environ[name]
    (home / "virgo_cloud.conf").touch()  # else one in /etc would name machines to join
    (home / "virgo.toml").touch()
    os.environ |= {"VIRGO_HOME": str(home), "VIRGO_CONFIG": str(home / "virgo.toml")}
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("VIRGO_")]:
            del os.environ[name]
        os.environ |= kept


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Take SIGTERM and SIGHUP as Ctrl-C, so that they too leave nothing behind."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handling(interrupt, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let nothing interrupt the cleaning up."""
    with _handling(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield


@contextlib.contextmanager
def _handling(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's alone
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _farewell(show: Show, seconds: float, home: Path | None) -> None:
    left = "Nothing of it is left." if home is None else f"Its files are in {home}."
    show.console.print()
    show.console.print(
        f"{len(show.checks)} claims checked in {seconds:.1f} s. {left} To go on:",
        style="bold",
    )
    activate = Path(sys.prefix) / "bin" / "activate"
    found = shutil.which("virgo")
    if activate.exists() and (found is None or Path(found).parent != activate.parent):
        show.say(f". {activate}", style="cyan")
    width = max(len(command) for command, _ in _NEXT)
    for command, meaning in _NEXT:
        line = Text("   ").append(command.ljust(width), style="cyan").append(f"  {meaning}", style="dim")
        show.console.print(line, soft_wrap=True)
