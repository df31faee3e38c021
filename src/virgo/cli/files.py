"""`virgo ls`, `cat`, `put`, `rm`: files of the cloud from the shell.

`/NODE/...` are a node's own files, every other path is in the pool; `/` shows them all. Bytes are copied
piece by piece, so that a file may be larger than memory.
"""

from __future__ import annotations

import datetime
import shutil
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from virgo.cli import complete, render
from virgo.cli.data import described
from virgo.cli.failures import for_each
from virgo.cli.options import WORK, Home, Json, connected
from virgo.limits import FILE_CHUNK_BYTES, FILE_IO_BYTES_MAX

if TYPE_CHECKING:
    from virgo.cloud import Cloud
    from virgo.files.calls import FileStatus

app = typer.Typer()

_KINDS = {"directory": "d", "link": "l", "file": "-"}

RemotePath = typer.Argument(
    metavar="PATH", autocompletion=complete.remote_paths, help="/NODE/... or a path in the pool."
)


@app.command(rich_help_panel=WORK)
def ls(
    path: Annotated[str, RemotePath] = "/",
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """List a directory; / shows the nodes and the pool."""
    with connected() as cloud:
        found = listing(cloud, path)
    if as_json:
        render.print_json(found)
    elif sys.stdout.isatty():
        _show(found)
    else:
        for entry in found:
            render.say(entry.name)


@app.command(rich_help_panel=WORK)
def cat(paths: Annotated[list[str], RemotePath], as_json: Json = False, _home: Home = None) -> None:
    """Print the content of files as it is."""
    if as_json:
        with connected() as cloud:
            render.print_json([{"path": path, **described(_content(cloud, path))} for path in paths])
        return
    sys.stdout.flush()
    with connected() as cloud:
        for path in paths:
            with cloud.files.open(path, "rb") as source:
                shutil.copyfileobj(source, sys.stdout.buffer, FILE_CHUNK_BYTES)
    sys.stdout.buffer.flush()


@app.command(rich_help_panel=WORK)
def put(
    local: Annotated[str, typer.Argument(metavar="LOCAL", help="File of this machine; - for input.")],
    remote: Annotated[str, RemotePath],
    durable: Annotated[bool, typer.Option("--durable", help="Return once it is on the disk.")] = False,
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """Copy a file into the cloud."""
    with connected() as cloud:
        target = _target(cloud, local, remote)
        count = _copy_in(cloud, local, target, durable=durable)
    if as_json:
        render.print_json({"path": target, "bytes": count})


@app.command(rich_help_panel=WORK)
def rm(
    paths: Annotated[list[str], RemotePath],
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """Remove files and empty directories.

    One that cannot be removed is told, and does not keep the others.
    """
    with connected() as cloud:
        for_each(paths, cloud.files.remove, done="removed", as_json=as_json)


def listing(cloud: Cloud, path: str) -> list[FileStatus]:
    """The entries of a directory, or what else is there alone."""
    status = cloud.files.stat(path)
    return cloud.files.ls(path) if status.is_directory else [status]


def _content(cloud: Cloud, path: str) -> bytes:
    """A whole file, if it is short enough for JSON. Raises TooLarge."""
    from virgo.errors import TooLarge

    with cloud.files.open(path, "rb") as source:
        content: bytes = source.read(FILE_IO_BYTES_MAX + 1)
    if len(content) > FILE_IO_BYTES_MAX:
        raise TooLarge(
            f"{path} has more than the {FILE_IO_BYTES_MAX} bytes that --json shows of a file",
            hint="Leave --json out: then a file may have any size.",
        )
    return content


def _target(cloud: Cloud, local: str, remote: str) -> str:
    """Where the copy goes: into a directory under the file's own name."""
    from virgo.errors import BadArgument, FileMissing

    name = Path(local).name
    try:
        inside = remote.endswith("/") or cloud.files.stat(remote).is_directory
    except FileMissing:
        inside = False
    if not inside:
        return remote
    if local == "-":
        raise BadArgument(f"{remote} is a directory", hint="Give the file a name: what is read has none.")
    return f"{remote.rstrip('/')}/{name}"


def _copy_in(cloud: Cloud, local: str, target: str, *, durable: bool) -> int:
    if local != "-":
        return cloud.files.put(local, target, durable=durable)
    count = 0
    with cloud.files.open(target, "wb") as file:
        while piece := sys.stdin.buffer.read(FILE_CHUNK_BYTES):
            count += file.write(piece)
        if durable:
            cloud.files.sync(file)
    return count


def _show(found: list[FileStatus]) -> None:
    rows: list[tuple[Any, ...]] = []
    for entry in found:
        kind = _KINDS.get(entry.kind, "?")
        plain = entry.kind == "file" and not entry.lost
        changed = datetime.datetime.fromtimestamp(entry.modified_ns / 1e9).astimezone()
        rows.append(
            (
                "lost" if entry.lost else kind + stat.filemode(entry.mode)[1:],
                render.size(entry.size) if plain else "-",
                f"{changed:%F %R}" if entry.modified_ns else "-",
                entry.node or "-",
                entry.name + ("/" if entry.is_directory else ""),
            )
        )
    render.table(("MODE", "SIZE", "CHANGED", "NODE", "NAME"), rows, right=("SIZE",), wrap=("NAME",))
