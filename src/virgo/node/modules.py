"""Modules of a node: found by entry point, ordered by need, started, watched and restarted.

A module that fails to start or whose task ends with an error is stopped and started anew, ever more
slowly; until then its commands answer NOTLOADED. Other modules go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Any, cast

from virgo.errors import BadConfig, NotLoaded, VirgoError
from virgo.limits import RESTART_BACKOFF_S_MAX
from virgo.members import Load
from virgo.module import Module, NodeServices
from virgo.wire.commands import Command

log = logging.getLogger("virgo.node")
GROUP = "virgo.modules"
_BACKOFF_S_MIN = 0.2


def discover() -> dict[str, Callable[[NodeServices], Module]]:
    """Module classes by name, from all installed distributions; one that cannot be imported is failed."""
    found: dict[str, Callable[[NodeServices], Module]] = {}
    for point in entry_points(group=GROUP):
        try:
            found[point.name] = cast("Callable[[NodeServices], Module]", point.load())
        except Exception as error:  # whatever a third party's module does at import is its own
            log.exception("module %s cannot be imported", point.name)
            found[point.name] = functools.partial(_Unloadable, point.name, error)
    return found


class _Unloadable:
    """Stands for a module that cannot be imported: its start fails with the reason."""

    requires: tuple[str, ...] = ()
    summary = "cannot be imported"

    def __init__(self, name: str, error: Exception, _services: NodeServices) -> None:
        self.name = name
        self._error = error

    async def start(self) -> None:
        raise self._error

    async def stop(self) -> None:
        return

    def commands(self) -> Sequence[Command]:
        return ()

    def stats(self) -> dict[str, Any]:
        return {}

    def load(self, load: Load) -> Load:
        return load


def load_order(requires: dict[str, tuple[str, ...]]) -> list[str]:
    """Names so that each comes after what it requires; alphabetical where that leaves a choice.

    Raises:
        BadConfig: a requirement is missing, or there is a circle.
    """
    order: list[str] = []
    left = dict(sorted(requires.items()))
    for name, needs in left.items():
        missing = [need for need in needs if need not in requires]
        if missing:
            raise BadConfig(
                f"module {name} requires {', '.join(missing)}, which is not installed",
                hint="Install the distribution that has it, or remove the one that needs it.",
            )
    while left:
        ready = [name for name, needs in left.items() if all(need in order for need in needs)]
        if not ready:
            raise BadConfig(
                f"modules require each other in a circle: {', '.join(left)}",
                hint="One of their distributions must go, or mend its `requires`.",
            )
        order += ready
        for name in ready:
            del left[name]
    return order


@dataclass(slots=True)
class Loaded:
    """One module's place in the node."""

    name: str
    module: Module
    services: NodeServices
    state: str = "down"
    restarts: int = 0
    error: str = ""
    since: float = field(default_factory=time.monotonic)
    commands: list[Command] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    failed: asyncio.Event = field(default_factory=asyncio.Event)

    def enter(self, state: str, error: str = "") -> None:
        """Go into a state."""
        self.state, self.error, self.since = state, error, time.monotonic()

    def describe(self) -> dict[str, Any]:
        """For `virgo modules`."""
        return {
            "name": self.name,
            "state": self.state,
            "requires": list(self.module.requires),
            "summary": self.module.summary,
            "commands": len(self.commands),
            "restarts": self.restarts,
            "error": self.error,
            "since_s": round(time.monotonic() - self.since, 1),
        }


