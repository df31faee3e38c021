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

from typing import TYPE_CHECKING, Any

from virgo._version import __version__ as __version__
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

if TYPE_CHECKING:
    from virgo import aio as aio


def __getattr__(name: str) -> Any:
    """`virgo.aio` is imported on first use: asyncio takes longer to load than all the rest."""
    if name == "aio":
        import importlib

        return importlib.import_module("virgo.aio")
    raise AttributeError(f"module 'virgo' has no attribute {name!r}")


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
