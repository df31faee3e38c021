"""What a module is, and what the node gives it.

A module is found by the entry-point group `virgo.modules`: a class called with `NodeServices` that has
the members of `Module`. The node starts modules in the order of their `requires`, serves their commands
on their port and on its Unix socket, and restarts one whose task ends with an error; until it is back its
commands answer NOTLOADED.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol

from virgo.config import Config
from virgo.engine.base import Engine
from virgo.members import Load, Member
from virgo.wire.commands import Command


class NodeServices(Protocol):
    """The node, as its modules see it.

    Attributes:
        name: the node's name.
        number: its number, the top bits of the ids it gives.
        index: its place among the nodes of a local cloud, 1 for the first: each takes the next port.
        directory: its state directory; a module keeps its files below `directory / module.name`.
    """

    name: str
    number: int
    index: int
    directory: Path
    config: Config
    engine: Engine

    def members(self) -> Sequence[Member]:
        """All nodes that are up, this one included, by name."""

    def known(self) -> Sequence[Member]:
        """All nodes that were ever registered, up or lost, by name."""

    def member(self, number: int) -> Member:
        """The registered node of that number, up or lost. Raises NoNode."""

    async def call(self, number: int, *request: bytes | str | int, timeout_s: float | None = None) -> Any:
        """Run a command on another node, in the current context, and return its decoded reply.

        Connections are pooled and one call has its connection alone, so a cancelled call closes it and
        the other node cancels what it had started. The timeout defaults to what the context has left,
        else REQUEST_DEADLINE_S; pass math.inf for work that may take any time (the peer's death is
        noticed all the same, by its lease).

        Raises:
            NodeLost: the node does not answer, or went away during the call. If its `__cause__` is
                NotRunning, no connection could be made: the request has surely not been sent.
            VirgoError: what the other node answered.
        """

    def announce(self) -> None:
        """This node's load is not what the others know any more: tell them soon, not with the next beat."""

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run a task owned by the calling module; its failure restarts the module."""


class Module(Protocol):
    """One module of a node, `virgo.memory.service.MemoryModule` for example.

    Class attributes: `name` (also the name of its port in `members.PORTS`, if it has one), `requires`
    (names of modules that must be up first) and `summary` (one line).
    """

    name: str
    requires: tuple[str, ...]
    summary: str

    async def start(self) -> None:
        """Open what it needs; on return its commands may be called."""

    async def stop(self) -> None:
        """Close everything; must also work after a failed start."""

    def commands(self) -> Sequence[Command]:
        """What it serves."""

    def stats(self) -> dict[str, Any]:
        """Figures for `INFO`, the command line and the dashboard."""

    def load(self, load: Load) -> Load:
        """The node's load with what this module knows filled in (`pool_free_bytes`, `outstanding`)."""
