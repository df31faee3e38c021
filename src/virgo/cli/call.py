"""`virgo call`: run a function or program of the cloud by name, from the shell.

Words that are JSON are numbers, lists and so on, as for every other language; all else is text. What comes
back is printed as it is if it is text or bytes, else as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from virgo.cli import complete, render
from virgo.cli.data import as_text, write_bytes
from virgo.cli.options import WORK, Home, Json, Node, Timeout, connected

if TYPE_CHECKING:
    from virgo.cloud import Cloud
    from virgo.cpu.client import Export

app = typer.Typer()


@app.command(
    rich_help_panel=WORK,
    # Behind the name every word is the function's, even one with a dash.
    context_settings={"allow_interspersed_args": False},
)
def call(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", autocompletion=complete.export_names, help="Exported function or allowed program."
        ),
    ] = "",
    words: Annotated[list[str] | None, typer.Argument(metavar="ARGS...", help="Its arguments.")] = None,
    node: Node = "",
    list_them: Annotated[bool, typer.Option("--list", help="List what can be called.")] = False,
    timeout_s: Timeout = 0.0,
    as_json: Json = False,
    _home: Home = None,
) -> None:
    """Run a function or program on the least loaded node.

    Prints its result. Options go before NAME: what is behind it belongs to the function.
    """
    from virgo.errors import BadArgument

    with connected() as cloud:
        if list_them:
            _print_exported(cloud.cpu.exports(), as_json=as_json)
            return
        if not name:
            raise BadArgument("there is nothing to call", hint="Give a NAME; `virgo call --list` shows them.")
        result = run(cloud, name, words or [], node=node, timeout_s=timeout_s)
    if as_json:
        binary = isinstance(result, bytes) and as_text(result) is None
        shown = {"result": None, "base64": result} if binary else {"result": _structured(result)}
        render.print_json({"name": name, **shown})
    elif isinstance(result, bytes):
        write_bytes(result)
        if result and not result.endswith(b"\n") and as_text(result) is not None:
            render.say()
    elif result is not None:
        render.say(json.dumps(result))


def run(cloud: Cloud, name: str, words: list[str], *, node: str, timeout_s: float) -> Any:
    """The reply to a call by name, as `VIRGO_CLONE` gives it: bytes, a number, a truth value or None.

    The node keeps the time limit, since it can stop the call; `timeout_s` 0 is none.
    """
    from virgo.cpu import messages

    label = render.printable(name[:64])
    limits = messages.Options(label=label, node=node, timeout_ms=math.ceil(timeout_s * 1000), form="text")
    options = messages.encode_options(limits)
    outcome = cloud.client.execute("CPU.INVOKE", options, name, *words, timeout_s=math.inf)
    return messages.as_reply(outcome)


def _print_exported(found: list[Export], *, as_json: bool) -> None:
    if as_json:
        render.print_json([dataclasses.asdict(one) for one in found])
        return
    rows = [(one.name, one.kind, one.summary) for one in found]
    render.table(("NAME", "KIND", "WHAT"), rows, wrap=("WHAT",))


def _structured(result: Any) -> Any:
    """The result for JSON: lists and tables as such, other text as text, other bytes in base64."""
    if not isinstance(result, bytes):
        return result
    text = as_text(result)
    if text is None:
        return result
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text
