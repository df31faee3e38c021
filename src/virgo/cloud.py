"""`connect()` and `Cloud`: one object, one attribute per module.

`connect()` looks for a node in this order: the place it is given, `VIRGO_URL`, a node under VIRGO_HOME,
the machines of `virgo_client.conf`. If there is none it starts an embedded node that ends with this
program, and says so.
"""

from __future__ import annotations

import os
import ssl
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from virgo import config as configuration
from virgo.errors import BadArgument, BadConfig, Busy, NodeLost, NotRunning, WrongType
from virgo.home import socket_path
from virgo.limits import NODE_START_S, REQUEST_DEADLINE_S
from virgo.members import PORTS, Member
from virgo.wire.address import Address, parse
from virgo.wire.call import Call
from virgo.wire.client import Client

if TYPE_CHECKING:
    from virgo.cpu.client import CpuClient
    from virgo.files.client import FilesClient
    from virgo.memory.client import MemoryClient

EMBEDDED = "n1"
_POLL_S = 0.05


class Cloud:
    """A connection to the cloud through one of its nodes; safe for use from several threads.

    Args:
        client: the pool of connections to that node.
        cpu: who runs callables, by the configuration of this program.

    Attributes:
        client: see there.
    """

    def __init__(self, client: Client, cpu: configuration.CpuConfig = configuration.CpuConfig()) -> None:  # noqa: B008 - it is frozen
        self.client = client
        self._cpu = cpu

    def __repr__(self) -> str:
        return f"<Cloud at {self.client.address}>"

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        """In another process: a connection of its own, to the node that is near there."""
        return connect, ()

    def __enter__(self) -> Cloud:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @cached_property
    def cpu(self) -> CpuClient:
        """Processors: run functions and programs on the least loaded node."""
        from virgo.cpu.client import CpuClient

        return CpuClient(self.client, self._cpu)

    @cached_property
    def memory(self) -> MemoryClient:
        """Memory: regions by id, and a mapping of keys to bytes."""
        from virgo.memory.client import MemoryClient

        return MemoryClient(self.client)

    @cached_property
    def files(self) -> FilesClient:
        """Files of every node."""
        from virgo.files.client import FilesClient

        return FilesClient(self.client)

    @property
    def nodes(self) -> list[Member]:
        """The nodes that are up now, by name."""
        from virgo.node.control import NODES

        return self.client.run(NODES)

    def modules(self) -> list[dict[str, Any]]:
        """Modules of the connected node, in load order."""
        return self.client.run(Call(("MODULES",), msgspec.json.decode))

    def stats(self) -> dict[str, Any]:
        """The connected node: its member record, engine, modules and their figures."""
        return self.client.run(Call(("STATUS",), msgspec.json.decode))

    def close(self) -> None:
        """Let go of everything that this connection holds."""
        if "cpu" in self.__dict__:
            self.cpu.close()
        if "memory" in self.__dict__:
            self.memory.close()
        self.client.close()


def connect(
    target: str | None = None,
    *,
    token: str | None = None,
    home: str | Path | None = None,
    timeout_s: float = REQUEST_DEADLINE_S,
    embedded: bool = True,
) -> Cloud:
    """The cloud, through a node.

    Args:
        target: `HOST`, `HOST:PORT`, `tls:HOST:PORT` or `unix:/path`; None to look around (see the module).
        token: for TCP on loopback; by default the one in VIRGO_HOME.
        home: instead of VIRGO_HOME.
        timeout_s: deadline of requests that name none.
        embedded: start a node when there is none.

    Raises:
        NotRunning: no node answers there.
        BadConfig: the configuration is wrong.
        BadArgument: `target` is no address, or `timeout_s` is not positive.
        WrongToken, NotAuthenticated: it does not know you.
    """
    search = places(target, token=token, home=home, timeout_s=timeout_s, embedded=embedded)
    while True:
        how, last, config = next(search)
        try:
            return Cloud(checked(Client(**how, timeout_s=timeout_s)), config.cpu)
        except (NotRunning, NodeLost):
            if last:
                raise


