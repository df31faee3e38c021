"""VIRGO: many Linux machines, one computer.

    import virgo

    cloud = virgo.connect()                   # the local node, or an embedded one
    cloud.cpu.submit(pow, 2, 10).result()     # on the least loaded node
    region = cloud.memory.malloc(100)         # somewhere in the cloud
    cloud.memory[b"key"] = b"value"
    with cloud.files.open("/n2/notes.txt", "w") as file:
        file.write("on node n2")

The layout, ground floor first: `errors limits clock context config members home module`, `wire`,
`engine`, `kernel`; then the modules `cpu`, `memory`, `files`; then `node`; on top `cli`. A package
imports only from the floors below it. ARCHITECTURE.md follows one call through them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from virgo._version import __version__ as __version__
from virgo.wire import near

if TYPE_CHECKING:
    from virgo import aio as aio
    from virgo.cloud import Cloud as Cloud
    from virgo.cloud import connect as connect
    from virgo.cpu.exports import export as export
    from virgo.errors import VirgoError as VirgoError
    from virgo.syscalls import virgo_clone as virgo_clone
    from virgo.syscalls import virgo_close as virgo_close
    from virgo.syscalls import virgo_free as virgo_free
    from virgo.syscalls import virgo_get as virgo_get
    from virgo.syscalls import virgo_malloc as virgo_malloc
    from virgo.syscalls import virgo_open as virgo_open
    from virgo.syscalls import virgo_read as virgo_read
    from virgo.syscalls import virgo_set as virgo_set
    from virgo.syscalls import virgo_write as virgo_write
    from virgo.wire.call import Runner

__all__ = [
    "Cloud",
    "VirgoError",
    "__version__",
    "aio",
    "connect",
    "export",
    "virgo_clone",
    "virgo_close",
    "virgo_free",
    "virgo_get",
    "virgo_malloc",
    "virgo_open",
    "virgo_read",
    "virgo_set",
    "virgo_write",
]

_HOMES = {
    "Cloud": "virgo.cloud",
    "VirgoError": "virgo.errors",
    "connect": "virgo.cloud",
    "export": "virgo.cpu.exports",
}


def __getattr__(name: str) -> Any:
    """Names are imported on first use: the command line is up at once, and asyncio is left alone."""
    if name == "aio":
        found: Any = importlib.import_module("virgo.aio")
    elif name in __all__:
        found = getattr(importlib.import_module(_HOMES.get(name, "virgo.syscalls")), name)
    else:
        raise AttributeError(f"module 'virgo' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _connection() -> "Runner":
    from virgo.syscalls import cloud

    return cloud().client


near.provide(_connection)
