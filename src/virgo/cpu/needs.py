"""What a call needs of the node that runs it: processors, GPUs, memory, as hard limits.

A node runs no more calls at once than it has of each (`core.Ledger` for processors, `stock` for the others),
and a call gets no more than it has asked for: its GPUs are the only ones that it sees, and beyond its memory
it gets a MemoryError.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from virgo.errors import BadArgument
from virgo.limits import CALL_GPUS_MAX, CALL_MEMORY_BYTES_MAX, CALL_MEMORY_BYTES_MIN, WORKERS_MAX

_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]?)(i?)b?", re.IGNORECASE)
_DECIMAL: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY: Final = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class Needs(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What one call needs.

    Attributes:
        cpus: places among the workers of its node.
        gpus: of its own.
        memory: bytes that it may hold more than an idle worker does, 0 for no limit but the node's.
    """

    cpus: int = 1
    gpus: int = 0
    memory: int = 0

    def __str__(self) -> str:
        words = [f"{self.cpus} processor{'s' if self.cpus > 1 else ''}"]
        words += [f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}"] if self.gpus else []
        words += [f"{self.memory} bytes of memory"] if self.memory else []
        return ", ".join(words)

    def check(self) -> None:
        """Raise BadArgument for what no node can have."""
        for name, value, low, high in (
            ("cpus", self.cpus, 1, WORKERS_MAX),
            ("gpus", self.gpus, 0, CALL_GPUS_MAX),
            ("memory", self.memory, CALL_MEMORY_BYTES_MIN if self.memory else 0, CALL_MEMORY_BYTES_MAX),
        ):
            if not low <= value <= high:
                raise BadArgument(f"{name} is {value}, but must be {low} to {high}", hint=_HINT)


PLAIN: Final = Needs()
_HINT: Final = "cpus and gpus are whole numbers, memory bytes or a size: memory='2 GiB'."


def needs_of(cpus: int, gpus: int, memory: int | str) -> Needs:
    """Needs as a user says them. Raises BadArgument."""
    if isinstance(memory, str):
        memory = size_of(memory)
    for name, value in (("cpus", cpus), ("gpus", gpus), ("memory", memory)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadArgument(f"{name} is {value!r}, which is no whole number", hint=_HINT)
    needs = Needs(cpus, gpus, memory)
    needs.check()
    return needs


def size_of(text: str) -> int:
    """Bytes from text: `512 MiB`, `2GB`, `1.5g`, `100000`. Raises BadArgument."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise BadArgument(
            f"{text!r} is no size", hint="Write bytes, or a unit behind the number: 512 MiB, 2 GB."
        )
    number, unit, binary = found.groups()
    return int(float(number) * (_BINARY if binary else _DECIMAL)[unit.lower()])


class Grant(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What a call has been given, for its worker; memory as in Needs, 0 for no limit."""

    cpus: int = 1
    gpus: list[int] = []
    memory: int = 0
