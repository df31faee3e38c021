"""Groups of verbs that are imported when they are used: `virgo --help` shows them without that."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command


def deferred(module: str, summary: str, *, alone: str = "") -> typer.Typer:
    """A stand-in for the `app` of a module, to be given to `add_typer`.

    Args:
        module: where the `app` is.
        summary: of the group, in one line.
        alone: the verb that is meant when none is named; "" to show the help then.
    """

    class Deferred(TyperGroup):
        def _load(self) -> Any:
            if not self.commands:
                found: Any = get_command(import_module(module).app)
                self.commands.update(found.commands)
            return self

        def list_commands(self, ctx: Any) -> list[str]:
            self._load()
            return super().list_commands(ctx)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            self._load()
            return super().get_command(ctx, cmd_name)

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            helps = {"-h", "--help"} & set(args)
            if alone and not helps and (not args or args[0].startswith("-")):
                args = [alone, *args]
            return super().parse_args(ctx, args)

    return typer.Typer(cls=Deferred, help=summary, no_args_is_help=not alone, rich_markup_mode=None)
