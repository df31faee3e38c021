"""Where a node speaks memcached's protocol, and who may come; pure.

A Unix socket knows its peers. TCP on the machine asks for a login, as memcached does with an auth file,
unless the configuration says by `memcached_roles` what everybody on this machine may do. Other machines
come by TLS, and show a certificate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from virgo.config import Config
from virgo.context import NOBODY, Identity
from virgo.errors import BadArgument, BadConfig
from virgo.memory.memcached.reader import MemcachedReader
from virgo.memory.memcached.replies import error_line
from virgo.wire.address import Address, parse
from virgo.wire.speech import Speech

PORT = 11211
PLACE = "memcached"  # where the listener's commands are served, and nowhere else
_ROLES = frozenset({"read", "write", "admin"})


@dataclass(frozen=True, slots=True)
class Place:
    """One listening place.

    Attributes:
        address: where; of a node that does not listen it is empty.
        item_bytes_max: the largest item that is taken.
        stranger: who comes by plain TCP and has not logged in.
    """

    address: Address
    item_bytes_max: int
    stranger: Identity = NOBODY

    @property
    def open(self) -> bool:
        """Whether the node listens at all."""
        return bool(self.address.path or self.address.host)

    def speech(self) -> Speech:
        """How requests are read there."""
        return Speech(partial(MemcachedReader, item_bytes_max=self.item_bytes_max), error_line)


def place(config: Config, name: str, index: int) -> Place:
    """The place that the configuration gives to a node.

    Args:
        config: the configuration.
        name: the node's name.
        index: its place among the nodes of this machine, 1 for the first: each takes the next port.

    Raises:
        BadConfig: the place is none, or not safe.
    """
    memory = config.memory
    if not memory.memcached:
        return Place(Address(), memory.memcached_item_bytes)
    try:
        found = parse(memory.memcached, default_port=PORT)
    except BadArgument as error:
        raise BadConfig(
            f"memory.memcached: {error.message}", hint="Write HOST:PORT or unix:/path/{node}.sock."
        ) from None
    wrong = sorted(set(memory.memcached_roles) - _ROLES)
    if wrong:
        raise BadConfig(
            f"memory.memcached_roles: {wrong[0]!r} cannot be had without a login",
            hint="Give read and write; admin is for cache_memlimit alone.",
        )
    if found.path and index > 1 and "{node}" not in found.path:
        raise BadConfig(
            f"memory.memcached: several nodes would listen at {found.path}",
            hint="Write {node} into the path; it is replaced by each node's name.",
        )
    if found.path:
        return Place(Address(path=found.path.replace("{node}", name)), memory.memcached_item_bytes)
    port = found.port + config.node.port_offset + index - 1
    if not 0 < port <= 65535:
        raise BadConfig(
            f"memory.memcached: port {port} does not exist",
            hint="node.port_offset, and one for each further node of the machine, are added to the port.",
        )
    if memory.memcached_roles and not Address(host=found.host).loopback:
        raise BadConfig(
            f"memory.memcached_roles would let all who reach {found.host} in without a login",
            hint="Leave it out: other machines come by TLS and show a certificate. Or listen on 127.0.0.1.",
        )
    roles = frozenset(memory.memcached_roles)
    stranger = Identity(name="memcached", roles=roles) if roles else NOBODY
    tls = not Address(host=found.host).loopback
    return Place(Address(host=found.host, port=port, tls=tls), memory.memcached_item_bytes, stranger)
