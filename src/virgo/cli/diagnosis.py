"""`virgo doctor`: run all checks and show what they found.

A check is a function that returns findings and changes nothing. One that fails itself is a finding too:
a doctor who faints helps nobody.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from virgo.cli import render

if TYPE_CHECKING:
    from virgo.config import Config

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        name: what was looked at.
        state: `ok`; `warn`: it works, but something is slower or missing; `fail`: VIRGO cannot work so.
        message: what was found.
        hint: how to mend it; "" if there is nothing to mend.
    """

    name: str
    state: State
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Patient:
    """What is examined.

    Attributes:
        config: the configuration with the command line's additions.
        nodes: how many nodes are to run here.
        plans_ports: the ports are to be those of a cloud to come, not of the one that runs.
    """

    config: Config
    nodes: int = 1
    plans_ports: bool = False


Check = Callable[[Patient], Iterable[Finding]]


def examine(environment: dict[str, str], *, nodes: int) -> list[Finding]:
    """Run all checks; a configuration that cannot be read is replaced by the defaults for the others."""
    from virgo import config
    from virgo.cli.checks import CHECKS
    from virgo.cli.health import CHECKS as HEALTH
    from virgo.errors import BadConfig

    found: list[Finding] = []
    try:
        settings = config.load({**os.environ, **environment})
        found.append(Finding("configuration", "ok", f"VIRGO_HOME is {settings.home}"))
    except BadConfig as error:
        found.append(Finding("configuration", "fail", error.message, error.hint))
        settings = config.Config(home=config.home())
    patient = Patient(settings, nodes, plans_ports="VIRGO_NODE_PORT_OFFSET" in environment)
    for check in (*HEALTH, *CHECKS):
        found += _run(check, patient)
    return found


def _run(check: Check, patient: Patient) -> Iterator[Finding]:
    from virgo.errors import VirgoError

    name = check.__name__.replace("_", " ")
    try:
        for found in check(patient):
            yield replace(found, hint="") if found.state == "ok" else found
    except VirgoError as error:
        yield Finding(name, "fail", error.message, error.hint)
    except (OSError, ValueError) as error:
        yield Finding(name, "warn", f"cannot be looked at: {error}")


def show(found: list[Finding]) -> None:
    """The findings as a table, hints below what they mend, and the sum."""
    from rich.text import Text

    shown = render.console()
    width = max(len(one.name) for one in found)
    for one in found:
        line = Text.assemble(
            (f"{one.state:<4}", render.STYLES[one.state]), "  ", f"{one.name:<{width}}", "  "
        )
        shown.print(line.append(render.one_line(one.message)), soft_wrap=True)
        if one.hint:
            hint = Text(f"{'':<{width + 8}}{render.one_line(one.hint)}", style="dim")
            shown.print(hint, soft_wrap=True)
    counts = {state: sum(1 for one in found if one.state == state) for state in ("ok", "warn", "fail")}
    render.say(f"\n{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} to mend")
