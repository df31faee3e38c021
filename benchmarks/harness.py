"""Runs contenders alternately and compares what they measured.

An `Entry` is one question ("how fast is a no-op call?"): contenders that answer it, what they measure,
and comparisons with their goals. `run` measures the contenders in rounds, one after the other (ours,
peer, ours, peer, ...), each started afresh and stopped before the next begins, so that drift of the
machine falls on all alike and nobody's idle servers burden the others. `compare` is pure.

A ratio is always "how many times faster is ours", or smaller: ours/peer for rates, peer/ours for times and
bytes. It is taken of the medians over the rounds; its spread is that of the ratios within single rounds.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

ROUNDS = 5  # usually
ROUNDS_MIN = 3  # fewer give no median worth the name

Figures = dict[str, float]
RunOne = Callable[["Entry", "Contender"], Figures]


class Missing(Exception):
    """Peers that the chosen entries need are not installed."""


class Broken(Exception):
    """A contender did not measure what its entry wants."""


@dataclass(frozen=True, slots=True)
class Need:
    """A program on the path or an importable module, and where it comes from.

    Attributes:
        kind: "program" or "module".
        name: of the program or module.
        source: what to install, in words.
    """

    kind: str
    name: str
    source: str

    def met(self) -> bool:
        """Whether it is installed."""
        if self.kind == "program":
            return shutil.which(self.name) is not None
        return importlib.util.find_spec(self.name) is not None


class Contender(Protocol):
    """One side of a benchmark. `start`, `measure` and `stop` run once each, in a process of their own."""

    @property
    def name(self) -> str:
        """Unique in the entry."""

    @property
    def promises(self) -> str:
        """What an answer means: durability, copies, isolation."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """What must be installed."""

    def start(self) -> None:
        """Start servers and warm up; not measured."""

    def measure(self) -> Figures:
        """One figure for each measure of the entry that this contender can take."""

    def stop(self) -> None:
        """Stop all that was started, also after a failed start."""


class Hosted(ABC):
    """A contender whose servers are context managers that `start` enters and `stop` leaves.

    Attributes:
        quick: whether to do little work.
        running: what `stop` closes.
    """

    name: str = ""
    promises: str = ""
    needs: tuple[Need, ...] = ()

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.running = ExitStack()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}{' quick' if self.quick else ''}>"

    @abstractmethod
    def start(self) -> None:
        """See Contender."""

    @abstractmethod
    def measure(self) -> Figures:
        """See Contender."""

    def stop(self) -> None:
        """See Contender."""
        self.running.close()


@dataclass(frozen=True, slots=True)
class Measure:
    """What a figure means.

    Attributes:
        name: unique in the entry.
        unit: "s" (a time) or "B" (memory), of which less is better; or "1/s" (a rate): more is better.
    """

    name: str
    unit: str

    def ratio(self, ours: float, peer: float) -> float:
        """How many times faster, or smaller, ours is."""
        faster, slower = (ours, peer) if self.unit == "1/s" else (peer, ours)
        return faster / slower if slower else math.inf


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours against a peer in some measures; `goal` is the least ratio wanted, None for the record only."""

    ours: str
    peer: str
    measures: tuple[str, ...]
    goal: float | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One benchmark.

    Attributes:
        name: on the command line.
        title: the question.
        measures: all that its contenders measure.
        comparisons: in the order of the table.
        contenders: makes them; the argument says whether they are to be quick.
        rounds: how many, unless the command line says otherwise; fewer than usual where one takes long.
        time_s_max: the longest that one contender may take.
    """

    name: str
    title: str
    measures: tuple[Measure, ...]
    comparisons: tuple[Comparison, ...]
    contenders: Callable[[bool], Sequence[Contender]]
    rounds: int = ROUNDS
    time_s_max: float = 600.0

    def measure(self, name: str) -> Measure:
        """The measure of that name."""
        return next(measure for measure in self.measures if measure.name == name)


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the least and the greatest."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of some figures, at least one."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one comparison in one measure."""

    measure: str
    ours: str
    peer: str
    ours_figures: Spread
    peer_figures: Spread
    ratio: Spread
    goal: float | None

    @property
    def words(self) -> str:
        """ "met", "not met", or "" where there is no goal."""
        if self.goal is None:
            return ""
        return "met" if self.ratio.median >= self.goal else "not met"


