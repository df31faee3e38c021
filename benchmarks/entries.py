"""The entries by name. A new one is a file of its own with an `ENTRY`, and a line here."""

from __future__ import annotations

from benchmarks import (
    array,
    clone,
    cpu_arguments,
    cpu_calls,
    cpu_clients,
    cpu_first,
    cpu_idle,
    memory,
    memory_clients,
    memory_restart,
    memory_room,
    memory_sizes,
    wire,
)
from benchmarks.harness import Entry

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        wire.ENTRY,
        memory.ENTRY,
        memory_sizes.ENTRY,
        memory_clients.ENTRY,
        memory_room.ENTRY,
        memory_restart.ENTRY,
        clone.ENTRY,
        array.ENTRY,
        cpu_calls.ENTRY,
        cpu_clients.ENTRY,
        cpu_arguments.ENTRY,
        cpu_first.ENTRY,
        cpu_idle.ENTRY,
    )
}
