"""`virgo mount`, `umount`, `mounts`: the cloud as a directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from virgo.cli import render
from virgo.cli.options import WORK, Home, Json, connected, find_home, settings

app = typer.Typer()
Place = Annotated[
    Path | None,
    typer.Argument(metavar="DIRECTORY", help="Where; /mnt/virgo, or ~/virgo for who is not root."),
]


def _place(given: Path | None) -> Path:
    default = Path("/mnt/virgo") if os.geteuid() == 0 else Path.home() / "virgo"
    return Path(os.path.abspath((given or default).expanduser()))  # noqa: PTH100 - a link in it may be broken


@app.command(rich_help_panel=WORK)
def mount(
    directory: Place = None,
    private: Annotated[bool, typer.Option("--private", help="For this user alone.")] = False,
    no_passthrough: Annotated[
        bool, typer.Option("--no-passthrough", help="Let all data go through the server.")
    ] = False,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Run until it is unmounted.")
    ] = False,
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """Show the files of the cloud below a directory."""
    import msgspec

    from virgo.files.mount import control
    from virgo.files.mount.process import Options

    home, place = find_home(), _place(directory)
    with connected() as cloud:
        roots, peers = control.survey(cloud.client, settings())
    options = Options(str(place), roots, peers, shared=not private, passes=not no_passthrough)
    if foreground:
        control.run(home, options)
        return
    record = control.start(home, options)
    if as_json:
        render.print_json(msgspec.to_builtins(record))
        return
    render.say(f"{place} shows {', '.join(record.nodes)} and the pool")
    if not record.passes:
        render.note("Data goes through the server: to pass files through takes CAP_SYS_ADMIN and Linux 6.9.")
    render.note(f"`virgo umount {place}` takes it away.")


@app.command(rich_help_panel=WORK)
def umount(
    directory: Place = None,
    force: Annotated[bool, typer.Option("--force", help="Also if it is in use.")] = False,
    _home: Home = None,
) -> None:
    """Take a mount away."""
    from virgo.files.mount import control

    control.stop(find_home(), _place(directory), force=force)


@app.command(rich_help_panel=WORK)
def mounts(as_json: Json = False, _home: Home = None) -> None:
    """List mounts of this machine, and what they have done."""
    import msgspec

    from virgo.files.mount import control

    found = [(record, control.stats(record)) for record in control.mounts(find_home())]
    if as_json:
        render.print_json([{**msgspec.to_builtins(record), "stats": stats} for record, stats in found])
        return
    rows = [
        (
            record.place,
            ", ".join(record.nodes),
            "kernel" if record.passes else "server",
            record.workers,
            sum(stats["upcalls"].values()),
            stats["faults"],
        )
        for record, stats in found
    ]
    render.table(("DIRECTORY", "NODES", "DATA BY", "WORKERS", "UPCALLS", "FAULTS"), rows)
