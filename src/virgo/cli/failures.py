"""Every way in which a command can fail, as one line, a hint and an exit status; never a traceback.

| what happened | status |
| --- | --- |
| a `VirgoError`, or the machine refused (a file that is not there) | 1 |
| the command line is wrong | 2 |
| Ctrl-C | 130 |
| whoever read our output has gone, as `| head` does | 141 |

`VIRGO_DEBUG=1` adds the traceback. With `--json` the failure is also an object on standard output.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import typer

from virgo.cli import output, render
from virgo.errors import CallFailed, VirgoError

T = TypeVar("T")
FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141

_OS_HINTS: Final = {
    errno.ENOENT: "Look at the name: `ls` of the directory shows what is there.",
    errno.EACCES: "This user may not; see its owner and mode with `ls -ld`. State is below VIRGO_HOME.",
    errno.EPERM: "This user may not; see its owner and mode with `ls -ld`. State is below VIRGO_HOME.",
    errno.EISDIR: "It is a directory; name a file.",
    errno.ENOTDIR: "A part of the path in front of its last name is a file.",
    errno.ENOSPC: "Make room on the disk, then try again.",
    errno.EROFS: "The file system is mounted read-only; choose another place.",
}
_LOST_HINT: Final = "Send it where there is room. What the command was to change, it has changed."
_OS_HINT: Final = "This machine refused; `virgo doctor` looks at it."


@dataclass(frozen=True, slots=True)
class Failure:
    """What to tell, and how to exit."""

    code: str
    message: str
    hint: str = ""
    status: int = FAILED

    @property
    def shown(self) -> dict[str, str]:
        """For JSON."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


def guarded(run: Callable[[], None], *, as_json: bool) -> int:
    """Run a command; returns its exit status and has told what went wrong."""
    try:
        status = _run(run, as_json=as_json)
        sys.stdout.flush()
    except BrokenPipeError:
        output.discard()
        return PIPE_CLOSED
    except output.OutputLost as error:
        output.discard()
        tell(describe(error), as_json=False)
        return FAILED
    return status


def _run(run: Callable[[], None], *, as_json: bool) -> int:
    try:
        run()
    except typer.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except (BrokenPipeError, output.OutputLost):
        raise
    except Exception as error:  # noqa: BLE001 - the last place that can turn a failure into words
        if os.environ.get("VIRGO_DEBUG"):
            traceback.print_exc()
            if isinstance(error, CallFailed) and error.remote_traceback:
                sys.stderr.write(error.remote_traceback)
        failure = describe(error)
        tell(failure, as_json=as_json)
        return failure.status
    return 0


def for_each(items: Sequence[T], act: Callable[[T], object], *, done: str, as_json: bool) -> None:
    """Act on every item, also after one that failed, and tell what became of each.

    With `--json` that is `{DONE: [item, ...]}`; if any failed also `failed`, each with its item and error,
    and `error`, the first of them. Without it only failures are told.

    Raises:
        typer.Exit: one or more failed.
    """
    succeeded: list[T] = []
    failed: list[tuple[T, Failure]] = []
    for item in items:
        try:
            act(item)
        except VirgoError as error:
            failed.append((item, describe(error)))
        else:
            succeeded.append(item)
    if as_json:
        shown: dict[str, Any] = {done: succeeded}
        if failed:
            shown["failed"] = [{"item": item, **failure.shown} for item, failure in failed]
            shown["error"] = failed[0][1].shown
        render.print_json(shown)
    for _item, failure in failed:
        tell(failure, as_json=False)
    if failed:
        raise typer.Exit(FAILED)


def describe(error: Exception) -> Failure:
    """The failure that an exception stands for."""
    if isinstance(error, VirgoError):
        return Failure(error.code, error.message or type(error).__name__, error.hint)
    if isinstance(error, output.OutputLost):
        return Failure("OS", f"{error.filename}: {error.strerror}", _LOST_HINT)
    usage = _usage(error)
    if usage is not None:
        return usage
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return Failure("OS", f"{where}{error.strerror}", _OS_HINTS.get(error.errno or 0, _OS_HINT))
    return Failure(
        "FAULT",
        f"{type(error).__name__}: {error}",
        "This is a defect of virgo; VIRGO_DEBUG=1 shows the traceback for a report.",
    )


def _usage(error: Exception) -> Failure | None:
    """A fault of the command line. Its class is not public in every version of typer, its shape is."""
    message = getattr(error, "format_message", None)
    if message is None or getattr(error, "exit_code", None) != USAGE:
        return None
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "virgo"
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(f"{message()}\n\n")
        return Failure("USAGE", f"`{path}` needs a command", "See above.", USAGE)
    return Failure("USAGE", message(), f"`{path} --help` shows the usage.", USAGE)


def tell(failure: Failure, *, as_json: bool) -> None:
    """Say it on standard error, and as JSON where that was asked for."""
    if as_json:
        render.print_json({"error": failure.shown})
    sys.stdout.flush()
    sys.stderr.write(f"virgo: {render.one_line(failure.message)}\n")
    if failure.hint:
        sys.stderr.write(f"hint: {render.one_line(failure.hint)}\n")
    sys.stderr.flush()
