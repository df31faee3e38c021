"""One node process: `python -m virgo.node NAME`.

It connects to the engine, registers, starts its modules, opens its Unix socket and its six ports, and
beats. It serves when `run/NAME.json` exists; on SIGTERM it says farewell, stops its modules in the
opposite order and ends. Everything that it has acknowledged is in files or in the engine, so `kill -9`
loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import ssl
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from virgo._version import __version__
from virgo.config import Config
from virgo.engine.base import Engine
from virgo.errors import NodeLost, NoNode, PortTaken, VirgoError
from virgo.home import node_directory, record_path, run_directory, socket_path, write_record
from virgo.kernel.load import machine_id, measure
from virgo.kernel.ports import port_taken
from virgo.kernel.process import ProcessMark
from virgo.kernel.systemd import notify, watchdog_interval_s
from virgo.members import PORTS, Load, Member
from virgo.memory.memcached import place as memcached
from virgo.memory.memcached.place import PLACE as MEMCACHED
from virgo.node import commands as node_commands
from virgo.node.engines import connect_engine
from virgo.node.membership import Membership, register_patiently
from virgo.node.modules import ModuleHost, discover
from virgo.node.peers import Peers
from virgo.node.transport import advertised, client_tls, server_tls
from virgo.wire import common
from virgo.wire.address import Address
from virgo.wire.auth import Authenticator
from virgo.wire.commands import Command, CommandTable
from virgo.wire.crowd import Crowd
from virgo.wire.server import Listener, Service

log = logging.getLogger("virgo.node")
_GC_ALLOCATIONS = 20_000  # a request is a few lists; Python's 700 would collect at every pipeline


class Node:
    """A running node; `async with Node(...)` serves until the block ends.

    Args:
        config: the configuration; `config.home` is VIRGO_HOME.
        name: the node's name.
        index: its place among the nodes of a local cloud, 1 for the first; shifts its ports by index - 1.
    """

    def __init__(self, config: Config, name: str, *, index: int = 1) -> None:
        self.config = config
        self.name = name
        self.number = 0
        self.index = index
        self.directory: Path = node_directory(config.home, name)
        self.engine: Engine
        self.ports = ports(config, index)
        self._memcached = memcached.place(config, name, index)
        self.modules = ModuleHost(self._serve)
        self.membership: Membership
        self.peers: Peers
        self.listeners: list[Listener] = []
        self._id = ""
        self._state = "starting"
        self.begun = False  # whether the engine and the other nodes are known
        self._tls: ssl.SSLContext | None = None
        self._crowd = Crowd()
        self._machine = machine_id()
        self._started_ms = time.time_ns() // 1_000_000
        self._tables: dict[str, CommandTable] = {}
        self._later: Listener | None = None  # what is opened once the modules are up
        self._apart: dict[str, CommandTable] = {}  # of places that do not speak RESP
        self._shared: list[Command] = []
        self._offered: dict[str, Sequence[Command]] = {}
        self._exit = contextlib.AsyncExitStack()
        self._measured: tuple[float, Load] = (0.0, Load())
        self.stopping = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Node {self.name} ({self.number}) {self.modules!r}>"

    async def __aenter__(self) -> Node:
        async with contextlib.AsyncExitStack() as stack:
            await self._open(stack)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._exit.aclose()

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        authenticator = Authenticator(self.config.home, self.config.security)
        self._make_tables()
        await self._listen(stack, authenticator)  # first: a taken port must be said before anything is done
        self.engine = await connect_engine(self.config)
        stack.push_async_callback(self.engine.close)
        self.number, self._id = await register_patiently(self.engine, self.directory, self.name)
        self.membership = Membership(
            self.engine,
            self.describe,
            self._lost,
            connect=lambda: connect_engine(self.config, name=f"{self.name}-heart"),
        )
        self.peers = Peers(
            find=self.membership.view.get,
            is_up=self.membership.view.is_up,
            suspect=self.membership.suspect,
            machine=self._machine,
            tls=client_tls(self.config),
        )
        stack.push_async_callback(self.peers.close)
        await self.membership.start()
        self.begun = True
        stack.push_async_callback(self.membership.stop)
        await self.modules.start(discover(), lambda name: _Services(self, name))
        stack.push_async_callback(self.modules.stop)
        if self._later is not None:
            await self._open_listener(stack, self._later)
        self._state = "up"
        await self.membership.beat()
        await stack.enter_async_context(_background(self.membership.run(), "beats"))
        await stack.enter_async_context(_background(self._watchdog(), "watchdog"))
        record = {"process": ProcessMark.of(os.getpid()).to_json(), "member": self.describe()}
        path = record_path(self.config.home, self.name)
        write_record(path, record)
        stack.callback(path.unlink, missing_ok=True)
        notify("READY=1")

    # --- listening ----------------------------------------------------------------------------

    def _make_tables(self) -> None:
        shared = [*common.commands(lambda: node_commands.info(self)), *node_commands.commands(self)]
        for place in ("", *PORTS):
            self._tables[place] = CommandTable(shared)
            self._tables[place].fallback = node_commands.absent(place)
        self._shared = shared
        self._apart[MEMCACHED] = CommandTable()
        self._apart[MEMCACHED].fallback = node_commands.absent("memory")

    def _serve(self, module: str, commands: Sequence[Command]) -> None:
        """Offer a module's commands on its own port, on the Unix socket and on other modules' ports.

        Where two modules use a name, the port's own module wins. A port without its module offers
        nothing but the common commands.
        """
        for place, table in self._apart.items():
            table.add(command for command in commands if command.place == place)
        self._offered[module] = commands = [command for command in commands if not command.place]
        for place, table in self._tables.items():
            if place and place not in self._offered:
                continue
            table.fallback = node_commands.unserved(self.modules.states)
            others = [one for name, offered in self._offered.items() if name != place for one in offered]
            table.replace([*others, *self._offered.get(place, ()), *self._shared])

    async def _listen(self, stack: contextlib.AsyncExitStack, authenticator: Authenticator) -> None:
        run_directory(self.config.home)
        path = str(socket_path(self.config.home, self.name))
        places: list[tuple[str, Address]] = [("", Address(path=path))]
        tls = self._tls = server_tls(self.config)
        for module, port in self.ports.items():
            places.append((module, Address(host=self.config.node.bind, port=port, tls=tls is not None)))
        for place, address in places:
            service = Service(self._tables[place], authenticator, crowd=self._crowd)
            await self._open_listener(stack, Listener(service, address, tls=tls if address.tls else None))
        if self._memcached.open:
            self._offer_memcached(authenticator)

    def _offer_memcached(self, authenticator: Authenticator) -> None:
        """Take the place where memcached's protocol is spoken; it is served once the memory is there.

        Clients of memcached know a server that refuses connections, and not one that is still starting.
        """
        place = self._memcached
        service = Service(
            self._apart[MEMCACHED],
            authenticator,
            crowd=self._crowd,
            speech=place.speech(),
            stranger=place.stranger,
        )
        tls = server_tls(self.config, place.address.host) if place.address.tls else None
        self._later = Listener(service, place.address, tls=tls)
        with _naming_holder(place.address):
            self._later.bind()

    async def _open_listener(self, stack: contextlib.AsyncExitStack, listener: Listener) -> None:
        stack.push_async_callback(listener.close)
        with _naming_holder(listener.address):
            await listener.open()
        self.listeners.append(listener)

    # --- what modules and commands ask ----------------------------------------------------------

    def describe(self) -> Member:
        """This node's member record, with its load of now."""
        return Member(
            name=self.name,
            number=self.number,
            id=self._id,
            machine=self._machine,
            socket=str(socket_path(self.config.home, self.name)),
            address=advertised(self.config),
            tls=self._tls is not None,
            ports=self.ports,
            pid=os.getpid(),
            started_ms=self._started_ms,
            state=self._state,
            version=__version__,
            modules=self.modules.states(),
            load=self.load(),
        )

    def load(self) -> Load:
        """The load, measured at most ten times a second."""
        now = time.monotonic()
        if now - self._measured[0] > 0.1:
            self._measured = (now, measure(self.directory))
        return self.modules.load(self._measured[1])

    def _lost(self, member: Member) -> None:
        self.peers.lose(member)

    async def _watchdog(self) -> None:
        """Tell systemd that the event loop turns, if it asks."""
        interval_s = watchdog_interval_s()
        while interval_s:
            notify("WATCHDOG=1")
            await asyncio.sleep(interval_s / 2)


