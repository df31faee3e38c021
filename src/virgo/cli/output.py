"""Standard output and standard error as the command line wants them, whatever the locale.

Names of files are bytes. Into a pipe or file they leave as the bytes that they are, and all text as UTF-8; a
terminal that is not UTF-8 gets what it cannot show escaped. Output that cannot be written is an error of its
own, so that it can be told apart from a full disk of the cloud.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class OutputLost(OSError):
    """Standard output does not take what is printed: its disk is full, for example."""


class _Raw(io.FileIO):
    """The descriptor of a stream, with errors that say which one it was."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream.fileno(), "wb", closefd=False)
        self._stream = stream  # which owns the descriptor

    def write(self, data: Any, /) -> int:
        """As of FileIO. Raises BrokenPipeError, OutputLost."""
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputLost(error.errno, error.strerror, "standard output") from error


def prepare() -> None:
    """Put both streams in order; for the process's life."""
    out = sys.stdout
    encoding, errors = _coding(out)
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(_Raw(out)), encoding, errors, line_buffering=out.isatty())
    encoding, errors = _coding(sys.stderr)
    sys.stderr.reconfigure(encoding=encoding, errors=errors)  # type: ignore[union-attr]


def discard() -> None:
    """Let nobody wait for the rest, nor the interpreter complain at its end that it cannot be written."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _coding(stream: Any) -> tuple[str, str]:
    """Encoding, and what becomes of characters that it does not have."""
    unicode = stream.encoding.lower().replace("-", "") == "utf8"
    if stream.isatty() and not unicode:
        return stream.encoding, "backslashreplace"
    return "utf-8", "surrogateescape"
