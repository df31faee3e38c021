"""The engine of this machine: which one it is, its embedded servers, and how nodes get to it.

In this order: the NATS that `engine.url` names; that of the cloud that `node.join` names, asked of one of
its nodes over mutual TLS; else embedded servers, one, or three or five as a cluster. How to get there is
kept in `engine/access.json` (0600), which the nodes of this machine read.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import random
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil

from virgo.config import Config, reference_addresses
from virgo.engine.base import Engine
from virgo.engine.monitor import fetch_json
from virgo.engine.nats import connect
from virgo.engine.ports import choose_port
from virgo.engine.server import EmbeddedServer, ServerOptions
from virgo.engine.serverconf import Cluster, ServerTls
from virgo.errors import BadArgument, BadConfig, NotRunning, UnsafeEngine, VirgoError
from virgo.home import read_record, record_path, write_record
from virgo.limits import (
    ENGINE_CHECK_S,
    ENGINE_CHECKS_FAILED_MAX,
    ENGINE_ROOM_BYTES,
    RESTART_BACKOFF_S_MAX,
)
from virgo.members import PORTS
from virgo.node.transport import advertised, client_tls, exposed
from virgo.wire import address
from virgo.wire.aclient import AsyncClient
from virgo.wire.authority import SECRET
from virgo.wire.tls import files_of

log = logging.getLogger("virgo.up")
# Where an embedded engine listens for other machines, and for the other servers of a cluster over
# machines: outside the ephemeral range.
ENGINE_PORT: Final = 14_222
ROUTE_PORT: Final = 16_222
_BACKOFF_S_MIN = 0.2
_JOIN_S = 20.0


class Access(msgspec.Struct, frozen=True):
    """How to get to the engine. `tls` means the cloud's own certificates."""

    url: str
    user: str = ""
    password: str = ""
    credentials: str = ""
    monitor: str = ""
    replicas: int = 1
    tls: bool = False
    own: bool = False  # servers that VIRGO configures, so that their settings need not be looked at


def access_path(home: Path) -> Path:
    """Where this machine keeps its way to the engine."""
    return home / "engine" / "access.json"


def read_access(home: Path) -> Access:
    """The way to the engine, as `virgo up` wrote it. Raises NotRunning."""
    record = read_record(access_path(home))
    if record is None:
        raise NotRunning(f"no engine is known under {home}", hint="Nodes are started by `virgo up`.")
    return msgspec.convert(record, Access)


async def connect_engine(config: Config, *, name: str = "virgo") -> Engine:
    """Connect a node to the engine of its cloud. Raises EngineUnavailable, UnsafeEngine."""
    access = read_access(config.home)
    return await connect(
        _nearest_first(access.url, advertised(config)),
        user=access.user,
        password=access.password,
        credentials=access.credentials,
        tls=client_tls(config) if access.tls else None,
        name=name,
        replicas=access.replicas,
        unsafe=config.engine.unsafe,
        monitor=access.monitor,
        trusted=access.own,
    )


def own_addresses() -> frozenset[str]:
    """Every name and address of this machine."""
    links = (address.address for found in psutil.net_if_addrs().values() for address in found)
    return frozenset({*links, "localhost", socket.gethostname()})


def reference_joins(home: Path, own: frozenset[str]) -> list[str]:
    """Whom to join by the reference's `virgo_cloud.conf`: its first machine begins, the others join it."""
    listed = reference_addresses("virgo_cloud.conf", home)
    if not listed or address.parse(listed[0]).host in own:
        return []
    return [place for place in listed if address.parse(place).host not in own]


