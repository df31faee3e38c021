"""Free ports for the embedded server, outside the range that Linux lends to outgoing connections."""

from __future__ import annotations

import random
import socket
from collections.abc import Collection
from typing import Final

from virgo.errors import PortTaken

# Below the kernel's usual range (32768 on), between the node's ports at 20000 and 30000.
_FIRST: Final = 21_000
_LAST: Final = 29_900
_TRIES: Final = 200


def is_free(host: str, port: int) -> bool:
    """Whether a listener could have the port now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the server does: a port whose last connections still linger is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def choose_port(host: str = "127.0.0.1", *, taken: Collection[int] = ()) -> int:
    """A free port, at random, so that several clouds on one machine rarely meet. Raises PortTaken."""
    for _ in range(_TRIES):
        port = random.randint(_FIRST, _LAST)  # noqa: S311 - no secret
        if port not in taken and is_free(host, port):
            return port
    raise PortTaken(f"no free port between {_FIRST} and {_LAST} on {host}", hint="Name one with engine.port.")
