"""The module host: order by need, restart on failure, commands of an absent module."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from virgo.errors import BadConfig, NotLoaded
from virgo.members import Load
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