@dataclass(frozen=True, slots=True)
class Result:
    """What an entry's rounds gave: figures by contender and measure, one a round."""

    entry: Entry
    figures: Mapping[str, Mapping[str, Sequence[float]]]

    @property
    def rounds(self) -> int:
        """How many there were."""
        return max(len(values) for taken in self.figures.values() for values in taken.values())

    def spread(self, contender: str, measure: str) -> Spread | None:
        """The spread of a contender's figures, None if it does not take this measure."""
        values = self.figures[contender].get(measure)
        return Spread.of(values) if values else None


def require(entries: Iterable[Entry]) -> None:
    """Check that everything is installed. Raises Missing, which names all that is not."""
    needs = {need for entry in entries for one in entry.contenders(True) for need in one.needs}
    lacking = sorted((need for need in needs if not need.met()), key=lambda need: need.name)
    if lacking:
        lines = [f"  {need.kind} {need.name}: {need.source}" for need in lacking]
        raise Missing("these peers are missing, and no entry runs without them:\n" + "\n".join(lines))


def run(
    entry: Entry,
    *,
    rounds: int,
    quick: bool,
    run_one: RunOne,
    progress: Callable[[str], None] = lambda _: None,
) -> Result:
    """Measure the entry's contenders in turn, `rounds` times.

    Args:
        entry: the benchmark.
        rounds: at least ROUNDS_MIN.
        quick: little work, to see that it runs; the figures mean nothing.
        run_one: starts, measures and stops one contender.
        progress: told what is about to run.

    Raises:
        Broken: a contender failed, or gave other measures than the entry compares, or no positive figure.
    """
    if rounds < ROUNDS_MIN:
        raise ValueError(f"{rounds} rounds are too few; at least {ROUNDS_MIN}")
    contenders = entry.contenders(quick)
    figures: dict[str, dict[str, list[float]]] = {contender.name: {} for contender in contenders}
    for number in range(1, rounds + 1):
        for contender in contenders:
            progress(f"{entry.name}, round {number} of {rounds}: {contender.name}")
            taken = run_one(entry, contender)
            _check(entry, contender, taken)
            for measure, figure in taken.items():
                figures[contender.name].setdefault(measure, []).append(figure)
    return Result(entry, figures)


def _check(entry: Entry, contender: Contender, taken: Figures) -> None:
    known = {measure.name for measure in entry.measures}
    wanted = {
        measure
        for comparison in entry.comparisons
        if contender.name in (comparison.ours, comparison.peer)
        for measure in comparison.measures
    }
    if not wanted <= taken.keys() <= known:
        odd = sorted((wanted - taken.keys()) | (taken.keys() - known))
        raise Broken(f"{entry.name}: {contender.name} measured other things than wanted: {', '.join(odd)}")
    for name, figure in taken.items():
        least = (
            0.0 if entry.measure(name).unit == "B" else math.ulp(0.0)
        )  # nothing may be held, none is timed
        if not (math.isfinite(figure) and figure >= least):
            raise Broken(f"{entry.name}: {contender.name} gave {figure} for {name}")


def compare(result: Result) -> list[Verdict]:
    """The verdicts on all comparisons of the entry, in its order."""
    return [
        _verdict(result, comparison, result.entry.measure(name))
        for comparison in result.entry.comparisons
        for name in comparison.measures
    ]


def _verdict(result: Result, comparison: Comparison, measure: Measure) -> Verdict:
    ours = result.figures[comparison.ours][measure.name]
    peer = result.figures[comparison.peer][measure.name]
    ours_spread, peer_spread = Spread.of(ours), Spread.of(peer)
    by_round = [measure.ratio(one, other) for one, other in zip(ours, peer, strict=True)]
    ratio = Spread(measure.ratio(ours_spread.median, peer_spread.median), min(by_round), max(by_round))
    return Verdict(
        measure.name, comparison.ours, comparison.peer, ours_spread, peer_spread, ratio, comparison.goal
    )
