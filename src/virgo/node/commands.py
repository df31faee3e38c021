"""What every node answers beside its modules: who is there, how it is, and a way to stop it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from virgo._version import __version__
from virgo.context import current
from virgo.errors import Denied, NotLoaded, UnknownCommand
from virgo.members import PORTS
from virgo.node.engines import read_access
from virgo.wire.commands import Command, Handler
from virgo.wire.resp import OK, Encoded
from virgo.wire.session import Session

if TYPE_CHECKING:
    from virgo.node.daemon import Node


def commands(node: Node) -> list[Command]:
    """The node's own commands."""

    def nodes(_session: Session, request: list[bytes]) -> bytes:
        members = node.membership.view.known() if len(request) > 1 else node.membership.view.up()
        return msgspec.json.encode(members)

    def status(_session: Session, _request: list[bytes]) -> bytes:
        return msgspec.json.encode(describe(node))

    def modules(_session: Session, _request: list[bytes]) -> bytes:
        return msgspec.json.encode(node.modules.describe())

    def whoami(session: Session, _request: list[bytes]) -> bytes:
        context = current()
        identity = context.identity if context is not None else session.identity
        shown = {"name": identity.name, "roles": sorted(identity.roles), "node": identity.node}
        return msgspec.json.encode(shown)

    def engine_access(session: Session, _request: list[bytes]) -> bytes:
        context = current()
        identity = context.identity if context is not None else session.identity
        if not identity.node:
            raise Denied(
                "ENGINE.ACCESS is for members of the cloud", hint="Join with a certificate of a node."
            )
        return msgspec.json.encode(read_access(node.config.home))

    def stop(_session: Session, _request: list[bytes]) -> Encoded:
        node.stopping.set()
        return OK

    def begun(handler: Handler) -> Handler:
        """The handler, once the node knows its engine and the others."""

        def handle(session: Session, request: list[bytes]) -> Any:
            check_begun(node)
            return handler(session, request)

        return handle

    return [
        Command("NODES", begun(nodes), "read", 0, 1, usage="[ALL]", summary="Members that are up, as JSON."),
        Command("STATUS", begun(status), "read", 0, 0, summary="This node, its modules and engine, as JSON."),
        Command("MODULES", modules, "read", 0, 0, summary="Modules in load order, as JSON."),
        Command("WHOAMI", whoami, "login", 0, 0, summary="Your identity and roles, as JSON."),
        Command("ENGINE.ACCESS", engine_access, "admin", 0, 0, summary="How a joining machine gets to it."),
        Command("SHUTDOWN", stop, "admin", 0, 1, summary="Stop this node."),
    ]


def check_begun(node: Node) -> None:
    """Raise NotLoaded while the node has only just begun to start."""
    if not node.begun:
        raise NotLoaded(f"node {node.name} is starting", hint="Try again in a moment.")


def absent(module: str) -> Command:
    """What a port without its module ("": the Unix socket before any) answers to what is not common."""

    def refuse(_session: Session, request: list[bytes]) -> None:
        name = request[0][:40].decode("utf-8", "backslashreplace")
        what = f"the module {module} is" if module else "the modules are"
        raise NotLoaded(f"{name}: {what} not loaded on this node")

    return Command("*", refuse, "login", 0, None)


def unserved(states: Callable[[], dict[str, str]]) -> Command:
    """What a port answers to a name that it does not serve; `states` gives the modules' states."""

    def refuse(_session: Session, request: list[bytes]) -> None:
        name = request[0][:40].decode("utf-8", "backslashreplace")
        for module, state in states().items():
            if state != "up":
                raise NotLoaded(f"{name} is not served here, and the module {module} is {state}")
        raise UnknownCommand(f"no command {name!r} is served here")

    return Command("*", refuse, "login", 0, None)


def describe(node: Node) -> dict[str, Any]:
    """The node for people and scripts."""
    return {
        "member": node.describe(),
        "engine": node.engine.status(),
        "modules": node.modules.describe(),
        "stats": node.modules.stats(),
        "connections": sum(len(listener.service.sessions) for listener in node.listeners),
        "silent": node.membership.view.silent(now=time.monotonic()),
    }


def info(node: Node) -> dict[str, dict[str, Any]]:
    """The sections of INFO. Raises NotLoaded while the node has only just begun to start."""
    check_begun(node)
    member = node.describe()
    up = node.membership.view.up()
    sections: dict[str, dict[str, Any]] = {
        "Server": {
            "redis_version": "7.0.0",
            "virgo_version": __version__,
            "node": node.name,
            "node_number": node.number,
            "process_id": member.pid,
            "uptime_in_seconds": (time.time_ns() // 1_000_000 - member.started_ms) // 1000,
        },
        "Clients": {"connected_clients": sum(len(one.service.sessions) for one in node.listeners)},
        "Cloud": {"nodes_up": len(up), "nodes": ",".join(one.name for one in up)},
        "Modules": {name: node.modules.states().get(name, "not loaded") for name in PORTS},
        "Load": {name: getattr(member.load, name) for name in member.load.__struct_fields__},
    }
    for name, stats in node.modules.stats().items():
        sections[name.capitalize()] = {
            key: value for key, value in stats.items() if isinstance(value, (int, float, str))
        }
    return sections
