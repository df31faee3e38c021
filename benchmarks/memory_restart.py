"""Memory's restart: 1 GiB is held, the server is killed or stopped; how long until the first correct get.

The first get is one of a client that connects anew and tries again until it gets an answer. All values
are read afterwards, and one that is missing or wrong fails the contender: each promises that they survive.
"""

from __future__ import annotations

import random
import signal
import tempfile
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import keepers, servers
from benchmarks.harness import ROUNDS_MIN, Comparison, Contender, Entry, Figures, Hosted, Measure

CRASH = "kill -9 to the first correct get"
STOP, START = "orderly stop", "start after it to the first correct get"
_VALUE_BYTES = 16 * 1024
_HELD_BYTES, _HELD_BYTES_QUICK = 1024**3, 16 * 1024**2
_BATCH = 64
_WAIT_S = 120.0
_AGAIN_S = 0.001


class Holder(Hosted):
    """A server that holds values of 16 KiB, and its ends and beginnings."""

    def __init__(self, quick: bool) -> None:
        super().__init__(quick)
        self._count = (_HELD_BYTES_QUICK if quick else _HELD_BYTES) // _VALUE_BYTES
        self._blob = random.Random(1).randbytes(2 * _VALUE_BYTES)

    @abstractmethod
    def connect(self, running: ExitStack) -> keepers.Values:
        """A new client; an error if the server does not answer yet."""

    def crash(self) -> None:
        """Kill the server, and wait until it is dead; start it again unless something else does."""
        raise NotImplementedError(f"{self.name} does not survive that")

    @abstractmethod
    def end(self) -> None:
        """Stop the server in order, and wait until it has ended."""

    def rest(self) -> None:
        """Wait as long as has to be waited between the two."""

    @abstractmethod
    def begin(self) -> None:
        """Start it again."""

    def measure(self) -> Figures:
        with ExitStack() as running:
            values = self.connect(running)
            for batch in self._batches():
                values.set_many({self._key(number): self._value(number) for number in batch})
        self.settle()
        return self._measure_crash() | self._measure_stop()

    def settle(self) -> None:
        """Wait until the server has nothing more to do in the background."""

    def _measure_crash(self) -> Figures:
        start = time.perf_counter()
        self.crash()
        taken_s = self._await_get(start)
        self._check()
        return {CRASH: taken_s}

    def _measure_stop(self) -> Figures:
        start = time.perf_counter()
        self.end()
        stop_s = time.perf_counter() - start
        self.rest()
        start = time.perf_counter()
        self.begin()
        taken_s = self._await_get(start)
        self._check()
        return {STOP: stop_s, START: taken_s}

    def _await_get(self, start: float) -> float:
        """Seconds from `start` to the first correct get."""
        number = self._count // 2
        while True:
            with ExitStack() as running:
                found: Any = None
                try:
                    found = self.connect(running).get(self._key(number))
                    failure = (
                        "" if found == self._value(number) else f"{str(found)[:40]} instead of the value"
                    )
                except Exception as error:  # noqa: BLE001 - each client has errors of its own for "not yet"
                    failure = repr(error)
                taken_s = time.perf_counter() - start
            if not failure:
                if found != self._value(number):
                    raise RuntimeError(f"{self.name} gives {str(found)[:40]} instead of the value")
                return taken_s
            if taken_s > _WAIT_S:
                raise RuntimeError(f"{self.name} gives no value after {_WAIT_S:g} s: {failure}")
            time.sleep(_AGAIN_S)

    def _check(self) -> None:
        """Every value is there."""
        with ExitStack() as running:
            get_many = self.connect(running).get_many
            lost = sum(
                found != self._value(number)
                for batch in self._batches()
                for number, found in zip(batch, get_many([self._key(one) for one in batch]), strict=True)
            )
        if lost:
            raise RuntimeError(f"{self.name} has lost {lost} of {self._count} values")

    def _batches(self) -> Iterator[range]:
        return (range(first, min(first + _BATCH, self._count)) for first in range(0, self._count, _BATCH))

    def _key(self, number: int) -> str:
        return f"k{number:07}"

    def _value(self, number: int) -> bytes:
        """No two neighbours have the same one."""
        return number.to_bytes(4, "big") + self._blob[number % _VALUE_BYTES :][: _VALUE_BYTES - 4]


