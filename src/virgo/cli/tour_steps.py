"""The first steps of the tour: counting words over the nodes, sharing memory, sharing files."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from virgo.cli.tour_show import Share, Show
from virgo.cli.tour_words import Library, merged, read_library, word_counter
from virgo.cloud import Cloud
from virgo.errors import UnknownId
from virgo.limits import MiB
from virgo.members import node_of

_LARGE_BYTES: Final = 64 * MiB
_NOTE: Final = "written on one node, read on another\n"


@dataclass(slots=True)
class Tour:
    """What the steps share.

    Attributes:
        home: VIRGO_HOME of the tour's cloud.
        show: the display.
        clouds: a connection through each node, by its name.
        library: the texts to count, read by the first step.
        words: how often each word occurs in them, counted by this process alone.
    """

    home: Path
    show: Show
    clouds: Mapping[str, Cloud]
    library: Library = field(init=False)
    words: Counter[bytes] = field(default_factory=Counter)


# --- processors -----------------------------------------------------------------------------


def count_words(tour: Tour) -> dict[str, Any]:
    """Count the words of the library on all nodes, and check the result against a count made here."""
    show, cloud = tour.show, tour.clouds["n1"]
    with show.step("Processors: the words of Python's standard library"):
        count = word_counter()
        with show.progress("reading, and counting in this process"):
            library = tour.library = read_library()
            started = time.perf_counter()
            tour.words = merged([count(batch)[1] for batch in library.batches])
            here_s = time.perf_counter() - started
        started = time.perf_counter()
        futures = [cloud.cpu.submit(count, batch) for batch in library.batches]
        with show.progress("counting on three nodes", len(futures)) as done:
            for finished, _ in enumerate(as_completed(futures), 1):
                done(finished)
        results = [future.result() for future in futures]
        cloud_s = time.perf_counter() - started
        found = merged([counts for _, counts in results])
        shares = Counter(node for node, _ in results)
        show.say(
            f"{library.files:,} files with {library.size_bytes / 1e6:.1f} MB, in {len(futures)} calls"
            " that carry the function and the text:"
        )
        show.table(
            ("node", "calls", "share"),
            [(node, calls, Share(calls / len(futures))) for node, calls in sorted(shares.items())],
        )
        top = found.most_common(6)
        show.say("most frequent: " + ", ".join(f"{word.decode()} {times:,}" for word, times in top))
        show.check(
            f"every node took part: {', '.join(sorted(shares))}",
            set(shares) == set(tour.clouds),
            otherwise=f"only {sorted(shares)} did",
        )
        show.check(
            f"{found.total():,} words, {len(found):,} different: the same as counted in this process",
            found == tour.words,
            otherwise=f"here it is {tour.words.total():,}",
        )
        show.say(
            f"{cloud_s:.2f} s on three nodes with {os.cpu_count()} processors between them,"
            f" {here_s:.2f} s in one process",
            style="dim",
        )
    return {
        "files": library.files,
        "bytes": library.size_bytes,
        "calls": len(futures),
        "calls_by_node": dict(sorted(shares.items())),
        "words": found.total(),
        "different_words": len(found),
        "top": [[word.decode(), times] for word, times in top],
        "cloud_s": round(cloud_s, 3),
        "one_process_s": round(here_s, 3),
    }


# --- memory ---------------------------------------------------------------------------------


def share_memory(tour: Tour) -> dict[str, Any]:
    """A small region on another node through all its life, and a large one over all nodes."""
    with tour.show.step("Memory: a region on another node, and one over all nodes"):
        return {"small": _small_region(tour), "large": _large_region(tour)}


def _small_region(tour: Tour) -> dict[str, Any]:
    show = tour.show
    first, third = (tour.clouds[name].client for name in ("n1", "n3"))
    data = os.urandom(1000)
    identifier = int(first.execute("VIRGO_MALLOC", len(data), "NODE", "n2"))
    numbers = {member.name: member.number for member in tour.clouds["n1"].nodes}
    show.check(
        f"allocated by n1 on n2: id {identifier:#x}, whose top bits say {node_of(identifier)}",
        node_of(identifier) == numbers["n2"],
        otherwise=f"n2 is number {numbers['n2']}",
    )
    first.execute("VIRGO_SET", identifier, data)
    times = []
    for client in (first, third):
        started = time.perf_counter()
        got = client.execute("VIRGO_GET", identifier)
        times.append(time.perf_counter() - started)
        show.check(
            f"set by n1, read through {'n1' if client is first else 'n3'}: {len(got)} bytes, the same"
            f" ({times[-1] * 1e3:.1f} ms)",
            got == data,
            otherwise=f"got {got[:20]!r}...",
        )
    third.execute("VIRGO_FREE", identifier)
    try:
        answer = str(first.execute("VIRGO_GET", identifier))
    except UnknownId as error:
        answer = error.code
    show.check(
        "freed by n3; a use after that is the error NOID, for ever",
        answer == "NOID",
        otherwise=f"got {answer}",
    )
    return {"bytes": len(data), "get_ms": [round(seconds * 1e3, 3) for seconds in times]}


def _large_region(tour: Tour) -> dict[str, Any]:
    show = tour.show
    first, third = (tour.clouds[name].client for name in ("n1", "n3"))
    data = os.urandom(_LARGE_BYTES)
    before = _rooms(tour)
    identifier = int(first.execute("VIRGO_MALLOC", len(data)))
    taken = {name: before[name] - room for name, room in _rooms(tour).items()}
    with show.progress("64 MiB over three nodes"):
        started = time.perf_counter()
        first.execute("VIRGO_SET", identifier, data)
        set_s = time.perf_counter() - started
        started = time.perf_counter()
        got = third.execute("VIRGO_GET", identifier)
        get_s = time.perf_counter() - started
    digest = hashlib.sha256(got).hexdigest()
    show.check(
        f"64 MiB spread over the nodes: {', '.join(f'{name} {_mib(size)}' for name, size in taken.items())}",
        sum(size >= 4 * MiB for size in taken.values()) == len(taken),
        otherwise="one of them holds nothing of it",
    )
    show.check(
        f"read whole through n3, sha256 {digest[:12]}... as it was set"
        f" (set {_rate(set_s)}, get {_rate(get_s)})",
        digest == hashlib.sha256(data).hexdigest(),
    )
    third.execute("VIRGO_FREE", identifier)
    return {
        "bytes": len(data),
        "bytes_by_node": taken,
        "set_s": round(set_s, 3),
        "get_s": round(get_s, 3),
        "sha256": digest,
    }


def _rooms(tour: Tour) -> dict[str, int]:
    """Free bytes of each node's pool, now."""
    return {name: int(cloud.client.execute("MEMORY.ROOM")) for name, cloud in tour.clouds.items()}


