"""Programs that may be called by name: an allowlist, and how one is run.

A program is run without a shell and without input, with the caller's words behind its fixed arguments, in
the process group of its worker, which ends with it: whatever stops the call stops the program and what it
started. Its standard output is the result; an exit status other than 0 is a failure that shows the end of
what it wrote to standard error.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

from virgo.cpu.exports import check_name
from virgo.cpu.messages import Failure
from virgo.errors import BadArgument, BadConfig
from virgo.limits import PROGRAM_OUTPUT_BYTES_MAX

# Harmless, and on nearly every machine; a node offers those that it has.
DEFAULTS: Final[Mapping[str, tuple[str, ...]]] = {
    "uname": ("uname",),
    "uptime": ("uptime",),
    "nproc": ("nproc",),
    "date": ("date",),
    "df": ("df", "-h"),
    "free": ("free", "-h"),
}
_STDERR_SHOWN_BYTES: Final = 400
_READ_BYTES: Final = 64 * 1024


class ProgramFailed(Exception):
    """A program ended without a result; `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def allowlist(configured: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The programs of this machine by name, each with the full path of its executable.

    Raises:
        BadConfig: a configured program is not there, or its name cannot be one.
    """
    found: dict[str, list[str]] = {}
    for name, command in DEFAULTS.items():
        path = shutil.which(command[0])
        if path is not None:
            found[name] = [path, *command[1:]]
    for name, words in configured.items():
        path = shutil.which(words[0]) if words else None
        if path is None:
            raise BadConfig(
                f"cpu.programs: {name!r} is {list(words)}, which cannot be executed",
                hint="Give the full path of an executable file, then its fixed arguments.",
            )
        try:
            found[check_name(name)] = [path, *words[1:]]
        except BadArgument as error:
            raise BadConfig(f"cpu.programs: {error.message}", hint=error.hint) from None
    return found


def words_of(values: Sequence[object]) -> list[bytes]:
    """Arguments of a program, from values. Raises BadArgument."""
    words = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (str, bytes, int, float)):
            raise BadArgument(
                f"a program takes text and numbers, not {type(value).__name__}",
                hint="Make it text: str(value), or json.dumps(value) if the program reads JSON.",
            )
        words.append(value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape"))
    return words


def run(label: str, command: Sequence[str], words: Sequence[bytes], *, node: str) -> bytes:
    """Run a program to its end and return what it wrote. Raises ProgramFailed."""
    if any(b"\0" in part for part in words):
        raise ProgramFailed(Failure(f"{label}: an argument contains NUL", cause="program", node=node))
    try:
        process = subprocess.Popen(  # noqa: S603 - an allowlisted program, without a shell
            [*command, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
    except OSError as error:
        raise ProgramFailed(
            Failure(f"{label} could not be started on node {node}: {error}", cause="program", node=node)
        ) from None
    with process:
        output, complaint = _read(process)
        if output is None:
            process.kill()
            raise ProgramFailed(
                Failure(
                    f"{label} on node {node} wrote over {PROGRAM_OUTPUT_BYTES_MAX} bytes and was stopped",
                    hint="Let it write to a file of the cloud, and return the path.",
                    cause="program",
                    node=node,
                )
            )
    if process.returncode == 0:
        return output
    how = f"status {process.returncode}" if process.returncode > 0 else f"signal {-process.returncode}"
    shown = complaint[-_STDERR_SHOWN_BYTES:].decode("utf-8", "replace").strip()
    message = f"{label} on node {node} ended with {how}" + (f": {shown}" if shown else "")
    hint = "That is what it wrote to standard error." if shown else "It wrote nothing to standard error."
    raise ProgramFailed(Failure(message, hint=hint, cause="program", node=node))


def _read(process: subprocess.Popen[bytes]) -> tuple[bytes | None, bytes]:
    """Standard output, None if it is too long, and the end of standard error."""
    assert process.stdout is not None and process.stderr is not None
    output, size, complaint = [], 0, b""
    with selectors.DefaultSelector() as selector, contextlib.suppress(InterruptedError):
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                data = os.read(key.fd, _READ_BYTES)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    output.append(data)
                    size += len(data)
                else:
                    complaint = (complaint + data)[-2 * _STDERR_SHOWN_BYTES :]
            if size > PROGRAM_OUTPUT_BYTES_MAX:
                return None, complaint
    return b"".join(output), complaint