class ModuleHost:
    """All modules of one node.

    Args:
        serve: called with a module's commands when it is up, and with placeholders when it is down.
    """

    def __init__(self, serve: Callable[[str, Sequence[Command]], None]) -> None:
        self._serve = serve
        self._loaded: dict[str, Loaded] = {}
        self._watchers: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<ModuleHost {', '.join(f'{name} {entry.state}' for name, entry in self._loaded.items())}>"

    async def start(
        self, factories: dict[str, Callable[[NodeServices], Module]], services: Callable[[str], NodeServices]
    ) -> None:
        """Start all, in order; one that fails is retried in the background."""
        made = {name: (factory, services(name)) for name, factory in factories.items()}
        modules = {name: factory(given) for name, (factory, given) in made.items()}
        order = load_order({name: module.requires for name, module in modules.items()})
        self._loaded = {name: Loaded(name, modules[name], made[name][1], "starting") for name in order}
        for name, entry in self._loaded.items():
            await self._start(entry)
            self._watchers.append(asyncio.create_task(self._watch(entry), name=f"watch {name}"))

    async def stop(self) -> None:
        """Stop all, in the opposite order."""
        for watcher in self._watchers:
            watcher.cancel()
        for entry in reversed(self._loaded.values()):
            await self._stop(entry)
            entry.enter("down")

    def spawn(self, name: str, work: Coroutine[Any, Any, None], *, task_name: str) -> None:
        """Run a task that belongs to a module; its failure restarts the module."""
        entry = self._loaded[name]
        task = asyncio.get_running_loop().create_task(work, name=f"{name}: {task_name}")
        entry.tasks.add(task)
        task.add_done_callback(lambda done: self._ended(entry, done))

    def describe(self) -> list[dict[str, Any]]:
        """The modules in load order."""
        return [entry.describe() for entry in self._loaded.values()]

    def states(self) -> dict[str, str]:
        """State by name."""
        return {name: entry.state for name, entry in self._loaded.items()}

    def stats(self) -> dict[str, dict[str, Any]]:
        """Figures of the modules that are up."""
        return {name: entry.module.stats() for name, entry in self._loaded.items() if entry.state == "up"}

    def load(self, load: Load) -> Load:
        """The load with what the modules know."""
        for entry in self._loaded.values():
            if entry.state == "up":
                load = entry.module.load(load)
        return load

    async def _start(self, entry: Loaded) -> None:
        entry.failed.clear()
        try:
            await entry.module.start()
        except Exception as error:  # any failure of a module is its own; the node goes on
            log.exception("module %s did not start", entry.name)
            self._serve(entry.name, placeholders(entry.name, _offered(entry)))
            entry.enter("failed", _one_line(error))
            entry.failed.set()
            return
        entry.enter("up")
        entry.commands = list(entry.module.commands())
        self._serve(entry.name, entry.commands)
        log.info("module %s is up", entry.name)

    async def _stop(self, entry: Loaded) -> None:
        if entry.commands:
            self._serve(entry.name, placeholders(entry.name, entry.commands))
        for task in entry.tasks:
            task.cancel()
        if entry.tasks:
            await asyncio.wait(entry.tasks, timeout=5)
        entry.tasks.clear()
        try:
            await entry.module.stop()
        except Exception:  # any failure of a module is its own; the node goes on
            log.exception("module %s did not stop cleanly", entry.name)

    async def _watch(self, entry: Loaded) -> None:
        """Restart the module each time it fails; runs until cancelled."""
        backoff_s = _BACKOFF_S_MIN
        while True:
            await entry.failed.wait()
            if time.monotonic() - entry.since > 10 * backoff_s:
                backoff_s = _BACKOFF_S_MIN
            error = entry.error
            await self._stop(entry)
            entry.enter("restarting", error)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, RESTART_BACKOFF_S_MAX)
            entry.restarts += 1
            await self._start(entry)

    def _ended(self, entry: Loaded, task: asyncio.Task[None]) -> None:
        entry.tasks.discard(task)
        with contextlib.suppress(asyncio.CancelledError):
            error = task.exception()
            if error is not None:
                log.error("module %s: task %s failed", entry.name, task.get_name(), exc_info=error)
                entry.error = _one_line(error)
                entry.failed.set()


def _offered(entry: Loaded) -> list[Command]:
    """What a module that did not start would serve, as far as it can say."""
    try:
        return entry.commands or list(entry.module.commands())
    except Exception:  # it may need what its start would have made
        log.exception("module %s cannot say what it serves", entry.name)
        return []


def placeholders(name: str, commands: Iterable[Command]) -> list[Command]:
    """The same commands, each answering that the module is not there."""

    def refuse(_session: object, request: list[bytes]) -> None:
        raise NotLoaded(f"{request[0][:40].decode('utf-8', 'replace')}: module {name} is not loaded")

    return [
        replace(command, handler=refuse, arguments_min=0, arguments_max=None, run=None, usage="")
        for command in commands
    ]


def _one_line(error: BaseException) -> str:
    text = str(error) if isinstance(error, VirgoError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
