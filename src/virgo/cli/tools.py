"""`virgo doctor`, `demo`, `version` and `systemd-unit`: care of an installation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from virgo.cli import render
from virgo.cli.options import CARE, Home, Json, settings
from virgo.cli.up import Advertise, Bind, Engines, Join, Name, Nodes, PortOffset, as_environment, check_ports

app = typer.Typer()


@app.command(rich_help_panel=CARE)
def doctor(
    nodes: Nodes = 1,
    port_offset: PortOffset = None,
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """Check machine and installation; say how to mend them."""
    from virgo.cli.diagnosis import examine, show

    found = examine(as_environment(port_offset=port_offset), nodes=nodes)
    if as_json:
        render.print_json({"ok": not any(one.state == "fail" for one in found), "checks": found})
    else:
        show(found)
    if any(one.state == "fail" for one in found):
        raise typer.Exit(1)


@app.command(rich_help_panel=CARE)
def demo(port_offset: PortOffset = None, as_json: Json = False, home: Home = None) -> None:
    """Take the tour: three nodes, used, broken and gone again."""
    from virgo.cli.demo import NODES, run
    from virgo.members import check_port_offset

    check_port_offset(port_offset or 0, len(NODES))
    raise typer.Exit(run(home=home, port_offset=port_offset or 0, json_output=as_json))


@app.command(rich_help_panel=CARE)
def version(as_json: Json = False) -> None:
    """Print the version."""
    print_version(as_json=as_json)


@app.command("systemd-unit", rich_help_panel=CARE)
def systemd_unit(
    user: Annotated[str, typer.Option("--user", help="Who runs it; root if not given.")] = "",
    group: Annotated[str, typer.Option("--group", help="Its group.")] = "",
    nodes: Nodes = 1,
    join: Join = None,
    port_offset: PortOffset = None,
    name: Name = "",
    bind: Bind = None,
    advertise: Advertise = None,
    engines: Engines = 1,
    _home: Home = None,
) -> None:
    """Print a systemd unit for `virgo up` with these options."""
    from virgo.kernel.systemd import unit

    config = settings(as_environment(port_offset=port_offset, bind=bind))
    check_ports(config, nodes)
    options = {"--nodes": nodes, "--port-offset": port_offset, "--name": name, "--bind": bind}
    options |= {"--advertise": advertise, "--engines": engines}
    command = [*_command(), "up"]
    for option, value in options.items():
        if value not in (None, "") and not (option in ("--nodes", "--engines") and value == 1):
            command += [option, str(value)]
    for host in join or ():
        command += ["--join", host]
    exports = config.files.exports
    writable = [Path(path) for key, path in exports.items() if key not in config.files.read_only]
    sys.stdout.write(unit(command, home=config.home, user=user, group=group, writable=writable))
    render.note(
        "Save it as /etc/systemd/system/virgo.service, then: systemctl enable --now virgo."
        f" {config.home} must exist and belong to the user."
    )


def _command() -> list[str]:
    """How this very program is started, by absolute path."""
    script = Path(sys.executable).with_name("virgo")
    return [str(script)] if script.exists() else [sys.executable, "-m", "virgo.cli"]


def print_version(*, as_json: bool = False) -> None:
    """The version, as text or with those of what is beneath."""
    from virgo._version import __version__

    if not as_json:
        render.say(f"virgo {__version__}")
        return
    import platform

    python = platform.python_version()
    render.print_json({"virgo": __version__, "python": python, "kernel": platform.release()})
