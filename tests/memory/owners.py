"""Owners of a store, each in a process of its own that does what a test says, as a node would."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from virgo.memory.mapped import Mapped
from virgo.memory.maps import open_mapped

# A store in a process of its own that does what its standard input says, as a node would.
OWNER = """
import itertools, pathlib, sys, time
from virgo.memory import keyspace
from virgo.memory.keyspace import Entry
from virgo.memory.store import Store
store = Store(pathlib.Path(sys.argv[1]), capacity_bytes=1 << 26)
print(store.identity, store.map_bytes, flush=True)
for line in sys.stdin:
    words = line.split()
    if words[0] == "set":
        with store.batching() as batch:
            entry = Entry(words[2].encode(), int(words[3]) if len(words) > 3 else 0)
            batch.put_entry(keyspace.stored_key(words[1].encode()), entry)
            batch.put_data(7, words[2].encode())
    if words[0] == "churn":
        end = time.monotonic() + float(words[1])
        number = 0
        while time.monotonic() < end:
            number += 1
            value = (b"%09d" % number) * (1 + number * 7919 % 3000)
            with store.batching() as batch:
                batch.put_plain(keyspace.stored_key(b"torn"), value)
                batch.put_data(7, value)
    if words[0] == "count":
        for number in itertools.count(int(words[1])):
            value = b"%d" % number
            with store.batching() as batch:
                batch.put_plain(keyspace.stored_key(b"owner"), value)
                batch.put_plain(keyspace.stored_key(b"owner:large"), value + bytes(number * 37 % 20000))
                batch.put_data(7, value)
            print(number, flush=True)
    if words[0] == "close":
        store.close()
    print("done", flush=True)
"""


class Owner:
    """The process, and what is needed to map its store."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        identity, map_bytes = self._line().split()
        self.identity, self.map_bytes = identity, int(map_bytes)

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def start(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def do(self, *words: object) -> None:
        self.start(*words)
        assert self._line() == "done\n"

    def map(self) -> Mapped:
        return open_mapped(str(self.directory), self.identity, self.map_bytes)

    def count(self, first: int, time_s: float) -> int:
        """Have it set what it counts from there on, kill -9 it after a while; the last it acknowledged."""
        assert self.process.stdout is not None
        self.start("count", first)
        lines = [self._line()]
        time.sleep(time_s)
        self.process.kill()
        lines += self.process.stdout.readlines()
        return int(next(line for line in reversed(lines) if line.endswith("\n")))

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