def _mib(size: int) -> str:
    return f"{size / MiB:.0f} MiB"


def _rate(seconds: float) -> str:
    return f"{_LARGE_BYTES / MiB / seconds:,.0f} MiB/s"


# --- files ----------------------------------------------------------------------------------


def share_files(tour: Tour) -> dict[str, Any]:
    """Write on one node, read on another; and a descriptor that is good on every node."""
    show = tour.show
    with show.step("Files: written on one node, read on another"):
        first, third = tour.clouds["n1"], tour.clouds["n3"]
        with first.files.open("/n2/tour/note.txt", "w") as file:
            file.write(_NOTE)
        with third.files.open("/n2/tour/note.txt") as file:
            text = file.read()
        show.check("/n2/tour/note.txt, written through n1, reads the same through n3", text == _NOTE)
        data = b"".join(tour.library.batches[0])
        started = time.perf_counter()
        first.files.write_bytes("/n2/tour/sources.py", data)
        got = third.files.read_bytes("/n2/tour/sources.py")
        seconds = time.perf_counter() - started
        show.check(
            f"/n2/tour/sources.py too: {len(data):,} bytes there and back in {seconds * 1e3:.0f} ms",
            got == data,
        )
        descriptor = int(first.client.execute("VIRGO_OPEN", "/n2/tour/note.txt", "r"))
        piece = third.client.execute("VIRGO_READ", descriptor, 7, 0)
        third.client.execute("VIRGO_CLOSE", descriptor)
        show.check(f"opened by n1 as {descriptor}, read and closed by n3", piece == _NOTE[:7].encode())
    return {"bytes": len(data), "there_and_back_s": round(seconds, 3)}
