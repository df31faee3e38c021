"""Placement on 10,000 nodes with figures that are old: a simulation, and its picture.

    python -m benchmarks.placement [--nodes N] [--svg FILE] [--json FILE]

Calls come at random moments to a cloud that is kept busy to four fifths; each takes an exponentially
distributed time, 1 on average, on a node that runs one at a time, first come, first served. Whoever places a
call knows of each node how many calls it had at its last beat. How old such figures may be is the question,
in lengths of a call:

    random        any node (`cpu.placement = "random"`, the reference system's way)
    least loaded  one of those that had the fewest calls: the obvious way, which herds
    best of two   the better of two random nodes
    virgo         VIRGO's own `placement.choose`, which compares more the longer calls are beside a beat

Source of the model: Mitzenmacher, "How Useful Is Old Information?", IEEE TPDS 2000.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from collections import deque
from pathlib import Path
from typing import Protocol

from virgo.cpu.placement import Candidate, choose, compared
from virgo.limits import MEMBER_BEAT_S
from virgo.members import Load

AGES = (0.1, 0.3, 1.0, 3.0, 10.0)
BUSY = 0.8
_LOAD = Load()
_COLOURS = {"random": "#888888", "least loaded": "#c0392b", "best of two": "#2e86c1", "virgo": "#1e8449"}


class Policy(Protocol):
    """Places calls, by figures that it hears now and then."""

    def heard(self, node: int, calls: int) -> None:
        """A node has said how many calls it has."""

    def place(self) -> int:
        """The node for a call."""


class Anywhere:
    """Any node."""

    def __init__(self, nodes: int, chance: random.Random) -> None:
        self._nodes, self._chance = nodes, chance

    def heard(self, node: int, calls: int) -> None:
        """It does not matter."""

    def place(self) -> int:
        """A random one."""
        return self._chance.randrange(self._nodes)


class LeastLoaded:
    """One of those with the fewest calls, as they said."""

    def __init__(self, nodes: int, chance: random.Random) -> None:
        self._chance = chance
        self._calls = [0] * nodes
        self._by_calls: dict[int, list[int]] = {0: list(range(nodes))}
        self._places = list(range(nodes))  # in the list of its count

    def heard(self, node: int, calls: int) -> None:
        """Move it to the list of its count."""
        old = self._by_calls[self._calls[node]]
        last = old.pop()
        if last != node:
            old[self._places[node]] = last
            self._places[last] = self._places[node]
        if not old:
            del self._by_calls[self._calls[node]]
        new = self._by_calls.setdefault(calls, [])
        self._places[node], self._calls[node] = len(new), calls
        new.append(node)

    def place(self) -> int:
        """A random one of the first list."""
        return self._chance.choice(self._by_calls[min(self._by_calls)])


class Best:
    """VIRGO's choice of some random nodes."""

    def __init__(self, nodes: int, chance: random.Random, *, compare: int) -> None:
        self._chance, self._compare = chance, compare
        self._candidates = [Candidate(node, _LOAD) for node in range(nodes)]

    def heard(self, node: int, calls: int) -> None:
        """Take note."""
        self._candidates[node] = Candidate(node, _LOAD, calls)

    def place(self) -> int:
        """As seen."""
        few = self._chance.sample(self._candidates, self._compare)
        return choose(few, chance=self._chance)


def policies(nodes: int, age: float, chance: random.Random) -> dict[str, Policy]:
    """All of them, fresh, for figures of that age."""
    return {
        "random": Anywhere(nodes, chance),
        "least loaded": LeastLoaded(nodes, chance),
        "best of two": Best(nodes, chance, compare=2),
        "virgo": Best(nodes, chance, compare=compared(MEMBER_BEAT_S / age)),
    }


