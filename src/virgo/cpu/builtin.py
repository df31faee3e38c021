"""Functions that every node exports, so that a fresh cloud has something to call."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from virgo.cpu.exports import export


@export
def echo(*values: Any) -> Any:
    """The arguments themselves: one as it is, several as a list."""
    return values[0] if len(values) == 1 else list(values)


@export
def add(first: Any, second: Any) -> Any:
    """The sum of two numbers."""
    return first + second


@export(name="sum")
def total(*numbers: Any) -> Any:
    """The sum of the arguments, or of the numbers in one list."""
    if len(numbers) == 1 and isinstance(numbers[0], list):
        return sum(numbers[0])
    return sum(numbers)


@export
def hostname() -> str:
    """The host name of the machine where it ran."""
    return socket.gethostname()


@export
def pid() -> int:
    """The process id of the worker where it ran."""
    return os.getpid()


@export
def node() -> str:
    """The name of the node where it ran."""
    return os.environ.get("VIRGO_NODE", "")


@export
def sleep(seconds: float) -> float:
    """Wait so long, then the number of seconds."""
    time.sleep(seconds)
    return seconds


@export
def wordcount(text: str) -> dict[str, int]:
    """How often each word occurs in the text."""
    counts: dict[str, int] = {}
    for found in text.split():
        counts[found] = counts.get(found, 0) + 1
    return counts


@export
def virgo_cloud_test(*values: Any) -> str:
    """The reference system's test target: says that it ran, and where."""
    shown = " ".join(str(value) for value in values)
    return f"virgo_cloud_test({shown}) executed on node {node() or '?'} by process {os.getpid()}"
