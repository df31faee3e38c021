"""The configuration of the embedded nats-server, as text.

Safe settings (see `audit` for why): sync before every acknowledgement, data in a directory of our own, an
account with one user and a password, no user without one, monitoring on loopback only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from virgo.limits import MiB

# One message of the engine; LOG_ENTRY_BYTES_MAX and headers fit.
_PAYLOAD_BYTES_MAX: Final = 1 * MiB
_MEMORY_BYTES_MAX: Final = 256 * MiB
_LOG_BYTES_MAX: Final = 10 * MiB


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM files of a port; `verify` asks clients for a certificate of the same authority."""

    certificate: Path
    key: Path
    authority: Path
    verify: bool = True


@dataclass(frozen=True, slots=True)
class Cluster:
    """A server's part of a cluster.

    Attributes:
        name: the cluster's name, the same on all servers.
        host, port: where this server listens for the others.
        routes: `HOST:PORT` of the servers, this one may be among them.
        secret: password between servers, the same on all.
        tls: certificates between servers; needed beyond loopback.
    """

    name: str
    port: int
    routes: Sequence[str]
    host: str = "127.0.0.1"
    secret: str = field(default="", repr=False)
    tls: ServerTls | None = None


def render(
    *,
    directory: Path,
    name: str,
    host: str,
    port: int,
    monitor_port: int,
    password: str,
    system_password: str,
    disk_bytes: int,
    tls: ServerTls | None = None,
    cluster: Cluster | None = None,
) -> str:
    """The text of the configuration file. It holds secrets."""
    lines = [
        f"server_name: {_quoted(name)}",
        f"listen: {_quoted(_place(host, port))}",
        f'http: "127.0.0.1:{monitor_port}"',
        f"pid_file: {_quoted(directory / 'server.pid')}",
        f"log_file: {_quoted(directory / 'server.log')}",
        f"logfile_size_limit: {_LOG_BYTES_MAX}",
        "logfile_max_num: 3",
        'ping_interval: "20s"',
        f"max_payload: {_PAYLOAD_BYTES_MAX}",
        "jetstream {",
        f"  store_dir: {_quoted(directory / 'js')}",
        "  sync_interval: always",
        f"  max_mem: {_MEMORY_BYTES_MAX}",
        f"  max_file: {disk_bytes}",
        "}",
        "accounts {",
        f'  CTRL {{ jetstream: enabled, users: [{{ user: "virgo", password: {_quoted(password)} }}] }}',
        f'  SYS {{ users: [{{ user: "system", password: {_quoted(system_password)} }}] }}',
        "}",
        "system_account: SYS",
    ]
    if tls is not None:
        lines += _tls_lines(tls, "")
    if cluster is not None:
        lines += _cluster_lines(cluster)
    return "\n".join(lines) + "\n"


def _cluster_lines(cluster: Cluster) -> list[str]:
    login = f"virgo:{cluster.secret}@" if cluster.secret else ""
    routes = ", ".join(_quoted(f"nats-route://{login}{route}") for route in cluster.routes)
    lines = [
        "cluster {",
        f"  name: {_quoted(cluster.name)}",
        f"  listen: {_quoted(_place(cluster.host, cluster.port))}",
        f"  routes: [{routes}]",
        "  connect_retries: 120",
    ]
    if cluster.secret:
        lines.append(f'  authorization {{ user: "virgo", password: {_quoted(cluster.secret)}, timeout: 5 }}')
    if cluster.tls is not None:
        lines += _tls_lines(cluster.tls, "  ")
    return [*lines, "}"]


def _tls_lines(tls: ServerTls, indent: str) -> list[str]:
    return [
        f"{indent}tls {{",
        f"{indent}  cert_file: {_quoted(tls.certificate)}",
        f"{indent}  key_file: {_quoted(tls.key)}",
        f"{indent}  ca_file: {_quoted(tls.authority)}",
        f"{indent}  verify: {'true' if tls.verify else 'false'}",
        f'{indent}  min_version: "1.3"',
        f"{indent}  timeout: 5",
        f"{indent}}}",
    ]


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _quoted(value: object) -> str:
    text = str(value)
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
