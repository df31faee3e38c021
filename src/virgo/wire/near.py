"""The connection of this process, for objects that arrive by pickle: made when they are first used.

An object that is bound to a connection, a memory region for example, cannot take that along to another
process. It travels as what it names, and binds itself there to the node that `virgo.connect()` finds: in a
worker, the worker's own. Who connects is told from above by `provide`, since this floor does not know how.
"""

from __future__ import annotations

from collections.abc import Callable

from virgo.errors import NotRunning
from virgo.wire.call import Runner

_providers: list[Callable[[], Runner]] = []


def provide(connect: Callable[[], Runner]) -> None:
    """Say how to get the process's connection; the last one who says counts."""
    _providers[:] = [connect]


def connection() -> Runner:
    """The process's connection of the moment; after a fork, or once it was closed, it is another one.

    Raises:
        NotRunning: no node answers, or nobody said how to connect.
    """
    if not _providers:
        raise NotRunning("nothing in this process connects to a cloud", hint="import virgo, then try again.")
    return _providers[0]()
