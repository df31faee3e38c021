"""The module host: order by need, restart on failure, commands of an absent module."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from virgo.errors import BadConfig, NotLoaded, UnknownCommand
from virgo.members import Load
from virgo.node import commands as node_commands
from virgo.node.modules import ModuleHost, discover, load_order
from virgo.wire.commands import Command


class Fragile:
    """A module whose start and task fail as often as it is told."""

    name = "fragile"
    requires: tuple[str, ...] = ()
    summary = "fails"

    def __init__(self, services: Any) -> None:
        self.services = services
        self.starts = 0
        self.fail_starts = 0

    async def start(self) -> None:
        self.starts += 1
        if self.starts <= self.fail_starts:
            raise OSError("no disk")

    async def stop(self) -> None:
        pass

    def commands(self) -> Sequence[Command]:
        return [Command("FRAGILE", lambda _s, _r: self.starts)]

    def stats(self) -> dict[str, Any]:
        return {"starts": self.starts}

    def load(self, load: Load) -> Load:
        return load


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_modules_start_after_what_they_require() -> None:
    """Requirements come first; where there is a choice the order is alphabetical."""
    assert load_order({"c": (), "a": ("b",), "b": ("c",), "d": ()}) == ["c", "d", "b", "a"]


@pytest.mark.parametrize("requires", [{"a": ("b",), "b": ("a",)}, {"a": ("missing",)}])
def test_impossible_requirements_are_refused(requires: dict[str, tuple[str, ...]]) -> None:
    """A circle or a missing requirement is an error that names it."""
    with pytest.raises(BadConfig, match=r"a|missing"):
        load_order(requires)


def test_our_own_modules_are_found_by_entry_point() -> None:
    """The installed distribution offers the modules of this issue's spine."""
    assert {"memory", "cpu", "files"} <= set(discover())


@pytest.mark.parametrize("how", ["start", "task"])
def test_a_failing_module_is_restarted_and_says_not_loaded_meanwhile(how: str) -> None:
    """After a failed start or task the module comes back; in between its commands answer NOTLOADED."""

    async def main() -> None:
        served: list[Sequence[Command]] = []
        made: list[Fragile] = []

        def factory(services: Any) -> Fragile:
            module = Fragile(services)
            module.fail_starts = 1 if how == "start" else 0
            made.append(module)
            return module

        host = ModuleHost(lambda _name, commands: served.append(commands))
        await host.start({"fragile": factory}, lambda _name: None)  # type: ignore[arg-type, return-value]
        if how == "task":
            assert host.states() == {"fragile": "up"}

            async def fail() -> None:
                raise RuntimeError("boom")

            host.spawn("fragile", fail(), task_name="doomed")
        await until(lambda: made[0].starts == 2)
        await until(lambda: host.states() == {"fragile": "up"})
        described = host.describe()[0]
        assert (described["restarts"], "boom" in described["error"]) == (1, False)
        if how == "task":
            with pytest.raises(NotLoaded, match="FRAGILE"):
                served[1][0].handler(None, [b"FRAGILE"])  # type: ignore[arg-type]
        assert served[-1][0].handler(None, [b"FRAGILE"]) == 2  # type: ignore[arg-type]
        await host.stop()

    asyncio.run(main())


def test_a_name_is_unknown_only_while_all_modules_are_up() -> None:
    """What a module that starts or restarts may serve is NOTLOADED; what nobody serves is UNKNOWN."""
    states = {"cpu": "restarting", "memory": "up"}
    handler: Any = node_commands.unserved(lambda: states).handler
    with pytest.raises(NotLoaded, match="cpu is restarting"):
        handler(None, [b"VIRGO_CLONE", b"add"])
    states["cpu"] = "up"
    with pytest.raises(UnknownCommand):
        handler(None, [b"VIRGO_CLONE", b"add"])


def test_a_node_that_has_just_begun_to_start_says_so() -> None:
    """NODES, STATUS and INFO before the engine and the others are known are NOTLOADED, and no defect."""
    node: Any = SimpleNamespace(name="n1", begun=False)
    served = {command.name: command.handler for command in node_commands.commands(node)}
    for ask in (served["NODES"], served["STATUS"]):
        with pytest.raises(NotLoaded, match="n1 is starting"):
            ask(None, [b""])  # type: ignore[arg-type]
    with pytest.raises(NotLoaded, match="n1 is starting"):
        node_commands.info(node)
