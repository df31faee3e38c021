"""`virgo down`, `status`, `nodes` and `modules`: what runs, and an end to it."""

from __future__ import annotations

from typing import Any

import typer

from virgo.cli import render
from virgo.cli.options import CLOUD, Home, Json, Node, connected, find_home, member, members
from virgo.clock import wall_ms

app = typer.Typer()


@app.command(rich_help_panel=CLOUD)
def down(as_json: Json = False, _home: Home = None) -> None:
    """Stop what `virgo up` started, and nothing else."""
    from virgo.errors import NotRunning
    from virgo.node.control import stop

    home = find_home()  # a broken configuration must not keep anybody from stopping
    try:
        with render.progress("stopping", quiet=as_json):
            stopped = stop(home)
    except NotRunning as error:  # what was wanted is so already
        stopped = []
        render.note(error.message)
    if as_json:
        render.print_json({"home": str(home), "stopped": stopped})
    elif stopped:
        nodes_first = sorted(stopped, key=lambda name: name.startswith("engine"))
        render.say(f"Stopped {', '.join(nodes_first)}.")


@app.command(rich_help_panel=CLOUD)
def status(as_json: Json = False, _home: Home = None) -> None:
    """Show the nodes with their load, and the engine."""
    from virgo.node.control import status as find

    shown = find(find_home())
    if as_json:
        # Scripts may rely on these keys even when nothing runs.
        shown["engine"] = {"url": "", "pid": 0, **shown["engine"]}
        render.print_json(shown)
    elif not shown["nodes"]:
        render.say(f"Nothing runs under {shown['home']}.")
        render.note("hint: `virgo up` starts a node.")
    else:
        show_status(shown)


@app.command(rich_help_panel=CLOUD)
def nodes(as_json: Json = False, _home: Home = None) -> None:
    """List the nodes, lost ones too: where and what they are."""
    found = members()
    if as_json:
        render.print_json(found)
        return
    rows = [
        (
            one.name,
            one.number,
            one.state,
            ("tls:" if one.tls else "") + (one.address or "-"),
            " ".join(f"{name}:{port}" for name, port in one.ports.items()) or "-",
            " ".join(name if state == "up" else f"{name} ({state})" for name, state in one.modules.items()),
            one.version,
        )
        for one in found
    ]
    columns = ("NODE", "NUMBER", "STATE", "ADDRESS", "PORTS", "MODULES", "VERSION")
    render.table(columns, rows, right=("NUMBER",), wrap=("PORTS", "MODULES"))


@app.command(rich_help_panel=CLOUD)
def modules(node: Node = "", as_json: Json = False, _home: Home = None) -> None:
    """List the modules of a node in load order."""
    found = _modules(node)
    if as_json:
        render.print_json(found)
        return
    rows = [
        (
            one["name"],
            one["state"],
            ", ".join(one["requires"]) or "-",
            one["commands"],
            one["restarts"],
            render.duration(one["since_s"]),
            one["error"] or one["summary"],
        )
        for one in found
    ]
    render.table(
        ("MODULE", "STATE", "NEEDS", "COMMANDS", "RESTARTS", "SINCE", "WHAT"),
        rows,
        right=("COMMANDS", "RESTARTS", "SINCE"),
        wrap=("WHAT",),
    )


def _modules(node: str) -> list[dict[str, Any]]:
    if not node:
        with connected() as cloud:
            return cloud.modules()
    from virgo.cloud import connect
    from virgo.kernel.load import machine_id

    found = member(node)
    here = found.machine == machine_id()
    port = next(iter(found.ports.values()), 0)
    place = f"unix:{found.socket}" if here else f"{'tls:' if found.tls else ''}{found.address}:{port}"
    with connect(place) as cloud:
        return cloud.modules()


def show_status(shown: dict[str, Any]) -> None:
    """The status as a table."""
    serving = sum(1 for node in shown["nodes"] if node["state"] == "up")
    total = len(shown["nodes"])
    up = render.count(total, "node") if serving == total else f"{serving} of {total} nodes"
    render.say(f"{up} up, home {shown['home']}")
    render.say(f"engine {_engine(shown['engine'])}")
    if serving and not shown["up"]:
        render.say(
            "nobody watches over these nodes: `virgo up` was killed; `virgo down` and `virgo up` mend it"
        )
    render.say()
    right = ("PID", "CALLS", "CPU WAIT", "MEM FREE", "POOL FREE", "DISK FREE", "UP FOR")
    render.table(("NODE", "STATE", *right), [_row(node) for node in shown["nodes"]], right=right)


def _row(node: dict[str, Any]) -> tuple[object, ...]:
    load = node["load"]
    if node["state"] != "up" or not load:
        return (node["name"], node["state"], node["pid"] or "-", *["-"] * 6)
    return (
        node["name"],
        node["state"],
        node["pid"],
        load["outstanding"],
        f"{load['cpu_pressure_percent']:.0f} %",
        render.size(load["memory_free_bytes"]),
        render.size(load["pool_free_bytes"]),
        render.size(load["disk_free_bytes"]),
        render.duration((wall_ms() - node["started_ms"]) / 1000),
    )


def _engine(engine: dict[str, Any]) -> str:
    if not engine.get("url"):
        return "not running"
    parts = [str(engine["url"])]
    if engine.get("pid"):
        parts.append(f"pid {engine['pid']}")
    if engine.get("version"):
        parts.append(f"nats-server {engine['version']}")
    if engine.get("replicas", 1) > 1:
        parts.append(f"replication {engine['replicas']}")
    if engine.get("connected") is False:
        parts.append("NOT CONNECTED")
    if engine.get("unsafe"):
        parts.append(f"UNSAFE: {'; '.join(engine['unsafe'])}")
    return ", ".join(parts)
