"""Everything that is printed: tables, sizes, JSON, notes, progress.

Results go to standard output, all else to standard error. Colours appear on a terminal only, and not
under NO_COLOR. Text that came from elsewhere (names of files, messages of other nodes) is shown with its
control characters escaped, so that it cannot take over the terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from rich.console import Console

STYLES: Final = {
    "up": "green", "ok": "green", "warn": "yellow", "leaving": "yellow", "restarting": "yellow",
    "lost": "red", "down": "red", "failed": "red", "fail": "red",
}  # fmt: skip
# Into a pipe or file a table is as wide as its text: nobody folds lines for a program.
_PIPED_WIDTH_CHARS: Final = 1000
_WRAPPED_WIDTH_CHARS: Final = 12  # the least that a column is given whose text may take several lines
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def print_json(value: Any) -> None:
    """A value as JSON on standard output."""
    import msgspec

    plain = msgspec.to_builtins(value)
    # ASCII only: names of files may hold bytes that are no text.
    sys.stdout.write(json.dumps(plain, indent=2) + "\n")


def print_json_line(value: Any) -> None:
    """A value as JSON on one line of standard output, at once: for what goes on."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def say(text: str = "") -> None:
    """A line of the result."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """A line for the person in front of it, not part of the result."""
    sys.stdout.flush()
    sys.stderr.write(f"{one_line(text)}\n")


def console(*, errors: bool = False) -> Console:
    """Standard output, or standard error, for rich."""
    from rich.console import Console

    class Plain(Console):
        """Leaves the end of whoever reads to `virgo.cli.failures`, as for all other output."""

        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704 - rich calls it where it has caught the error

    stream = sys.stderr if errors else sys.stdout
    width = None if stream.isatty() else _PIPED_WIDTH_CHARS
    return Plain(file=stream, width=width, highlight=False, soft_wrap=False)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Sequence[str] = (),
    wrap: Sequence[str] = (),
) -> None:
    """Rows under their headings on standard output.

    Args:
        columns: the headings.
        rows: a cell for each of them.
        right: columns of numbers.
        wrap: columns that take more lines where the terminal is narrow; the others keep their width.
    """
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        side: Literal["left", "right"] = "right" if column in right else "left"
        shown.add_column(column, justify=side, overflow="fold", no_wrap=column not in wrap)
    for row in rows:
        cells = [printable(str(cell)) for cell in row]
        shown.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in cells))
    to = console()
    # What must not be cut, as a pid, is kept whole: the terminal folds a line that is too long for it.
    kept = (_width(index, columns, rows) for index, name in enumerate(columns) if name not in wrap)
    to.width = max(to.width, sum(kept) + len(wrap) * _WRAPPED_WIDTH_CHARS + 2 * len(columns))
    with to.capture() as capture:
        to.print(shown)
    # Without the blanks that fill up the last column.
    sys.stdout.writelines(line.rstrip() + "\n" for line in capture.get().splitlines())


def _width(index: int, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> int:
    """Characters of the longest cell of a column."""
    return max(len(columns[index]), *(len(printable(str(row[index]))) for row in rows), 0)


@contextmanager
def progress(first: str, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Tell the steps of something that takes a while: a spinner on a terminal, else lines."""
    if quiet:
        yield lambda _text: None
        return
    if not sys.stderr.isatty():
        yield note
        return
    shown = console(errors=True)
    with shown.status(first) as status:

        def step(text: str) -> None:
            if text.endswith(" serves"):
                shown.print(f"[green]✓[/green] {printable(text)}")
            else:
                status.update(printable(text))

        yield step


def size(count: float) -> str:
    """Bytes for people: `512 B`, `1.2 GiB`."""
    for unit in _UNITS:
        if abs(count) < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """A time for people: `42 s`, `3 min`, `5 h`, `12 d`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def count(number: int, noun: str) -> str:
    """`1 node`, `3 nodes`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """The text with everything escaped that is not to be seen, line ends among it."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def one_line(text: str) -> str:
    """The text on one line."""
    return printable(" ".join(text.split()))
