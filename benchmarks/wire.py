"""Wire: requests per second over TCP, driven by redis-benchmark, against redis-server."""

from __future__ import annotations

import csv
import subprocess
from abc import abstractmethod
from collections.abc import Sequence

from benchmarks import servers
from benchmarks.harness import Comparison, Contender, Entry, Figures, Hosted, Measure

TESTS = ("PING_INLINE", "PING_MBULK", "SET", "GET")
PIPELINES = {1: "no pipeline", 16: "-P 16", 100: "-P 100"}
_REQUESTS = {1: 100_000, 16: 800_000, 100: 1_500_000}
_QUICK_DIVISOR = 50
_CLIENTS, _VALUE_BYTES = 20, 64


def _measure(test: str, pipeline: int) -> str:
    return f"{test} {PIPELINES[pipeline]}"


class Driven(Hosted):
    """A server that redis-benchmark drives from one thread, with 20 connections and 64-byte values."""

    def __init__(self, quick: bool) -> None:
        super().__init__(quick)
        self._divisor = _QUICK_DIVISOR if quick else 1
        self._reach: list[str] = []

    @abstractmethod
    def start(self) -> None:
        """Start the server and set `_reach`, the options that lead redis-benchmark to it."""

    def measure(self) -> Figures:
        self._drive(1, _REQUESTS[1] // _QUICK_DIVISOR)  # warm-up
        return {
            _measure(test, pipeline): rate
            for pipeline, requests in _REQUESTS.items()
            for test, rate in self._drive(pipeline, requests // self._divisor).items()
        }

    def _drive(self, pipeline: int, requests: int) -> Figures:
        command = ["redis-benchmark", *self._reach, "-c", str(_CLIENTS), "-d", str(_VALUE_BYTES), "--csv"]
        command += ["-P", str(pipeline), "-n", str(requests), "-t", ",".join(TESTS).lower()]
        done = subprocess.run(command, text=True, capture_output=True, timeout=300)
        rows = {row[0].split(" ")[0]: row for row in csv.reader(done.stdout.splitlines()) if len(row) > 1}
        if done.returncode or not rows.keys() >= set(TESTS):
            raise RuntimeError(f"redis-benchmark failed against {self.name}: {done.stdout}{done.stderr}")
        return {test: float(rows[test][1]) for test in TESTS}


class OurWire(Driven):
    """The memory port of a node."""

    name = "virgo"
    promises = "TCP, token; a SET outlasts the node's process (mapped file), not a power loss; one copy"
    needs = (servers.REDIS_BENCHMARK,)

    def start(self) -> None:
        cloud = self.running.enter_context(servers.virgo_cloud())
        # The token of a throw-away cloud; redis-benchmark takes one on the command line only.
        self._reach = ["-p", str(cloud.memory_port), "-a", cloud.token]


class RedisWire(Driven):
    """A fresh redis-server."""

    name = "redis-server"
    promises = "TCP, no password; no persistence: a SET is gone with the process; one copy"
    needs = (servers.REDIS_BENCHMARK, servers.REDIS)

    def start(self) -> None:
        self._reach = ["-p", str(self.running.enter_context(servers.redis_server()))]


def contenders(quick: bool) -> Sequence[Contender]:
    """Both sides."""
    return (OurWire(quick), RedisWire(quick))


ENTRY = Entry(
    name="wire",
    title="Requests per second over TCP (redis-benchmark -c 20 -d 64)",
    measures=tuple(Measure(_measure(test, pipeline), "1/s") for pipeline in PIPELINES for test in TESTS),
    comparisons=tuple(
        Comparison(
            "virgo",
            "redis-server",
            (_measure(test, pipeline),),
            goal=1.0 if pipeline == 16 and test in ("SET", "GET") else None,
        )
        for pipeline in PIPELINES
        for test in TESTS
    ),
    contenders=contenders,
)
