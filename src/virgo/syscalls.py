"""The nine calls in the shape of the reference system's system calls.

They use one connection a process, made on the first call as `virgo.connect()` makes it; after a fork the
child makes its own. For more than a script prefer `virgo.connect()`, whose lifetime you see.

| call | result |
| --- | --- |
| `virgo_clone(function_or_name, *args)` | the function's result, from the least loaded node |
| `virgo_malloc(size)` | a 64-bit id, unique in the cloud |
| `virgo_set(id, data)` | None |
| `virgo_get(id)` | bytes |
| `virgo_free(id)` | None |
| `virgo_open(path, mode=None)` | a descriptor, valid on every node |
| `virgo_read(fd, size, pos)` | bytes, empty at the end |
| `virgo_write(fd, data, pos)` | the count of bytes written |
| `virgo_close(fd)` | None |

Every failure raises a `VirgoError` of its own class; an argument of a wrong type is BadArgument, and nothing
is sent.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from virgo.cloud import Cloud, connect

T = TypeVar("T")
_connected: tuple[int, Cloud] | None = None
_mutex = threading.Lock()


def cloud() -> Cloud:
    """This process's connection, made on first use."""
    global _connected  # noqa: PLW0603 - the C shape has no place to keep a connection
    with _mutex:
        if _connected is None or _connected[0] != os.getpid():
            _connected = (os.getpid(), connect())
        return _connected[1]


def close() -> None:
    """Close this process's connection, if there is one; the next call makes a new one."""
    global _connected  # noqa: PLW0603 - see `cloud`
    with _mutex:
        if _connected is not None and _connected[0] == os.getpid():
            _connected[1].close()
        _connected = None


def virgo_clone(function: Callable[..., T] | str, *args: Any) -> Any:
    """Run an exported function or allowed program by name, or any callable, on the least loaded node."""
    return cloud().cpu.clone(function, *args)


def virgo_malloc(size: int) -> int:
    """Allocate `size` bytes somewhere in the cloud; returns the id."""
    return cloud().memory.malloc(size).id


def virgo_set(identifier: int, data: bytes) -> None:
    """Replace the content of an allocation; readers see the old or the new whole."""
    cloud().memory.set_region(identifier, data)


def virgo_get(identifier: int) -> bytes:
    """The content of an allocation; empty before the first set."""
    return cloud().memory.get_region(identifier)


def virgo_free(identifier: int) -> None:
    """End an allocation; its id is never given again."""
    cloud().memory.free_region(identifier)


def virgo_open(path: str | os.PathLike[str], mode: str | None = None) -> int:
    """Open `/NODE/...` or a placed path; mode as in Python's `open`, without it read-write, created."""
    return cloud().files.open_descriptor(path, mode)


def virgo_read(descriptor: int, size: int, position: int) -> bytes:
    """At most `size` bytes from `position`; empty at the end."""
    return cloud().files.read(descriptor, size, position)


def virgo_write(descriptor: int, data: bytes, position: int) -> int:
    """Write at `position`; returns the count of bytes written."""
    return cloud().files.write(descriptor, data, position)


def virgo_close(descriptor: int) -> None:
    """Close a descriptor."""
    cloud().files.close(descriptor)
