"""What a node says of itself to the others: who it is, where it is, how busy it is."""

from __future__ import annotations

import msgspec

from virgo.errors import BadArgument
from virgo.limits import PORT_OFFSET_MAX

PORTS = {
    "cpu": 10_000,
    "events": 20_000,
    "memory": 30_000,
    "files": 50_000,
    "queue": 60_000,
    "analytics": 64_000,
}


def check_port_offset(offset: int, nodes: int) -> None:
    """Raise BadArgument if one of so many nodes of a machine would have a port that does not exist."""
    high = PORT_OFFSET_MAX - (nodes - 1)
    if not 0 <= offset <= high:
        raise BadArgument(
            f"node.port_offset (--port-offset) is {offset}, but must be 0 to {high} for {nodes} nodes",
            hint=f"Each node takes the next port, and the last one is 65535: {max(PORTS.values())} + offset"
            f" + {nodes - 1} must not be more.",
        )


class Load(msgspec.Struct, frozen=True):
    """One measurement of a node. Figures are of the machine; those below `pool_free_bytes` the node's own."""

    cpus: int = 1
    cpu_pressure_percent: float = 0.0  # PSI `cpu some`, average of 10 s
    memory_pressure_percent: float = 0.0  # PSI `memory some`
    io_pressure_percent: float = 0.0  # PSI `io some`
    run_queue: float = 0.0  # runnable tasks, average of 1 min
    memory_free_bytes: int = 0
    memory_total_bytes: int = 0
    disk_free_bytes: int = 0
    pool_free_bytes: int = 0  # room in the node's part of the memory pool
    gpus: int = 0  # of this node
    gpus_free: int = 0
    calls_memory_bytes: int = 0  # what calls of this node may ask for
    calls_memory_free_bytes: int = 0  # of it, what none has asked for, and is there
    outstanding: int = 0  # places of calls running or waiting on this node
    workers: int = 0  # calls that this node runs at once


class Member(msgspec.Struct, frozen=True):
    """One node of the cloud.

    Attributes:
        name: unique in the cloud, `n1` for example.
        number: 1 to 32,767, in the top bits of every id that the node gives; never reused.
        id: unique id of the node's state directory.
        machine: id of the booted machine; equal for nodes that can reach each other's Unix sockets.
        socket: path of its Unix socket.
        address: `HOST` at which its ports listen, "" if it has none.
        tls: whether its ports speak TLS.
        ports: port by module name.
        state: `starting` until its modules are up, `up`, `leaving`, or `lost` (said by the others, after
            its lease ran out).
    """

    name: str
    number: int
    id: str
    machine: str = ""
    socket: str = ""
    address: str = ""
    tls: bool = False
    ports: dict[str, int] = {}
    pid: int = 0
    started_ms: int = 0
    version: str = ""
    state: str = "up"
    modules: dict[str, str] = {}
    load: Load = Load()


SERIAL_BITS = 48


def compose_id(number: int, serial: int) -> int:
    """A cloud-unique 64-bit id (positive as a signed integer): 15 bits of node, 48 bits of serial."""
    assert 0 < number < 1 << 15 and 0 < serial < 1 << SERIAL_BITS
    return number << SERIAL_BITS | serial


def node_of(identifier: int) -> int:
    """The number of the node that gave an id; 0 or above 32,767 for what is no id."""
    return identifier >> SERIAL_BITS if identifier > 0 else 0
