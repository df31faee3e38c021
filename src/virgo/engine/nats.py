"""The engine on NATS JetStream.

`connect` gives an object with the interfaces of `base`. It needs a server that acknowledges nothing before
it is on disk; `audit` looks at what can be seen and refuses the rest. While the server is away calls fail
with EngineUnavailable in bounded time, and work again when it is back; subscriptions and followed logs go
on by themselves.
"""

from __future__ import annotations

import asyncio
import ssl
import time

import msgspec

from virgo.engine.audit import Audit, server_findings, version_findings
from virgo.engine.base import EngineStatus, Leases, Logs, Registers, Signals
from virgo.engine.jetstream import JetStream, Refused
from virgo.engine.leases import NatsLeases
from virgo.engine.link import Link, LinkOptions, without_password
from virgo.engine.logs import NatsLogs
from virgo.engine.monitor import fetch_json
from virgo.engine.registers import NatsRegisters
from virgo.engine.signals import NatsSignals
from virgo.errors import BadArgument, EngineUnavailable, UnsafeEngine
from virgo.limits import ENGINE_REQUEST_S


class NatsEngine:
    """An engine over one connection; made by `connect`."""

    def __init__(self, link: Link, jetstream: JetStream) -> None:
        self._link = link
        self._jetstream = jetstream
        self._audit = Audit()
        self._logs = NatsLogs(jetstream)
        self.logs: Logs = self._logs
        self.registers: Registers = NatsRegisters(jetstream)
        self.leases: Leases = NatsLeases(jetstream)
        self.signals: Signals = NatsSignals(link)

    def __repr__(self) -> str:
        status = self.status()
        return f"<NatsEngine {status.url} {'up' if status.connected else 'down'} {status.version}>"

    def status(self) -> EngineStatus:
        """Where it is and how it is; no I/O."""
        link = self._link
        return EngineStatus(
            url=without_password(link.url),
            connected=link.connected,
            version=link.version,
            servers=tuple(without_password(url) for url in link.servers),
            replicas=self._jetstream.replicas,
            reconnects=link.reconnects,
            unsafe=(*self._audit.unsafe, *self._jetstream.findings),
            notes=self._audit.notes,
        )

    async def audit(self, *, monitor: str = "", trusted: bool = True) -> Audit:
        """Look at the server's version and settings.

        Args:
            monitor: URL of its monitoring port, `http://127.0.0.1:8222`, or several with commas between
                them; "" if there is none in reach. A server of a cluster that is away is noted.
            trusted: the configuration is our own, so it does not matter if it cannot be seen; otherwise one
                of the monitoring ports must be that of the very server which answers us.

        Raises:
            UnsafeEngine: it can lose acknowledged data, and `unsafe` was not given to `connect`.
        """
        deadline = time.monotonic() + ENGINE_REQUEST_S
        unsafe = version_findings(self._link.version)
        notes: list[str] = []
        try:
            await self._jetstream.api("INFO", deadline=deadline)
        except Refused as refusal:
            unsafe.append(f"JetStream cannot be used with this account: {refusal}")
        seen: set[str] = set()
        for url in filter(None, monitor.split(",")):
            try:
                answer = await fetch_json(f"{url}/varz")
            except EngineUnavailable as error:
                notes.append(f"a server's settings could not be seen: {error.message}")
            else:
                settings = msgspec.json.decode(answer)
                seen.add(settings.get("server_id", ""))
                unsafe += server_findings(settings)
        if monitor and not trusted and self._link.server_id not in seen:
            unsafe.append(
                "engine.monitor does not show the server that answers"
                f"{f' ({notes[0]})' if notes else ': it is the monitoring port of another one'}"
            )
        elif not seen:
            notes.append("whether the server syncs before it acknowledges cannot be seen from a client")
        self._audit = Audit(tuple(dict.fromkeys(unsafe)), tuple(notes))
        if self._audit.unsafe and not self._jetstream.unsafe:
            raise UnsafeEngine(f"the engine at {self.status().url}: {'; '.join(self._audit.unsafe)}")
        return self._audit

    async def close(self) -> None:
        """Disconnect; what is under way fails."""
        await self._logs.close()
        await self._link.close()


async def connect(
    url: str,
    *,
    token: str = "",
    user: str = "",
    password: str = "",
    credentials: str = "",
    tls: ssl.SSLContext | None = None,
    tls_hostname: str = "",
    name: str = "virgo",
    replicas: int = 1,
    unsafe: bool = False,
    monitor: str = "",
    trusted: bool = True,
    timeout_s: float = ENGINE_REQUEST_S,
) -> NatsEngine:
    """Connect to a NATS server or cluster and audit it.

    Args:
        url: `nats://HOST:PORT` or `tls://HOST:PORT`; several with commas between them.
        token, user and password, credentials: one way to log in; `credentials` is a NATS credentials file.
        tls: context with the certificates, for a server that speaks TLS.
        tls_hostname: the name in the server's certificate, if it is not the URL's host.
        name: shown in the server's list of connections.
        replicas: copies of everything: 1, or 3 or 5 in a cluster.
        unsafe: go on with settings that can lose acknowledged data.
        monitor, trusted: see `NatsEngine.audit`.

    Raises:
        EngineUnavailable: no server took the connection within `timeout_s`.
        UnsafeEngine: see `NatsEngine.audit`.
    """
    urls = tuple(part.strip() for part in url.split(",") if part.strip())
    if not urls:
        raise BadArgument("the engine's URL is empty", hint="nats://HOST:PORT")
    if replicas not in (1, 3, 5):
        raise BadArgument(f"{replicas} replicas", hint="1, 3 or 5: an even number gains nothing.")
    options = LinkOptions(
        urls=urls,
        name=name,
        token=token,
        user=user,
        password=password,
        credentials=credentials,
        tls=tls,
        tls_hostname=tls_hostname,
    )
    link = Link(options)
    await link.open(timeout_s)
    engine = NatsEngine(link, JetStream(link, replicas=replicas, unsafe=unsafe))
    try:
        await engine.audit(monitor=monitor, trusted=trusted)
    except (EngineUnavailable, UnsafeEngine, asyncio.CancelledError):
        await link.close()
        raise
    return engine