class Ours(Holder):
    """A cloud of one node; its supervisor starts a killed node again."""

    name = "virgo"
    promises = (
        "a set outlasts the node's process; killed: the node alone, started by its supervisor after 0.3 s"
    )

    def start(self) -> None:
        self._cloud = self.running.enter_context(servers.virgo_cloud())

    def connect(self, running: ExitStack) -> keepers.Values:
        return keepers.virgo_tcp(running, self._cloud)

    def crash(self) -> None:
        node = self._cloud.node()
        node.signal(signal.SIGKILL)
        while node.alive():
            time.sleep(_AGAIN_S)

    def end(self) -> None:
        self._cloud.stop()

    def begin(self) -> None:
        self._cloud.start()


class OursMapped(Ours):
    """The same, for a client on the node's machine that was there before."""

    name = "virgo mapped"
    promises = "the same; the client has read by mapping before, and needs no node to go on"

    def start(self) -> None:
        super().start()
        values = keepers.virgo_mapped(self.running, self._cloud.home)
        # Several keys in one request are the node's business, so here they are read one by one.
        self._values = replace(values, get_many=lambda keys: [values.get(key) for key in keys])

    def connect(self, running: ExitStack) -> keepers.Values:
        return self._values

    def settle(self) -> None:
        self._values.get(self._key(0))  # from then on it knows where the keys are

    def _measure_stop(self) -> Figures:
        return {}  # nobody stops and nothing starts for it


class Redis(Holder):
    """redis-server with its append-only file, started again at once."""

    name = "redis AOF"
    promises = "appendonly yes, everysec: a set outlasts the process, a power loss but for the last second"
    needs = keepers.REDIS_NEEDS

    def start(self) -> None:
        directory = self.running.enter_context(tempfile.TemporaryDirectory(prefix="redis-"))
        options = ("--appendonly", "yes", "--appendfsync", "everysec")
        self._server = self.running.enter_context(servers.redis(directory, *options))

    def connect(self, running: ExitStack) -> keepers.Values:
        return keepers.redis_py(running, self._server.port)

    def settle(self) -> None:
        """It rewrites its file in the background."""
        import redis

        deadline = time.monotonic() + _WAIT_S
        with redis.Redis(port=self._server.port) as client:
            while True:
                info: Any = client.info("persistence")
                if not (info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"]):
                    return
                if time.monotonic() > deadline:
                    raise RuntimeError(f"redis-server still rewrites its file after {_WAIT_S:g} s")
                time.sleep(0.1)

    def crash(self) -> None:
        self._server.end(signal.SIGKILL)
        self._server.start()

    def end(self) -> None:
        self._server.end(time_s=_WAIT_S)

    def begin(self) -> None:
        self._server.start()


class Memcached(Holder):
    """memcached with its memory in a file, and its warm restart."""

    name = "memcached -e"
    promises = (
        "file in /dev/shm: values outlast an orderly stop (SIGUSR1); kill -9 loses all, so is not measured"
    )
    needs = keepers.MEMCACHED_NEEDS

    def start(self) -> None:
        shm = Path("/dev/shm")
        directory = self.running.enter_context(tempfile.TemporaryDirectory(prefix="vb-", dir=shm))
        self._server = servers.memcached_of(2048, "-M", "-e", f"{directory}/memory")
        self.running.enter_context(self._server)

    def connect(self, running: ExitStack) -> keepers.Values:
        return keepers.pymemcache(running, self._server.port)

    def _measure_crash(self) -> Figures:
        return {}

    def end(self) -> None:
        self._server.end(signal.SIGUSR1, time_s=_WAIT_S)

    def rest(self) -> None:
        time.sleep(2)  # in the second of its stop it would begin empty

    def begin(self) -> None:
        self._server.start()


def contenders(quick: bool) -> Sequence[Contender]:
    """Ours for a new and an old client, and the peers."""
    return (Ours(quick), Redis(quick), OursMapped(quick), Memcached(quick))


ENTRY = Entry(
    name="memory_restart",
    title="1 GiB is held in values of 16 KiB: from the server's end to the first correct get",
    measures=tuple(Measure(name, "s") for name in (CRASH, STOP, START)),
    comparisons=(
        Comparison("virgo", "redis AOF", (CRASH, STOP, START)),
        Comparison("virgo mapped", "redis AOF", (CRASH,)),
        Comparison("virgo", "memcached -e", (STOP, START)),
    ),
    contenders=contenders,
    rounds=ROUNDS_MIN,
)
