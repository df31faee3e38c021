"""`virgo up`: nodes on this machine, in the background or in front.

Options become environment variables of the node processes (`VIRGO_NODE_PORT_OFFSET=700`), so that what
is not asked for comes from the configuration. In front, the command is the supervisor itself: it runs
until Ctrl-C and then stops all. With --detach it returns when the nodes serve.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from virgo.cli import render
from virgo.cli.cloud import show_status
from virgo.cli.options import CLOUD, Home, Json, settings, within
from virgo.limits import LOCAL_NODES_MAX, PORT_OFFSET_MAX

if TYPE_CHECKING:
    import asyncio

    from virgo.config import Config
    from virgo.node.supervisor import UpOptions

app = typer.Typer()
_ENGINE_SIZES = (1, 3, 5)
_NEXT = (
    ("virgo call hostname", "runs a function on the least loaded node"),
    ("virgo malloc 100", "gives an id for `virgo set` and `virgo get`"),
    ("virgo ls /", "shows the files of all nodes"),
    ("virgo doctor", "checks this machine"),
)


def _engine_size(value: int) -> int:
    if value not in _ENGINE_SIZES:
        raise typer.BadParameter("an engine has 1, 3 or 5 servers, so that a majority is clear.")
    return value


Nodes = Annotated[
    int,
    typer.Option(
        "--nodes", metavar="N", callback=within(1, LOCAL_NODES_MAX), help="How many nodes to run here."
    ),
]
Join = Annotated[
    list[str] | None,
    typer.Option("--join", metavar="HOST", help="Join the cloud of this machine; repeatable."),
]
PortOffset = Annotated[
    int | None,
    typer.Option(
        "--port-offset",
        metavar="N",
        callback=within(0, PORT_OFFSET_MAX),
        help=f"Add this to every port, 0 to {PORT_OFFSET_MAX}.",
        show_default=False,
    ),
]
Name = Annotated[
    str, typer.Option("--name", help="Name of the node, n1 if it stays alone.", show_default=False)
]
Bind = Annotated[
    str | None,
    typer.Option("--bind", metavar="ADDRESS", help="Where the ports listen; beyond loopback with TLS."),
]
Advertise = Annotated[
    str | None, typer.Option("--advertise", metavar="HOST", help="Where other machines reach this one.")
]
Engines = Annotated[
    int,
    typer.Option(
        "--engines", metavar="1|3|5", callback=_engine_size, help="Servers of the embedded engine here."
    ),
]
UnsafeEngine = Annotated[
    bool, typer.Option("--unsafe-engine", help="Accept an engine that can lose acknowledged data.")
]


@app.command(rich_help_panel=CLOUD)
def up(
    nodes: Nodes = 1,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when the nodes serve.")] = False,
    join: Join = None,
    port_offset: PortOffset = None,
    name: Name = "",
    bind: Bind = None,
    advertise: Advertise = None,
    engines: Engines = 1,
    unsafe_engine: UnsafeEngine = False,
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """Start nodes on this machine.

    They are a cloud of their own, or join one (--join). Without --detach it runs until Ctrl-C.
    """
    from virgo.node.supervisor import UpOptions

    options = UpOptions(
        nodes=node_names(nodes, name, joining=bool(join)),
        engines=engines,
        environment=as_environment(
            port_offset=port_offset, bind=bind, advertise=advertise, join=join, unsafe_engine=unsafe_engine
        ),
    )
    config = settings(options.environment)
    check_ports(config, nodes)
    if detach:
        _start_detached(config, options, as_json=as_json)
    else:
        _run_in_front(config, options, as_json=as_json)


def check_ports(config: Config, nodes: int) -> None:
    """Raise BadArgument if the nodes would have ports that do not exist; without `bind` they have none."""
    from virgo.members import check_port_offset

    if config.node.bind:
        check_port_offset(config.node.port_offset, nodes)


def node_names(nodes: int, name: str, *, joining: bool) -> list[str]:
    """What the nodes are called: n1, n2, ...; with a base name NAME, or NAME-1, NAME-2, ...

    A machine that joins uses its host name as base, for n1 is taken there.

    Raises:
        BadArgument: a name cannot be a node's.
    """
    from virgo.home import check_name

    base = name or (_host_name() if joining else "")
    if not base:
        return [f"n{index}" for index in range(1, nodes + 1)]
    if nodes == 1:
        return [check_name(base)]
    return [check_name(f"{base}-{index}") for index in range(1, nodes + 1)]


def _host_name() -> str:
    plain = "".join(char if char.isascii() and char.isalnum() else "-" for char in socket.gethostname())
    return plain.strip("-")[:40] or "node"


def as_environment(
    *,
    port_offset: int | None = None,
    bind: str | None = None,
    advertise: str | None = None,
    join: list[str] | None = None,
    unsafe_engine: bool = False,
) -> dict[str, str]:
    """The options that were given, as the variables from which every process of the cloud reads them."""
    found: dict[str, str] = {}
    if port_offset is not None:
        found["VIRGO_NODE_PORT_OFFSET"] = str(port_offset)
    if bind is not None:
        found["VIRGO_NODE_BIND"] = bind
    if advertise is not None:
        found["VIRGO_NODE_ADVERTISE"] = advertise
    if join:
        found["VIRGO_NODE_JOIN"] = json.dumps(join)
    if unsafe_engine:
        found["VIRGO_ENGINE_UNSAFE"] = "true"
    if os.environ.get("VIRGO_CONFIG"):
        # Nodes start in another directory: a relative name would not be found there.
        found["VIRGO_CONFIG"] = str(Path(os.environ["VIRGO_CONFIG"]).absolute())
    return found


def _start_detached(config: Config, options: UpOptions, *, as_json: bool) -> None:
    from virgo.node.control import start_detached

    with render.progress("starting", quiet=as_json) as step:
        told: set[str] = set()

        def tell(text: str) -> None:
            told.add(text)
            step(text)

        start_detached(config.home, options, progress=tell)
        for name in options.nodes:  # the last may have come up between two looks
            if f"node {name} serves" not in told:
                step(f"node {name} serves")
    _report(config, options, as_json=as_json)
    if not as_json:
        render.note("It runs in the background; `virgo down` stops it.")


def _run_in_front(config: Config, options: UpOptions, *, as_json: bool) -> None:
    import asyncio

    from virgo.kernel.systemd import notify, watchdog_interval_s
    from virgo.node.supervisor import supervise

    logging.basicConfig(level=logging.WARNING, format="virgo: %(message)s", stream=sys.stderr)
    reports: list[asyncio.Future[None]] = []

    async def beat() -> None:
        """Tell systemd that the supervisor is alive, if it asks."""
        while interval_s := watchdog_interval_s():
            notify("WATCHDOG=1")
            await asyncio.sleep(interval_s / 2)

    async def run() -> None:
        beats = asyncio.create_task(beat(), name="watchdog")
        with contextlib.ExitStack() as shown:
            step = shown.enter_context(render.progress("starting", quiet=as_json))

            def serving() -> None:
                shown.close()
                # In a thread: it asks the nodes, and waits for them.
                reports.append(asyncio.get_running_loop().run_in_executor(None, report))

            await supervise(config, options, progress=step, serving=serving)
        beats.cancel()
        await asyncio.gather(*reports)

    def report() -> None:
        _report(config, options, as_json=as_json)
        if not as_json:
            render.note("Ctrl-C stops it.")

    asyncio.run(run())
    if not reports:
        raise KeyboardInterrupt  # told to stop before anything served
    render.note("stopped")


def _report(config: Config, options: UpOptions, *, as_json: bool) -> None:
    """Show what runs, and how to go on."""
    from virgo.node.control import status

    shown = status(config.home)
    if as_json:
        render.print_json(shown)
        return
    show_status(shown)
    for node in shown["nodes"]:
        for module, state in node.get("modules", {}).items():
            if state != "up":
                render.note(f"{node['name']}: the module {module} is {state}; `virgo modules` says why")
    render.say()
    width = max(len(command) for command, _ in _NEXT)
    home = "" if "VIRGO_HOME" not in os.environ else f"  (VIRGO_HOME={config.home})"
    render.say(f"Go on with:{home}")
    for command, what in _NEXT:
        render.say(f"  {command:<{width}}  {what}")