def places(
    target: str | None, *, token: str | None, home: str | Path | None, timeout_s: float, embedded: bool
) -> Iterator[tuple[dict[str, Any], bool, configuration.Config]]:
    """Where `connect` looks: how to reach each place, whether its silence is final, the configuration."""
    if not isinstance(timeout_s, int | float):
        raise WrongType(f"timeout_s is {timeout_s!r:.40}, but must be a number", hint="It is in seconds.")
    if not timeout_s > 0:
        raise BadArgument(f"timeout_s is {timeout_s}, but must be more than 0", hint="It is in seconds.")
    environment = dict(os.environ) if home is None else {**os.environ, "VIRGO_HOME": str(home)}
    config = configuration.load(environment)
    target = target or environment.get("VIRGO_URL")
    if target:
        yield reach(config, target, token), True, config
        return
    let_settle(config.home)
    tried = candidates(config)
    for place in tried:
        yield reach(config, place, token), False, config
    if not embedded:
        raise NotRunning(
            f"no node answers ({', '.join(tried) or f'none under {config.home}'})",
            hint="`virgo up` starts one; virgo.connect('HOST') goes to another machine.",
        )
    yield reach(config, start_embedded(config.home), token), True, config


def candidates(config: configuration.Config) -> list[str]:
    """Places where a node may answer, when none was named."""
    from virgo.node.control import local_nodes

    local = [f"unix:{socket_path(config.home, name)}" for name in local_nodes(config.home)]
    return local + configuration.reference_addresses("virgo_client.conf", config.home)


def reach(config: configuration.Config, target: str, token: str | None) -> dict[str, Any]:
    """How to get to a place: address, token and TLS context, as the clients take them."""
    address = parse(target, default_port=PORTS["memory"] + config.node.port_offset)
    if address.path:
        return {"address": address, "token": token or "", "tls": None}
    if address.loopback and not address.tls:
        return {"address": address, "token": token or _token(config.home), "tls": None}
    try:
        tls = _tls(config)
    except BadConfig as error:
        raise BadConfig(
            f"{target!r} would be another machine, reached by TLS, but {error.message}", hint=error.hint
        ) from error
    return {
        "address": Address(host=address.host, port=address.port, tls=True),
        "token": token or "",
        "tls": tls,
    }


def _token(home: Path) -> str:
    try:
        return (home / "token").read_text().strip()
    except OSError:
        return ""


def _tls(config: configuration.Config) -> ssl.SSLContext:
    from virgo.wire.tls import client_context

    return client_context(config.home, config.security)


def checked(client: Client) -> Client:
    """The client, once the node has answered and knows who we are."""
    try:
        client.execute("WHOAMI")
    except BaseException:
        client.close()
        raise
    return client


def let_settle(home: Path) -> None:
    """Wait for a cloud that is starting, and for the end of one whose program has ended: meet neither."""
    from virgo.node.control import unsettled

    deadline = time.monotonic() + NODE_START_S
    while unsettled(home) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def start_embedded(home: Path) -> str:
    """Start a node that ends with this program, or wait for one that is starting; returns its place."""
    from virgo.kernel.process import ProcessMark
    from virgo.node.control import any_client, start_detached
    from virgo.node.supervisor import UpOptions

    owner = ProcessMark.of(os.getpid()).to_json()
    options = UpOptions(nodes=[EMBEDDED], owner=owner, environment={"VIRGO_NODE_BIND": ""})
    deadline = time.monotonic() + NODE_START_S
    while True:
        try:
            start_detached(home, options)
            break
        except Busy:  # another program was faster, and its node will serve us too, unless it ends just now
            let_settle(home)
            try:
                with any_client(home) as client:
                    return str(client.address)
            except NotRunning:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)
    sys.stderr.write(
        f"virgo: no node is running under {home}, so an embedded one was started; it ends with this program."
        " `virgo up` starts a lasting one.\n"
    )
    return f"unix:{socket_path(home, EMBEDDED)}"
