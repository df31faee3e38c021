"""TLS of a node's ports and of its calls to other machines, as the configuration asks.

A bind beyond loopback without certificates is refused at start.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from virgo.config import Config
from virgo.errors import BadConfig
from virgo.wire import tls
from virgo.wire.address import Address


def exposed(config: Config) -> bool:
    """Whether the ports can be reached from other machines."""
    return bool(config.node.bind) and not Address(host=config.node.bind).loopback


def server_tls(config: Config, host: str = "") -> ssl.SSLContext | None:
    """The context of the ports; None on loopback, where plain TCP with a token is served.

    Args:
        config: the configuration.
        host: of a port that does not listen at `node.bind`.

    Raises:
        BadConfig: the bind is beyond loopback and there are no certificates.
    """
    host = host or config.node.bind
    if not host or Address(host=host).loopback:
        return None
    try:
        return tls.server_context(config.home, config.security)
    except BadConfig as error:
        raise BadConfig(
            f"binding {host} exposes this node to others, and TLS is not ready: {error.message}",
            hint="`virgo ca init` and `virgo ca issue NAME --node` make certificates; or bind 127.0.0.1.",
        ) from error


def client_tls(config: Config) -> ssl.SSLContext | None:
    """The context for calls to other machines; None if this node has no certificates."""
    if not (Path(config.security.authority or config.home / "tls" / "ca.crt")).exists():
        return None
    return tls.client_context(config.home, config.security)


def advertised(config: Config) -> str:
    """The host under which other machines reach the ports; the host's name if they listen everywhere."""
    everywhere = config.node.bind in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
    return config.node.advertise or (socket.gethostname() if everywhere else config.node.bind)
