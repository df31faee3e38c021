"""A command line as a call: what it prints is kept as of any call, and the result is its exit status."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from virgo import context as contexts
from virgo.errors import BadArgument


class Ran(NamedTuple):
    """How a command ended.

    Attributes:
        node: where it ran.
        status: its exit status; as in a shell 128 and more for a signal.
        task: the id of the call.
    """

    node: str
    status: int
    task: str


class Command:
    """A command to be run by a worker, without a shell and without input, in the worker's process group.

    Args:
        words: the program and its arguments.
        directory: where it begins, "" for where the worker is.
        environment: variables beside those of the worker.
    """

    def __init__(
        self, words: Sequence[str], *, directory: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        if not words or any("\0" in word for word in words):
            raise BadArgument(
                "there is no command to run" if not words else "a word of the command contains NUL",
                hint="Write it behind two dashes: virgo run -- uname -a",
            )
        self._words = list(words)
        self._directory = directory
        self._environment = dict(environment or {})
        self.__qualname__ = shlex.join(words)[:80]  # what it is called in `virgo ps`

    def __repr__(self) -> str:
        return f"<Command {self.__qualname__}>"

    def __call__(self) -> Ran:
        """Run it. Raises BadArgument if it cannot be started there."""
        node, current = os.environ.get("VIRGO_NODE", ""), contexts.current()
        try:
            done = subprocess.run(  # noqa: S603 - role exec sent it
                self._words,
                stdin=subprocess.DEVNULL,
                cwd=self._directory or None,
                env={**os.environ, **self._environment},
                check=False,
            )
        except OSError as error:
            raise BadArgument(
                f"{self._words[0]} cannot be started on node {node}: {error.strerror} ({error.filename})",
                hint="Program and directory must be on that node; there is no shell: sh -c 'a | b'.",
            ) from None
        status = done.returncode
        return Ran(node, 128 - status if status < 0 else status, "" if current is None else current.id)
