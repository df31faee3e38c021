"""What the benchmarks of memory count: bytes held, values alive, calls of several clients at once."""

from __future__ import annotations

import itertools
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import keepers
from benchmarks.apart import run_apart
from benchmarks.entries import ENTRIES
from benchmarks.held import held_bytes, with_descendants
from benchmarks.memory_clients import SETS_EVERY, call_of
from benchmarks.memory_room import Live

MiB = 1024**2


def values_of(kept: dict[str, bytes]) -> keepers.Values:
    """A client of a dictionary."""
    return keepers.Values(
        get=kept.get,
        set=kept.__setitem__,
        get_many=lambda keys: [kept.get(key) for key in keys],
        set_many=kept.update,
        delete=kept.__delitem__,
        delete_many=lambda keys: [kept.pop(key) for key in keys],
    )


def test_held_bytes_are_those_a_process_has_touched() -> None:
    """Memory counts once it is used, and no longer once it is given back."""
    before = held_bytes([os.getpid()])
    area = mmap.mmap(-1, 32 * MiB)
    reserved = held_bytes([os.getpid()])
    area.write(bytes(32 * MiB))
    used = held_bytes([os.getpid()])
    area.close()
    after = held_bytes([os.getpid()])
    assert reserved - before < 4 * MiB
    assert 28 * MiB < used - reserved < 40 * MiB
    assert after - before < 4 * MiB


def test_a_store_counts_by_its_files_and_once(tmp_path: Path) -> None:
    """All blocks of the files count, mapped or not; the map of a file does not count again."""
    file = tmp_path / "below" / "data"
    file.parent.mkdir()
    before = held_bytes([os.getpid()], tmp_path)
    file.write_bytes(os.urandom(16 * MiB))
    with file.open("r+b") as stream:
        os.fsync(stream.fileno())  # until then its blocks may not have been given out
        written = held_bytes([os.getpid()], tmp_path)
        with mmap.mmap(stream.fileno(), 0) as area:
            assert sum(area[::4096]) > 0
            mapped = held_bytes([os.getpid()], tmp_path)
    assert 15 * MiB < written - before < 20 * MiB
    assert abs(mapped - written) < 4 * MiB


def test_descendants_are_found() -> None:
    """Children of children belong to a server too."""
    command = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        try:
            assert with_descendants(child.pid) == [child.pid, grandchild]
            assert {child.pid, grandchild} < set(with_descendants(os.getpid()))
        finally:
            os.kill(grandchild, 9)
            child.kill()


def test_cycles_are_the_same_for_all_and_keep_as_many_alive() -> None:
    """Each contender deletes and sets the same keys; what is alive is what was not deleted, byte for byte."""
    histories = []
    for _ in range(2):
        live, kept, history = Live(100), {}, []
        values = values_of(kept)
        values.set_many(live.new(100))
        for _ in range(10):
            old = live.old(30)
            values.delete_many(old)
            values.set_many(live.new(30))
            history.append(old)
        assert len(kept) == 100
        assert live.live_bytes() == sum(len(key) + len(value) for key, value in kept.items())
        live.check(values, "a dictionary")
        histories.append(history)
    assert histories[0] == histories[1]


def test_a_wrong_value_after_the_cycles_is_an_error() -> None:
    """A contender that lost or changed one is not measured further."""
    live, kept = Live(10), {}
    kept.update(live.new(10))
    kept["live:3"] = b"another"
    with pytest.raises(RuntimeError, match="live:3"):
        live.check(values_of(kept), "a dictionary")


@pytest.mark.parametrize(("operation", "sets"), [("get", 0), ("set", 100), ("90/10", 10)])
def test_operations_of_a_crowd(operation: str, sets: int) -> None:
    """Of a hundred calls so many are sets; all keys have their turn."""
    done: list[tuple[str, str]] = []
    noting = replace(
        values_of({}),
        get=lambda key: done.append(("get", key)),
        set=lambda key, value: done.append(("set", key)),
    )
    call = call_of(noting, SETS_EVERY[operation], itertools.cycle("abcde").__next__, b"")
    for _ in range(100):
        call()
    assert len(done) == 100 and sum(kind == "set" for kind, _ in done) == sets
    assert {key for _, key in done} == set("abcde")


@pytest.mark.parametrize("name", ["memory_sizes", "memory_clients", "memory_room", "memory_restart"])
def test_our_side_of_the_memory_entries_runs(name: str) -> None:
    """A change of ours that breaks a benchmark is seen here, where no peer is installed."""
    entry = ENTRIES[name]
    ours = entry.contenders(True)[0]
    figures = run_apart(entry, ours, quick=True)
    wanted = {
        one for comparison in entry.comparisons if comparison.ours == ours.name for one in comparison.measures
    }
    assert wanted <= figures.keys()
    assert all(figures[one] > 0 for one in wanted)
