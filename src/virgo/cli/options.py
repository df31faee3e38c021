"""Options and arguments that several verbs share, and what they lead to: configuration and connection."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from virgo.cli import complete
from virgo.limits import CALL_TIMEOUT_MS_MAX

if TYPE_CHECKING:
    from virgo.cloud import Cloud
    from virgo.config import Config
    from virgo.members import Member

T = TypeVar("T", int, float, "int | None")

# Headings of `virgo --help`.
CLOUD = "The cloud"
WORK = "Processors, memory, files"
CARE = "Set-up and care"


def within(low: float, high: float) -> Callable[[T], T]:
    """A callback that refuses a number outside of these bounds, and NaN, by naming all three."""

    def check(value: T) -> T:
        if value is not None and not low <= value <= high:
            raise typer.BadParameter(f"{value} is not within {low:g} to {high:g}.")
        return value

    return check


Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        callback=within(0, CALL_TIMEOUT_MS_MAX / 1000),
        help="Stop it after that; 0 for no limit.",
    ),
]


def use_home(value: Path | None) -> Path | None:
    """Let everything from here on, child processes too, use that VIRGO_HOME."""
    if value is not None:
        os.environ["VIRGO_HOME"] = str(value.expanduser().absolute())
    return value


Home = Annotated[
    Path | None,
    typer.Option(
        "--home", metavar="DIR", callback=use_home, is_eager=True, help="Use this instead of VIRGO_HOME."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Node = Annotated[
    str,
    typer.Option(
        "--node", metavar="NAME", autocompletion=complete.node_names, help="On this node.", show_default=False
    ),
]


def settings(extra: dict[str, str] | None = None) -> Config:
    """The configuration, with what the command line adds. Raises BadConfig."""
    from virgo import config

    return config.load({**os.environ, **(extra or {})})


def find_home() -> Path:
    """VIRGO_HOME, without a look at the configuration in it."""
    from virgo import config

    return config.home()


def connected() -> Cloud:
    """The cloud through a node that runs; none is started for a command. Raises NotRunning."""
    from virgo.cloud import connect

    return connect(embedded=False)


def members() -> list[Member]:
    """All nodes that the cloud knows, lost ones too."""
    import msgspec

    from virgo.members import Member

    with connected() as cloud:
        return msgspec.json.decode(cloud.client.execute("NODES", "ALL"), type=list[Member])


def member(name: str) -> Member:
    """The node of that name. Raises NoNode."""
    from virgo.errors import NoNode

    known = members()
    for found in known:
        if found.name == name:
            return found
    names = ", ".join(found.name for found in known) or "none"
    raise NoNode(f"there is no node {name!r}", hint=f"The nodes are: {names}.")
