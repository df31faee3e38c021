"""The verbs together, and how a command runs: parse, run, and turn every failure into words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from virgo.cli import call, cloud, data, failures, files, mount, output, remote, tasks, tools, trees, up
from virgo.cli.deferred import deferred
from virgo.cli.options import CARE, WORK, Home

_EPILOG = "A cloud in one line: `virgo up --nodes 3 --detach`. A tour: `virgo demo`."


class Root(TyperGroup):
    """All verbs, shown under their headings."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and exit with its status."""
        words = list(sys.argv[1:] if args is None else args)
        self._main_shell_completion(extra, "virgo", complete_var)

        def run_verb() -> None:
            with self.make_context("virgo", words) as context:
                self.invoke(context)

        sys.exit(failures.guarded(run_verb, as_json=wants_json(words)))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the verbs under their headings."""
        verbs = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        width = max(len(name) for name, _ in verbs)
        headings = dict.fromkeys(getattr(verb, "rich_help_panel", None) or CARE for _, verb in verbs)
        for heading in headings:
            rows = [
                (name.ljust(width), verb.get_short_help_str(formatter.width - 6 - width))
                for name, verb in verbs
                if verb is not None and (getattr(verb, "rich_help_panel", None) or CARE) == heading
            ]
            with formatter.section(heading):
                formatter.write_dl(rows)


app = typer.Typer(
    name="virgo",
    cls=Root,
    help="VIRGO makes many Linux machines behave like one.",
    epilog=_EPILOG,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help costs 0.2 s at every start
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        tools.print_version()
        raise typer.Exit


@app.callback()
def _all(
    context: typer.Context,
    _home: Home = None,
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _verbs in (up, cloud, call, remote, tasks, data, files, trees, mount, tools):
    app.add_typer(_verbs.app)
app.add_typer(
    deferred("virgo.cli.memory", "The memory pool: its nodes and namespaces.", alone="show"),
    name="memory",
    rich_help_panel=WORK,
)
app.add_typer(
    deferred("virgo.cli.ca", "Certificates for machines and users of the cloud."),
    name="ca",
    rich_help_panel=CARE,
)
app.add_typer(
    deferred("virgo.cli.token", "Tokens: who may log in over TCP, and do what."),
    name="token",
    rich_help_panel=CARE,
)


def wants_json(words: Sequence[str]) -> bool:
    """Whether the command line asks for JSON; known even if the rest of it is wrong."""
    for word in words:
        if word == "--":
            return False
        if word == "--json":
            return True
    return False


def run() -> int:
    """Run the process's command line; does not return."""
    output.prepare()
    app()
    return 0
