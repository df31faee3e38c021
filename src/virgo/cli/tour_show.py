"""What the tour shows: titles, facts, progress and checked claims, on a terminal or in a pipe.

On a terminal there is colour and a moving progress bar; in a pipe the same lines come plain, one at a
time. `check` is the only way to state a claim: it is shown as held only if it does, else the tour ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from virgo.errors import VirgoError

_INDENT: Final = "   "
_BAR_CELLS: Final = 24


class CheckFailed(VirgoError):
    """A claim of the tour does not hold."""

    default_hint = "This is a defect: please report it, with the claim above."


class Show:
    """The tour's display.

    Args:
        console: where lines go.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.checks: list[str] = []
        self._number = 0
        self._mark = "✓" if (console.encoding or "").lower().startswith("utf") else "ok:"

    def __repr__(self) -> str:
        return f"<Show {self._number} steps, {len(self.checks)} claims checked>"

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A numbered part of the tour; says at its end how long it took."""
        self._number += 1
        self.console.print()
        self.console.print(Text(f"{self._number}. {title}", style="bold cyan"))
        started = time.perf_counter()
        yield
        self.console.print(Text(f"{_INDENT}({time.perf_counter() - started:.1f} s)", style="dim"))

    def say(self, text: str, *, style: str = "") -> None:
        """One line."""
        self.console.print(Text(_INDENT + text, style=style), soft_wrap=True)

    def check(self, claim: str, holds: bool, *, otherwise: str = "") -> None:
        """State a claim that was checked.

        Raises:
            CheckFailed: it does not hold; `otherwise` says what was found instead.
        """
        if not holds:
            raise CheckFailed(f"{claim}: this does not hold{f', {otherwise}' if otherwise else ''}.")
        self.checks.append(claim)
        line = Text(_INDENT)
        line.append(f"{self._mark} ", style="bold green")
        line.append(claim)
        self.console.print(line, soft_wrap=True)

    @contextmanager
    def progress(self, text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A moving bar on a terminal, nothing in a pipe; the block says how many are done."""
        with Progress(
            TextColumn(_INDENT[1:]),  # a column is followed by a blank
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=_BAR_CELLS),
            *([MofNCompleteColumn()] if total else []),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        ) as progress:
            task = progress.add_task(text, total=total)
            yield lambda done: progress.update(task, completed=done)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[int | str | Share]]) -> None:
        """A small table; counts to the right, shares as bars."""
        cells = [[_cell(value) for value in row] for row in rows]
        widths = [
            max(map(len, [column, *(row[index].plain for row in cells)]))
            for index, column in enumerate(columns)
        ]
        right = [isinstance(value, int) for value in rows[0]]
        head = [Text(column, style="dim") for column in columns]
        for line in (head, *cells):
            padded = Text(_INDENT)
            for cell, width, to_right in zip(line, widths, right, strict=True):
                cell.align("right" if to_right else "left", width)
                padded.append_text(cell).append("  ")
            padded.rstrip()
            self.console.print(padded)


class Share(float):
    """A part of a whole, 0 to 1."""


def _cell(value: int | str | Share) -> Text:
    if isinstance(value, Share):
        full = round(value * _BAR_CELLS)
        return Text.assemble(("#" * full, "green"), ("." * (_BAR_CELLS - full), "dim"), f" {value:4.0%}")
    return Text(f"{value:,}" if isinstance(value, int) else value)