def waits(policy: Policy, nodes: int, age: float, chance: random.Random) -> list[float]:
    """How long calls waited on their nodes, in lengths of a call, after a time to settle.

    Args:
        policy: places them.
        nodes: how many there are.
        age: between the beats of a node.
        chance: source of randomness.
    """
    length = max(10.0, 4 * age)
    leaving: list[deque[float]] = [deque() for _ in range(nodes)]  # when calls of a node end, in order
    beats = [(chance.random() * age, node) for node in range(nodes)]
    heapq.heapify(beats)
    found: list[float] = []
    now = 0.0
    while now < length:
        now += chance.expovariate(BUSY * nodes)
        while beats[0][0] <= now:
            at, node = beats[0]
            ends = leaving[node]
            while ends and ends[0] <= at:
                ends.popleft()
            policy.heard(node, len(ends))
            heapq.heapreplace(beats, (at + age, node))
        ends = leaving[policy.place()]
        free = max(ends[-1], now) if ends else now
        ends.append(free + chance.expovariate(1))
        if now > length / 2:
            found.append(free - now)
    return found


def quantile(values: list[float], share: float) -> float:
    """The nearest-rank quantile."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def simulate(nodes: int, *, seed: int = 1) -> dict[str, dict[float, tuple[float, float]]]:
    """The mean and the 99th percentile of the waits, by policy and age."""
    found: dict[str, dict[float, tuple[float, float]]] = {}
    for name in policies(1, 1.0, random.Random()):
        for age in AGES:
            chance = random.Random(seed)
            waited = waits(policies(nodes, age, chance)[name], nodes, age, chance)
            found.setdefault(name, {})[age] = (sum(waited) / len(waited), quantile(waited, 0.99))
            print(f"{name}, figures up to {age:g} old: mean {found[name][age][0]:.2f}, "
                  f"p99 {found[name][age][1]:.2f}", file=sys.stderr)  # fmt: skip
    return found


def picture(found: dict[str, dict[float, tuple[float, float]]], nodes: int) -> str:
    """The 99th percentiles as SVG; both axes are logarithmic."""
    import math

    wide, high, left, top = 720, 420, 70, 40
    low, most = 2.0, max(p99 for ages in found.values() for _, p99 in ages.values()) * 1.5

    def x(age: float) -> float:
        return left + (math.log10(age) + 1) / 2 * (wide - left - 150)

    def y(wait: float) -> float:
        share = math.log(max(wait, low) / low) / math.log(most / low)
        return high - 50 - share * (high - 50 - top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="15">p99 of the wait for a worker, '
        f"{nodes:,} nodes, 80 % busy, in lengths of a call</text>",
        f'<text x="{left}" y="{high - 10}">age of the figures, in lengths of a call</text>',
    ]
    for age in AGES:
        parts.append(f'<line x1="{x(age)}" y1="{top}" x2="{x(age)}" y2="{high - 50}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{x(age)}" y="{high - 32}" text-anchor="middle">{age:g}</text>')
    for wait in (3, 10, 30, 100, 300):
        if wait <= most:
            parts.append(
                f'<line x1="{left}" y1="{y(wait)}" x2="{wide - 150}" y2="{y(wait)}" stroke="#e5e5e5"/>'
            )
            parts.append(f'<text x="{left - 8}" y="{y(wait) + 4}" text-anchor="end">{wait:g}</text>')
    for name, ages in found.items():
        points = " ".join(f"{x(age):.1f},{y(p99):.1f}" for age, (_, p99) in ages.items())
        line = f'fill="none" stroke="{_COLOURS[name]}" stroke-width="2.5"'
        parts.append(f'<polyline points="{points}" {line}/>')
    height = math.inf  # of the label above; they must not cover each other
    for name in sorted(found, key=lambda name: -y(found[name][AGES[-1]][1])):
        height = min(y(found[name][AGES[-1]][1]) + 4, height - 16)
        parts.append(f'<text x="{wide - 142}" y="{height:.1f}" fill="{_COLOURS[name]}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--svg", type=Path, help="write the picture there")
    parser.add_argument("--json", type=Path, help="write the figures there")
    words = parser.parse_args()
    found = simulate(words.nodes)
    if words.svg:
        words.svg.write_text(picture(found, words.nodes), encoding="utf-8")
    if words.json:
        words.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("| age | " + " | ".join(f"{name}, mean / p99" for name in found) + " |")
    print("| --- |" + " --- |" * len(found))
    for age in AGES:
        cells = [f"{ages[age][0]:.2f} / {ages[age][1]:.1f}" for ages in found.values()]
        print(f"| {age:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
