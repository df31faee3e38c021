"""`virgo ps`, `virgo logs`, `virgo kill`: what the nodes are at, what a call has written, and ending it."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from virgo.cli import complete, render
from virgo.cli.data import write_bytes
from virgo.cli.options import WORK, Home, Json, connected

app = typer.Typer()
_COLUMNS = ("TASK", "NODE", "STATE", "FOR", "CALLS", "PID", "OWNER", "WHAT")
_LOOK_S = 0.2


@app.command(rich_help_panel=WORK)
def ps(
    everything: Annotated[
        bool, typer.Option("--all", "-a", help="Also workers that clients have leased and do not use now.")
    ] = False,
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """Show what the nodes run, and what waits there for a worker."""
    with connected() as cloud:
        tasks = [one for one in cloud.cpu.tasks() if everything or as_json or one.state != "leased"]
    if as_json:
        render.print_json(tasks)
        return
    rows = [
        (
            one.task,
            one.node,
            one.state,
            render.duration(one.seconds),
            one.calls or "",
            one.pid or "",
            render.printable(one.owner),
            render.printable(one.label),
        )
        for one in sorted(tasks, key=lambda one: (one.state, -one.seconds))
    ]
    if rows:
        render.table(_COLUMNS, rows, right=("FOR", "CALLS", "PID"), wrap=("WHAT",))
    else:
        render.say("Nothing runs.")


@app.command(rich_help_panel=WORK)
def kill(
    tasks: Annotated[
        list[str], typer.Argument(metavar="TASK...", autocompletion=complete.task_ids, help="Of `virgo ps`.")
    ],
    _home: Home = None,
) -> None:
    """End calls, whoever waits for them: he is told by whom. Your own, unless you are an admin."""
    with connected() as cloud:
        for task in tasks:
            cloud.cpu.kill(task)
            render.say(f"{task} is dead.")


@app.command(rich_help_panel=WORK)
def logs(
    task: Annotated[
        str, typer.Argument(metavar="TASK", autocompletion=complete.task_ids, help="Of `virgo ps`.")
    ],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the call has ended.")] = False,
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """Show what a call has written to standard output and standard error."""
    with connected() as cloud:
        written, text = cloud.cpu.output(task), b""
        if written.offset and not as_json:
            render.note(f"the first {written.offset} bytes are not kept any more")
        while True:
            if as_json:
                text += written.data
            else:
                write_bytes(written.data)
                sys.stdout.flush()
            offset = written.offset + len(written.data)
            if not written.data and (written.ended or not follow):
                break
            if not written.data:
                time.sleep(_LOOK_S)
            written = cloud.cpu.output(task, offset)
    if as_json:
        shown = {"task": task, "node": written.node, "label": written.label, "ended": written.ended}
        render.print_json({**shown, "output": text.decode("utf-8", "replace")})
