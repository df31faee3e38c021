"""Which calls have begun, and which never may: decided in one place, so that both cannot be.

Whoever is about to run a call claims it first; who cancels one withdraws it. The first of them wins. An
engine that runs a call again by itself, since it has lost the worker or the outcome, is refused by this.
"""

from __future__ import annotations

from collections.abc import Iterable

from virgo.cpu.backends.remote import LOST
from virgo.cpu.messages import TAKEN


class Claims:
    """Claims by the keys of calls; no I/O."""

    def __init__(self) -> None:
        self._runs: dict[str, int] = {}
        self._where: dict[str, str] = {}
        self._withdrawn: set[str] = set()

    def __repr__(self) -> str:
        return f"<Claims {len(self._runs)} begun, {len(self._withdrawn)} withdrawn>"

    def claim(self, key: str, runs_max: int, where: str) -> tuple[bytes, bool]:
        """Begin a call.

        Args:
            key: of it.
            runs_max: how often it may be run.
            where: who runs it.

        Returns:
            The outcome that it has instead of being run, b"" if it is to be run, and whether it may not be
            run again.
        """
        if key in self._withdrawn:
            return TAKEN, True
        runs = self._runs.get(key, 0)
        if runs >= runs_max:
            return LOST, True
        self._runs[key] = runs + 1
        self._where[key] = where
        return b"", runs + 1 == runs_max

    def withdraw(self, keys: Iterable[str]) -> list[str]:
        """Those that have not begun; now they never will."""
        found = [key for key in keys if key not in self._runs]
        self._withdrawn.update(found)
        return found

    def begun(self, keys: Iterable[str]) -> dict[str, str]:
        """Those that have begun, and who runs them."""
        return {key: self._where[key] for key in keys if key in self._where}

    def runs(self, key: str) -> int:
        """How often a call was begun."""
        return self._runs.get(key, 0)

    def forget(self, key: str) -> None:
        """It is of no more interest to anybody."""
        self._runs.pop(key, None)
        self._where.pop(key, None)
        self._withdrawn.discard(key)
