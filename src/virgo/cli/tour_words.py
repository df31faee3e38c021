"""The tour's real input and work: the words in the Python standard library's own sources.

The work travels to the nodes by value: `word_counter` makes a function that needs nothing of this
package, and each call carries the text that it is to count.
"""

from __future__ import annotations

import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# What one call gets to count: enough to be worth a call, and small enough to spread well.
_BATCH_BYTES: Final = 384 * 1024
# Below the library's directory, but installed by others.
_FOREIGN: Final = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, slots=True)
class Library:
    """The sources, read once.

    Attributes:
        directory: where they are.
        files: how many.
        size_bytes: all of them together.
        batches: their texts, in pieces of about equal size.
    """

    directory: Path
    files: int
    size_bytes: int
    batches: Sequence[Sequence[bytes]]


def word_counter() -> Callable[[Sequence[bytes]], tuple[str, dict[bytes, int]]]:
    """The function to ship: texts to the name of the node that counted, and each word's count."""

    def count(texts: Sequence[bytes]) -> tuple[str, dict[bytes, int]]:
        import collections
        import os
        import re

        found: collections.Counter[bytes] = collections.Counter()
        for text in texts:
            found.update(re.findall(rb"[A-Za-z_][A-Za-z0-9_]*", text))
        return os.environ.get("VIRGO_NODE", ""), dict(found)

    return count


def read_library() -> Library:
    """Read all sources. Files that cannot be read are none of ours and left out."""
    directory = Path(sysconfig.get_paths()["stdlib"])
    texts: list[bytes] = []
    for path in sorted(directory.rglob("*.py")):
        if not _FOREIGN.intersection(path.relative_to(directory).parts):
            try:
                texts.append(path.read_bytes())
            except OSError:
                continue
    batches: list[list[bytes]] = []
    room = 0
    for text in texts:
        if room < len(text) or not batches:
            batches.append([])
            room = _BATCH_BYTES
        batches[-1].append(text)
        room -= len(text)
    return Library(directory, len(texts), sum(map(len, texts)), batches)


def merged(counts: Sequence[dict[bytes, int]]) -> Counter[bytes]:
    """All counts in one."""
    total: Counter[bytes] = Counter()
    for each in counts:
        total.update(each)
    return total
