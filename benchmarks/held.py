"""How much memory servers hold: counted alike for all.

What is counted: for each process its share of the pages it has mapped (the kernel's Pss, in which a page of
several processes counts once), and for a store that lies in files all blocks of these, whether or not they
are in memory just now; a process's maps of these files are not counted again. What is not: the client that
measures, and buffers of sockets in the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's are


def held_bytes(pids: Iterable[int], store: Path | None = None) -> int:
    """Bytes held by processes, and by the files below the directory `store`."""
    return sum(_share_bytes(pid, store) for pid in pids) + (_files_bytes(store) if store else 0)


def private_bytes(pid: int) -> int:
    """Bytes of the pages that a process alone has mapped (Uss): what its end would free."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def _share_bytes(pid: int, without: Path | None) -> int:
    """A process's share of memory, apart from its maps of files below `without`."""
    total, counts = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split(None, 5)
        if not words[0].endswith(":"):  # the head of a mapping: range, rights, offset, device, inode, path
            path = words[5] if len(words) > 5 else ""
            counts = without is None or not path.startswith(f"{without}/")
        elif counts and words[0] == "Pss:":
            total += int(words[1]) * 1024
    return total


def _files_bytes(directory: Path) -> int:
    return sum(path.lstat().st_blocks * _BLOCK_BYTES for path in directory.rglob("*") if path.is_file())


def with_descendants(pid: int) -> list[int]:
    """A process and all that descend from it, as of now."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found