class LocalEngine:
    """What of the engine runs on this machine: nothing, or embedded servers that are kept running.

    Args:
        config: the configuration.
        count: embedded servers: 1, 3 or 5.
        on_change: called after a server was restarted.
    """

    def __init__(self, config: Config, count: int, *, on_change: Callable[[], None]) -> None:
        if count not in (1, 3, 5):
            raise BadArgument(f"{count} engine servers", hint="1, 3 or 5: an even number gains nothing.")
        self.config = config
        self.directory = config.home / "engine"
        self.servers: list[EmbeddedServer] = []
        self.access: Access | None = None
        self._count = count
        self._probe: Engine | None = None
        self._joins = config.node.join or reference_joins(config.home, own_addresses())
        self._on_change = on_change
        self._restarts = 0
        self._starting: set[EmbeddedServer] = set()

    def __repr__(self) -> str:
        return f"<LocalEngine {self.access.url if self.access else 'unstarted'} {len(self.servers)} servers>"

    async def start(self) -> None:
        """Find or start the engine, and write down how to get there."""
        if self.config.engine.url:
            self.access = self._configured()
        elif self._joins and not self.config.engine.cluster:
            self.access = await self._joined()
        else:
            self.servers = await asyncio.to_thread(self._servers)
            for server in self.servers:
                await server.start(ready=self._count == 1 and not self.config.engine.cluster)
            for server in self.servers:
                await server.wait_ready()
            self.access = self._embedded()
        write_record(access_path(self.config.home), self.access)

    async def watch(self) -> None:
        """Restart each server that ends; runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            for server in self.servers:
                group.create_task(self._watch(server))
                group.create_task(self._heal(server))

    async def stop(self) -> None:
        """Stop the servers that run here."""
        if self._probe is not None:
            await self._probe.close()
        for server in self.servers:
            await server.stop()

    def record(self) -> None:
        """Write down again which processes the servers are. Raises OSError."""
        for server in self.servers:
            server.write_record()

    def describe(self) -> dict[str, Any]:
        """For `virgo status`."""
        if self.access is None:
            return {}
        shown = [server.describe() for server in self.servers]
        pid = shown[0]["pid"] if shown else None
        return {"url": self.access.url, "pid": pid, "embedded": shown, "restarts": self._restarts}

    async def _watch(self, server: EmbeddedServer) -> None:
        backoff_s = _BACKOFF_S_MIN
        while True:
            started = time.monotonic()
            await server.wait()
            if time.monotonic() - started > 30:
                backoff_s = _BACKOFF_S_MIN
            log.warning("the engine %s ended; starting it again in %.1f s", server.options.name, backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, RESTART_BACKOFF_S_MAX)
            self._restarts += 1
            self._starting.add(server)
            try:
                await server.start(ready=False)
            except VirgoError as error:
                log.warning("the engine %s did not start: %s", server.options.name, error)
            finally:
                self._starting.discard(server)
            self._on_change()

    async def _heal(self, server: EmbeddedServer) -> None:
        """End a server that runs but cannot serve, so that it is started anew; runs until cancelled.

        It may be stopped; or its disk was full, and a stream that could not write stays closed until a new
        start, which makes sense only when the disk takes writes again. A server that has lost its cluster
        is left alone: it heals by itself, and its neighbours need it.
        """
        ill = 0
        while True:
            await asyncio.sleep(ENGINE_CHECK_S)
            runs = server.pid and server not in self._starting  # one that starts may read a large store first
            ill = ill + 1 if runs and not await self._healthy(server) else 0
            if ill < ENGINE_CHECKS_FAILED_MAX:
                continue
            name = server.options.name
            try:
                await asyncio.to_thread(_try_disk, server.directory)
                log.warning("the engine %s cannot serve; it is started anew", name)
                await server.stop()
            except (VirgoError, OSError) as error:
                log.warning("the engine %s cannot serve, and to start it anew does not help: %s", name, error)
            else:
                ill = 0

    async def _healthy(self, server: EmbeddedServer) -> bool:
        """Whether the server can write a register; of a cluster's server only whether it answers at all."""
        try:
            if len(self.servers) > 1 or self.config.engine.cluster or self.access is None:
                await fetch_json(f"{server.monitor}/healthz?js-enabled-only=true")
                return True
            if self._probe is None:
                self._probe = await connect_engine(self.config, name="virgo-health")
            found = await self._probe.registers.get("health")
            version = found.version if found else 0
            await self._probe.registers.compare_and_set("health", b"", version=version)
        except VirgoError as error:
            log.warning("the engine %s: %s", server.options.name, error)
            return False
        return True

    # --- the three ways -------------------------------------------------------------------------

    def _configured(self) -> Access:
        engine = self.config.engine
        if not engine.monitor and not engine.unsafe:
            raise UnsafeEngine(
                f"whether the engine at {engine.url} syncs before it acknowledges cannot be seen",
                hint="Set engine.monitor to its monitoring URL, or accept it with --unsafe-engine.",
            )
        tls = engine.url.startswith("tls:")
        return Access(engine.url, credentials=engine.credentials, monitor=engine.monitor, tls=tls)

    def _embedded(self) -> Access:
        first, hosts = self.servers[0], self.config.engine.cluster
        urls = [f"tls://{host}:{first.port}" for host in hosts] or [server.url for server in self.servers]
        return Access(
            url=",".join(urls),
            user=first.user,
            password=first.password,
            monitor=first.monitor,
            replicas=len(hosts) or self._count,
            tls=first.options.tls is not None,
            own=True,
        )

    async def _joined(self) -> Access:
        """Ask the nodes of the cloud to join for the way to its engine."""
        tls = client_tls(self.config)
        if tls is None:
            raise BadConfig(
                "joining a cloud on another machine needs a certificate",
                hint="There: `virgo ca issue NAME --node`; copy its files to $VIRGO_HOME/tls here.",
            )
        failures: list[str] = []
        deadline = time.monotonic() + _JOIN_S
        while time.monotonic() < deadline:
            failures.clear()
            for host in self._joins:
                place = address.parse(host, default_port=PORTS["memory"])
                place = address.Address(host=place.host, port=place.port, tls=True)
                try:
                    async with AsyncClient(place, tls=tls) as client:
                        reply = await client.execute("ENGINE.ACCESS")
                except NotRunning as error:
                    failures.append(str(error))
                    continue
                access = msgspec.json.decode(reply, type=Access)
                url = access.url.replace("//127.0.0.1:", f"//{place.host}:")
                return msgspec.structs.replace(access, url=url, monitor="")
            await asyncio.sleep(0.5)
        raise NotRunning(f"no node of the cloud to join answers: {'; '.join(failures)}")

    def _servers(self) -> list[EmbeddedServer]:
        config, open_to_others = self.config, exposed(self.config)
        if config.engine.cluster:
            return [self._member_of_cluster()]
        kept = self._kept()
        port = config.engine.port or (ENGINE_PORT + config.node.port_offset if open_to_others else 0)
        return [
            self._server(
                index,
                ServerOptions(
                    name=f"{kept['name']}-{index + 1}",
                    host=config.node.bind if open_to_others else "127.0.0.1",
                    port=port + index if port else 0,
                    program=config.engine.server,
                    unsafe=config.engine.unsafe,
                    tls=self._tls() if open_to_others else None,
                    cluster=self._local_cluster(kept, index),
                    password=kept["password"],
                ),
            )
            for index in range(self._count)
        ]

    def _server(self, index: int, options: ServerOptions) -> EmbeddedServer:
        record = record_path(self.config.home, f"engine-{index + 1}")
        return EmbeddedServer(self.directory / str(index + 1), options, record=record)

    def _local_cluster(self, kept: dict[str, Any], index: int) -> Cluster | None:
        if self._count == 1:
            return None
        routes = [f"127.0.0.1:{port}" for port in kept["routes"][: self._count]]
        return Cluster(name=kept["name"], port=kept["routes"][index], routes=routes, secret=kept["secret"])

    def _member_of_cluster(self) -> EmbeddedServer:
        """This machine's server of a cluster over the machines of `engine.cluster`."""
        config, hosts = self.config, self.config.engine.cluster
        own, offset, tls = advertised(config), config.node.port_offset, self._tls()
        if len(hosts) not in (3, 5) or own not in hosts or not exposed(config):
            raise BadConfig(
                f"engine.cluster is {', '.join(hosts)}, and this machine is {own}",
                hint="Name 3 or 5 hosts, this one among them as it is bound or advertised.",
            )
        secret = self._shared_secret()
        cluster = Cluster(
            name="virgo",
            host=config.node.bind,
            port=ROUTE_PORT + offset,
            routes=[f"{host}:{ROUTE_PORT + offset}" for host in hosts],
            secret=_derived(secret, "routes"),
            tls=tls,
        )
        options = ServerOptions(
            name=f"virgo-{own}",
            host=config.node.bind,
            port=config.engine.port or ENGINE_PORT + offset,
            program=config.engine.server,
            unsafe=config.engine.unsafe,
            tls=tls,
            cluster=cluster,
            password=_derived(secret, "clients"),
        )
        return self._server(0, options)

    def _shared_secret(self) -> bytes:
        path = self.config.home / "tls" / SECRET
        try:
            return path.read_bytes()
        except OSError as error:
            raise BadConfig(
                f"{path}: {error.strerror}", hint="It comes with what `virgo ca issue NAME --node` makes."
            ) from error

    def _tls(self) -> ServerTls:
        files = files_of(self.config.home, self.config.security)
        return ServerTls(certificate=files.certificate, key=files.key, authority=files.authority)

    def _kept(self) -> dict[str, Any]:
        """Names, secrets and ports of the servers: chosen once, for the life of the cloud."""
        path = self.directory / "servers.json"
        kept = read_record(path)
        if kept is None:
            routes: list[int] = []
            for _ in range(5):
                routes.append(choose_port("127.0.0.1", taken=routes))
            kept = {
                "name": f"virgo-{secrets.token_hex(4)}",
                "password": secrets.token_urlsafe(32),
                "secret": secrets.token_urlsafe(32),
                "routes": routes,
                "count": self._count,
            }
            write_record(path, kept)
        if kept["count"] != self._count:
            raise BadConfig(
                f"this cloud has {kept['count']} engine servers, not {self._count}",
                hint=f"Start it with --engines {kept['count']}; their number cannot change.",
            )
        return kept


def _try_disk(directory: Path) -> None:
    """Write and sync what an engine may write next, and take it away. Raises OSError."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(ENGINE_ROOM_BYTES))
        file.flush()
        os.fsync(file.fileno())


def _derived(secret: bytes, purpose: str) -> str:
    return hmac.new(secret, purpose.encode(), hashlib.sha256).hexdigest()


def _nearest_first(urls: str, own: str) -> str:
    """The engine's servers in the order to try them: this machine's own, then the others at random."""
    places = urls.split(",")
    random.shuffle(places)
    return ",".join(sorted(places, key=lambda place: f"//{own}:" not in place))
