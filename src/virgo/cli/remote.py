"""`virgo run`: a command on the best node, as if it ran here."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from virgo.cli import complete, render
from virgo.cli.data import write_bytes
from virgo.cli.options import WORK, Home, Json, Timeout, connected

app = typer.Typer()
_BEST = "best"


@app.command(
    rich_help_panel=WORK,
    # Behind the command every word is its own, even one with a dash.
    context_settings={"allow_interspersed_args": False},
)
def run(
    words: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="The command and its words.")],
    on: Annotated[
        str,
        typer.Option(
            "--on", metavar="NODE", autocompletion=complete.node_names, help="The node; best: least loaded."
        ),
    ] = _BEST,
    cpus: Annotated[int, typer.Option("--cpus", metavar="N", help="Processors that it takes.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", help="GPUs of its own.")] = 0,
    memory: Annotated[
        str, typer.Option("--memory", metavar="SIZE", help="What each of its processes may hold: 2GiB.")
    ] = "0",
    directory: Annotated[str, typer.Option("--directory", metavar="DIR", help="Where it begins there.")] = "",
    timeout_s: Timeout = 0.0,
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """Run a command on a node, without input.

    What it writes appears here as it comes, and this ends with its exit status. Ctrl-C stops it there.
    """
    from virgo.cpu.command import Command

    written: list[bytes] = []
    with connected() as cloud:
        ran = cloud.cpu.clone(
            Command(words, directory=directory), node="" if on == _BEST else on, cpus=cpus, gpus=gpus,
            memory=memory, timeout=timeout_s or None, output=written.append if as_json else _show,
        )  # fmt: skip
    if as_json:
        shown = {"node": ran.node, "status": ran.status, "task": ran.task}
        render.print_json({**shown, "output": b"".join(written).decode("utf-8", "replace")})
    raise typer.Exit(ran.status)


def _show(data: bytes) -> None:
    write_bytes(data)
    sys.stdout.flush()
