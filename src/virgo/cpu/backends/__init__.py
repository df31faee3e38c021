"""Calls on a Ray or Dask cluster that the user already has: `cpu.backend`.

    base       has calls run by an engine, whichever it is: one thread of the client
    remote     runs a call where the engine has put it
    claims     which calls have begun, and which never may
    on_dask    Dask: a scheduler, with a plugin of ours that holds the claims
    on_ray     Ray, whose key-value store holds them

Only callables go there; what is called by name only VIRGO's nodes know. An engine's own package is imported
with the first call. VIRGO must be installed where the engine's workers are, and for Dask its scheduler.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Final

from virgo.config import CpuConfig
from virgo.errors import BadConfig

if TYPE_CHECKING:
    from virgo.cpu.backends.base import Backend, Engine
    from virgo.cpu.calls import Book

# What is imported for each, and what it is called.
_ENGINES: Final = {"dask": ("distributed", "Dask"), "ray": ("ray", "Ray")}


def backend_of(config: CpuConfig, book: Book) -> Backend | None:
    """What runs the callables of a client, None for VIRGO's own workers; no connection is made yet.

    Args:
        config: its configuration.
        book: its calls.

    Raises:
        BadConfig: the engine is not installed here.
    """
    name = config.backend.lower()
    if not name:
        return None
    package, title = _ENGINES[name]
    if importlib.util.find_spec(package) is None:
        raise BadConfig(
            f"cpu.backend is {config.backend}, but {title} is not installed here",
            hint=f"pip install 'virgo-os[{name}]', here and where {title}'s workers are.",
        )
    from virgo.cpu.backends.base import Backend

    engine: Engine
    if name == "ray":
        from virgo.cpu.backends.on_ray import RayEngine

        engine = RayEngine(config.backend_address)
    else:
        from virgo.cpu.backends.on_dask import DaskEngine

        engine = DaskEngine(config.backend_address)
    return Backend(engine, book)
