"""`virgo run`: a command on the best node, as if it ran here."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from virgo.cli import complete, render
from virgo.cli.data import write_bytes
from virgo.cli.options import WORK, Home, Json, Timeout, connected

if TYPE_CHECKING:
    from virgo.cloud import Cloud
    from virgo.cpu.futures import CpuFuture

app = typer.Typer()
_LOOK_S = 0.05
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

    command = Command(words, directory=directory)
    with connected() as cloud:
        future = cloud.cpu.submit_to(
            command, node="" if on == _BEST else on, cpus=cpus, gpus=gpus, memory=memory,
            timeout=timeout_s or None,
        )  # fmt: skip
        output = _follow(cloud, command.label, future, quiet=as_json)
        ran = future.result()
    if as_json:
        shown = {"node": ran.node, "status": ran.status, "task": ran.task}
        render.print_json({**shown, "output": output.decode("utf-8", "replace")})
    raise typer.Exit(ran.status)


def _follow(cloud: Cloud, label: str, future: CpuFuture, *, quiet: bool) -> bytes:
    """Show what the call writes until it has ended; all of it, if it is not shown."""
    from virgo.errors import BadArgument

    task, offset, kept = "", 0, b""
    while True:
        done = future.done()  # looked at first: what is there then is all
        if not task and done and future.exception() is None:
            task = future.result().task
        elif not task:
            task = next((one.task for one in cloud.cpu.tasks() if one.label == label), "")
        data = b""
        if task:
            try:
                written = cloud.cpu.output(task, offset)
            except BadArgument:  # it has written nothing
                written = None
            if written is not None:
                data, offset = written.data, written.offset + len(written.data)
        if quiet:
            kept += data
        elif data:
            write_bytes(data)
            sys.stdout.flush()
        if done and not data:
            return kept
        if not data:
            time.sleep(_LOOK_S)
