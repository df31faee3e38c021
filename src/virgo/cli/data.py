"""`virgo malloc`, `set`, `get`, `free`: memory of the cloud by id, from the shell; `get` takes files too.

What `malloc` prints is the id alone, and `get` writes a region's bytes as they are, so that both can be
used in pipes. Only on a terminal does `get` keep bytes that are no text from it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from virgo.cli import render
from virgo.cli.failures import for_each
from virgo.cli.options import WORK, Home, Json, Node, connected
from virgo.errors import TooLarge
from virgo.limits import MEMORY_REGION_BYTES_MAX

app = typer.Typer()
_DUMP_BYTES = 256
_DUMP_WIDTH = 16

Id = Annotated[str, typer.Argument(metavar="ID", help="Id of the region, as `virgo malloc` printed it.")]


@app.command(rich_help_panel=WORK)
def malloc(
    size: Annotated[str, typer.Argument(metavar="SIZE", help="Bytes, or 64KiB, 10MiB, 1GiB.")],
    node: Node = "",
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """Allocate memory in the cloud and print its id."""
    from virgo.members import node_of

    wanted = parse_size(size)
    with connected() as cloud:
        where = ("NODE", node) if node else ()
        identifier = int(cloud.client.execute("VIRGO_MALLOC", wanted, *where))
        if not as_json:
            render.say(str(identifier))
            return
        names = {member.number: member.name for member in cloud.nodes}
    home = names.get(node_of(identifier), "")
    render.print_json({"id": identifier, "size": wanted, "node": home})


@app.command("set", rich_help_panel=WORK)
def set_region(
    identifier: Id,
    data: Annotated[str, typer.Argument(metavar="DATA", help="Text; @FILE for a file's bytes; - for input.")],
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """Replace what a region holds, as one change."""
    number = parse_id(identifier)
    content = read_data(data)
    with connected() as cloud:
        cloud.client.execute("VIRGO_SET", number, content)
    if as_json:
        render.print_json({"id": number, "bytes": len(content)})


@app.command("get", rich_help_panel=WORK)
def get_region(
    identifier: Annotated[
        str, typer.Argument(metavar="ID|PATH", help="Id of a region, or path of a file (it has a slash).")
    ],
    local: Annotated[
        str,
        typer.Argument(
            metavar="LOCAL", help="Of a file: where to; its name here if not given, - for output."
        ),
    ] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to this file.")
    ] = None,
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """Print a region, or copy a file of the cloud here."""
    if "/" in identifier:
        from virgo.cli.trees import fetch

        fetch(identifier, str(output or "") or local or Path(identifier).name, as_json=as_json)
        return
    number = parse_id(identifier)
    with connected() as cloud:
        content: bytes = cloud.client.execute("VIRGO_GET", number)
    if output is not None:
        output.write_bytes(content)
    if as_json:
        render.print_json({"id": number, **described(content)})
    elif output is None:
        write_bytes(content)


@app.command(rich_help_panel=WORK)
def free(
    identifiers: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of regions.")],
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """End regions; an id is never given again.

    One that cannot be freed is told, and does not keep the others.
    """
    numbers = [parse_id(identifier) for identifier in identifiers]
    with connected() as cloud:
        for_each(
            numbers,
            lambda number: cloud.client.execute("VIRGO_FREE", number),
            done="freed",
            as_json=as_json,
        )


def parse_size(text: str) -> int:
    """A count of bytes: `100`, `64KiB`, `10M`. Raises BadArgument."""
    from virgo.errors import BadArgument

    plain = text.strip().upper().removesuffix("IB").removesuffix("B")
    shift = {"K": 10, "M": 20, "G": 30}.get(plain[-1:], 0)
    digits = plain[:-1].rstrip() if shift else plain.rstrip()
    if not digits.lstrip("-").isdecimal():
        raise BadArgument(f"{text!r} is not a size", hint="Write bytes, or a number with KiB, MiB or GiB.")
    return int(digits) << shift


def parse_id(text: str) -> int:
    """An id, decimal or after 0x. Raises BadArgument."""
    from virgo.wire import args

    return args.integer(text.encode("utf-8", "surrogateescape"), "ID")


def read_data(text: str) -> bytes:
    """The bytes that an argument stands for: itself, standard input for `-`, a file for `@FILE`."""
    if text == "-":
        return sys.stdin.buffer.read()
    if text.startswith("@"):
        with Path(text[1:]).open("rb") as file:
            content = file.read(MEMORY_REGION_BYTES_MAX + 1)
        if len(content) > MEMORY_REGION_BYTES_MAX:
            raise TooLarge(
                f"{text[1:]} has more than the {MEMORY_REGION_BYTES_MAX} bytes of the largest region",
                hint="Put it into a file of the cloud: `virgo put`.",
            )
        return content
    return text.encode("utf-8", "surrogateescape")


def write_bytes(content: bytes) -> None:
    """The bytes as they are; on a terminal only text, with a line end, and of other bytes a sample."""
    if not sys.stdout.isatty():
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    text = as_text(content)
    if text is not None and text.replace("\n", "").replace("\t", "").isprintable():
        sys.stdout.write(text if text.endswith("\n") or not text else text + "\n")
        return
    for line in dump(content[:_DUMP_BYTES]):
        render.say(line)
    render.note(f"{render.size(len(content))} that are no text; `-o FILE` or a pipe takes them whole.")


def dump(content: bytes) -> list[str]:
    """Offset, hexadecimal and printable form, 16 bytes a line."""
    lines = []
    for start in range(0, len(content), _DUMP_WIDTH):
        piece = content[start : start + _DUMP_WIDTH]
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in piece)
        lines.append(f"{start:08x}  {piece.hex(' '):<{3 * _DUMP_WIDTH}} {shown}")
    return lines


def as_text(content: bytes) -> str | None:
    """The bytes as text if they are UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def described(content: bytes) -> dict[str, int | str | None]:
    """The bytes for JSON: how many, as text if they are UTF-8, and in any case in Base64."""
    import base64

    encoded = base64.b64encode(content).decode()
    return {"bytes": len(content), "text": as_text(content), "base64": encoded}
