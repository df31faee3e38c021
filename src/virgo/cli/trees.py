"""`virgo cp`, `tree`, `stat`, `df`: files of the cloud as whole trees, from the shell.

On a terminal, copies show how far they are.
"""

from __future__ import annotations

import stat as stats
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from virgo.cli import complete, render
from virgo.cli.files import RemotePath
from virgo.cli.options import WORK, Home, Json, connected

if TYPE_CHECKING:
    from fsspec.callbacks import Callback

    from virgo.files.fs import VirgoFileSystem

app = typer.Typer()
_TREE_ENTRIES_MAX = 10_000


@app.command(rich_help_panel=WORK)
def cp(
    source: Annotated[str, RemotePath],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", autocompletion=complete.remote_paths, help="Where to.")
    ],
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Directories too.")] = False,
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """Copy files from one place of the cloud to another.

    `virgo put` and `virgo get` copy from and to this machine.
    """
    from virgo.errors import FileRefused

    with connected() as cloud:
        fs = cloud.files.fs
        if fs.isdir(source) and not recursive:
            raise FileRefused(
                f"{source} is a directory (EISDIR)", hint="--recursive copies it with all in it."
            )
        with copying(source, quiet=as_json) as told:
            fs.copy(source, target, recursive=recursive, callback=told)
        if as_json:
            render.print_json({"source": source, "target": target})


def fetch(source: str, local: str, *, as_json: bool) -> None:
    """Copy a file of the cloud to this machine; `-` for output."""
    with connected() as cloud, copying(source, quiet=as_json or local == "-") as told:
        if local == "-":
            cloud.files.fs.get_file(source, None, outfile=sys.stdout.buffer, callback=told)
            sys.stdout.buffer.flush()
        else:
            cloud.files.fs.get_file(source, local, callback=told)
    if as_json:
        render.print_json({"path": source, "local": local, "bytes": told.value})


@app.command(rich_help_panel=WORK)
def tree(path: Annotated[str, RemotePath] = "/", as_json: Json = False, _home: Home = None) -> None:
    """Show a directory and all below it."""
    with connected() as cloud:
        fs = cloud.files.fs
        found = list(_walk(fs, fs.info(path)["name"].rstrip("/"), ""))
    if as_json:
        render.print_json(
            [{"path": entry["name"], "type": entry["type"], "size": entry["size"]} for _, entry in found]
        )
        return
    render.say(render.printable(path))
    for shape, entry in found:
        tail = {"file": f"  {render.size(entry['size'])}", "directory": "/"}.get(entry["type"], "")
        render.say(f"{shape}{render.printable(entry['name'].rpartition('/')[2])}{tail}")
    if len(found) >= _TREE_ENTRIES_MAX:
        render.note(f"only the first {_TREE_ENTRIES_MAX} are shown; `virgo ls` lists one directory whole")


def _walk(
    fs: VirgoFileSystem, path: str, shape: str, left: list[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """Entries below a path, each with the lines that lead to it."""
    left = [_TREE_ENTRIES_MAX] if left is None else left
    entries = sorted(fs.ls(path or "/"), key=lambda entry: str(entry["name"]))
    for entry in entries:
        if not left[0]:
            return
        left[0] -= 1
        last = entry is entries[-1]
        yield shape + ("└── " if last else "├── "), entry
        if entry["type"] == "directory":
            yield from _walk(fs, entry["name"], shape + ("    " if last else "│   "), left)


@app.command("stat", rich_help_panel=WORK)
def show_status(paths: Annotated[list[str], RemotePath], as_json: Json = False, _home: Home = None) -> None:
    """Show what paths name: kind, size, time, mode, node."""
    import datetime

    with connected() as cloud:
        found = [cloud.files.fs.info(path) for path in paths]
    if as_json:
        render.print_json(found)
        return
    rows = [
        (
            entry["name"], entry["type"], entry["size"], stats.filemode(entry["mode"]), entry["nlink"],
            f"{datetime.datetime.fromtimestamp(entry['mtime']).astimezone():%F %T}", entry["node"] or "-",
        )
        for entry in found
    ]  # fmt: skip
    columns = ("PATH", "KIND", "BYTES", "MODE", "NAMES", "CHANGED", "NODE")
    render.table(columns, rows, right=("BYTES", "NAMES"), wrap=("PATH",))


@app.command(rich_help_panel=WORK)
def df(as_json: Json = False, _home: Home = None) -> None:
    """Show the free disks of the nodes.

    A new file of the pool goes to the node with most room.
    """
    with connected() as cloud:
        nodes = [(node.name, node.state, node.load.disk_free_bytes) for node in cloud.nodes]
    if as_json:
        render.print_json([{"node": name, "state": state, "free_bytes": free} for name, state, free in nodes])
        return
    render.table(("NODE", "STATE", "FREE"), [(name, state, render.size(free)) for name, state, free in nodes])


@contextmanager
def copying(name: str, *, quiet: bool = False) -> Iterator[Callback]:
    """A callback for fsspec that shows how far a copy is, on a terminal."""
    from fsspec.callbacks import Callback

    class Shown(Callback):  # type: ignore[misc]
        def call(self, hook_name: str | None = None, **_: Any) -> None:
            if self.size:
                step(f"{name}: {render.size(self.value)} of {render.size(self.size)}")

        def branched(self, _path1: str, _path2: str, **_: Any) -> Callback:
            return Callback()

    with render.progress(name, quiet=quiet or not sys.stderr.isatty()) as step:
        yield Shown()