class _Services:
    """What one module sees of the node: `virgo.module.NodeServices`."""

    def __init__(self, node: Node, module: str) -> None:
        self._node = node
        self._module = module
        self.name = node.name
        self.number = node.number
        self.index = node.index
        self.directory = node.directory
        self.config = node.config
        self.engine = node.engine

    def members(self) -> Sequence[Member]:
        """See NodeServices."""
        return self._node.membership.view.up()

    def known(self) -> Sequence[Member]:
        """See NodeServices."""
        return self._node.membership.view.known()

    def member(self, number: int) -> Member:
        """See NodeServices."""
        member = self._node.membership.view.get(number)
        if member is None:
            raise NoNode(f"no node has the number {number}")
        return member

    async def call(self, number: int, *request: bytes | str | int, timeout_s: float | None = None) -> Any:
        """See NodeServices."""
        if number == self.number:
            raise NodeLost(f"node {self.name} calls itself", hint="A defect: local work needs no call.")
        return await self._node.peers.call(number, *request, timeout_s=timeout_s)

    def announce(self) -> None:
        """See NodeServices."""
        self._node.membership.announce()

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """See NodeServices."""
        self._node.modules.spawn(self._module, work, task_name=name)


@contextlib.contextmanager
def _naming_holder(address: Address) -> Iterator[None]:
    """A port that is taken is an error that names who has it."""
    try:
        yield
    except PortTaken as error:
        raise (port_taken(address.port, address.host) if address.port else error) from error


def ports(config: Config, index: int) -> dict[str, int]:
    """The six ports of the node in that place; none if it binds nowhere."""
    if not config.node.bind:
        return {}
    shift = config.node.port_offset + index - 1
    found = {name: port + shift for name, port in PORTS.items()}
    high = max(found.values())
    if high > 65535 or min(found.values()) < 1:
        raise PortTaken(
            f"port {high} does not exist", hint="Choose a --port-offset so that 64000 + offset + node fits."
        )
    return found


@contextlib.asynccontextmanager
async def _background(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    task = asyncio.create_task(work, name=name)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def serve(config: Config, name: str, *, index: int = 1) -> None:
    """Run a node until SIGTERM or SIGINT.

    Raises:
        VirgoError: the node could not start.
    """
    _raise_descriptor_limit()
    node = Node(config, name, index=index)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, node.stopping.set)
    async with node:
        _settle_memory()
        log.info("node %s serves", name)
        await node.stopping.wait()
        notify("STOPPING=1")
        log.info("node %s stops", name)


def _settle_memory() -> None:
    """What lives as long as the node need not be looked at by the garbage collector again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_ALLOCATIONS, 20, 100)


def _raise_descriptor_limit() -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def write_failure(path: Path, error: VirgoError) -> None:
    """Leave the reason of a failed start where `virgo up` looks for it."""
    write_record(path, {"error": error.to_line()})
