"""The benchmark harness: order of rounds, medians, ratios, verdicts, and what it refuses."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.apart import measure, run_apart
from benchmarks.entries import ENTRIES
from benchmarks.harness import (
    Broken,
    Comparison,
    Contender,
    Entry,
    Figures,
    Measure,
    Missing,
    Need,
    Result,
    Spread,
    compare,
    require,
    run,
)
from benchmarks.timing import many_at_once, one_at_a_time

LATENCY, RATE = Measure("latency", "s"), Measure("rate", "1/s")


class Fake:
    """A contender that notes what is done with it and gives the figures it was made with."""

    promises = "nothing"

    def __init__(self, name: str, *, needs: tuple[Need, ...] = (), figures: Figures | None = None) -> None:
        self.name = name
        self.needs = needs
        self.figures = figures
        self.done: list[str] = []

    def start(self) -> None:
        self.done.append("start")
        if self.figures is None:
            raise OSError("it does not start")

    def measure(self) -> Figures:
        self.done.append("measure")
        return self.figures or {}

    def stop(self) -> None:
        self.done.append("stop")


def entry_of(*contenders: Contender, goal: float | None = 2.0) -> Entry:
    """An entry that compares `ours` with `peer` in latency and rate."""

    def make(quick: bool) -> Sequence[Contender]:
        return contenders

    comparison = Comparison("ours", "peer", ("latency", "rate"), goal)
    return Entry("fake", "a question", (LATENCY, RATE), (comparison,), make)


def result_of(ours: list[Figures], peer: list[Figures], *, goal: float | None = 2.0) -> Result:
    """The result of rounds with these figures."""
    figures = {"ours": iter(ours), "peer": iter(peer)}
    entry = entry_of(Fake("ours"), Fake("peer"), goal=goal)
    return run(
        entry, rounds=len(ours), quick=True, run_one=lambda _, contender: next(figures[contender.name])
    )


def rounds(latency_s: Sequence[float], rate: Sequence[float]) -> list[Figures]:
    """Figures by round."""
    return [{"latency": one, "rate": other} for one, other in zip(latency_s, rate, strict=True)]


def test_contenders_run_in_turn() -> None:
    """Every round runs each contender once, in order: ours, peer, ours, peer."""
    order: list[str] = []

    def run_one(_: Entry, contender: Contender) -> Figures:
        order.append(contender.name)
        return {"latency": 1.0, "rate": 1.0}

    run(entry_of(Fake("ours"), Fake("peer")), rounds=3, quick=True, run_one=run_one)
    assert order == ["ours", "peer"] * 3


def test_ratio_is_how_many_times_faster_ours_is() -> None:
    """For times it is peer/ours, for rates ours/peer, of the medians: one odd round changes nothing."""
    result = result_of(
        rounds([1e-3, 9.0, 1e-3], [500, 1, 500]),
        rounds([4e-3, 4e-3, 4e-3], [100, 100, 100]),
    )
    latency, rate = compare(result)
    assert latency.ratio.median == pytest.approx(4.0)
    assert rate.ratio.median == pytest.approx(5.0)
    assert latency.ours_figures == Spread(1e-3, 1e-3, 9.0)
    assert rate.peer_figures == Spread(100, 100, 100)


def test_of_bytes_less_is_better_and_none_is_a_figure() -> None:
    """For memory the ratio is peer/ours; to hold nothing is possible, to take no time is not."""
    held = Measure("held", "B")
    assert held.ratio(50.0, 200.0) == 4.0
    entry = Entry("fake", "a question", (held,), (), lambda _: (Fake("ours"),))
    result = run(entry, rounds=3, quick=True, run_one=lambda *_: {"held": 0.0})
    assert result.spread("ours", "held") == Spread(0.0, 0.0, 0.0)
    with pytest.raises(Broken, match="ours"):
        run(entry, rounds=3, quick=True, run_one=lambda *_: {"held": -1.0})


def test_a_long_entry_has_fewer_rounds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An entry says how many rounds it makes; the command line decides for all."""
    figures = {"latency": 1.0, "rate": 1.0}
    monkeypatch.setattr(command, "run_apart", lambda *_, **__: figures)
    entry = replace(entry_of(Fake("ours"), Fake("peer")), rounds=4)
    monkeypatch.setitem(ENTRIES, "clone", entry)
    made = []
    for number, options in enumerate([[], ["--rounds", "6"], ["--quick"]]):
        file = tmp_path / str(number)
        assert command.main(["clone", "--json", str(file), *options]) == 0
        made.append(json.loads(file.read_text())["entries"][0]["rounds"])
    assert made == [4, 6, 3]


def test_spread_of_the_ratio_is_that_of_single_rounds() -> None:
    """Each round's own ratio bounds the spread, so that drift common to both sides cancels."""
    result = result_of(rounds([1, 2, 3], [10, 20, 60]), rounds([2, 4, 6], [10, 10, 10]))
    latency, rate = compare(result)
    assert latency.ratio == Spread(2.0, 2.0, 2.0)
    assert rate.ratio == Spread(2.0, 1.0, 6.0)


@pytest.mark.parametrize(
    ("goal", "words"), [(1.99, "met"), (2.0, "met"), (2.01, "not met"), (None, "")], ids=str
)
def test_verdict(goal: float | None, words: str) -> None:
    """A ratio that reaches the goal meets it; without a goal there is no verdict."""
    result = result_of(rounds([1, 1, 1], [2, 2, 2]), rounds([2, 2, 2], [1, 1, 1]), goal=goal)
    assert [verdict.words for verdict in compare(result)] == [words, words]


@pytest.mark.parametrize(
    "figures",
    [
        {"latency": 1.0},
        {"latency": 1.0, "rate": 1.0, "other": 1.0},
        {"latency": 0.0, "rate": 1.0},
        {"latency": math.nan, "rate": 1.0},
    ],
    ids=["one lacks", "one is unknown", "zero", "not a number"],
)
def test_wrong_figures_break_the_entry(figures: Figures) -> None:
    """A contender that does not measure what is compared is an error, not a gap in the table."""
    with pytest.raises(Broken, match="ours"):
        run(entry_of(Fake("ours"), Fake("peer")), rounds=3, quick=True, run_one=lambda *_: figures)


def test_too_few_rounds_are_refused() -> None:
    """Two rounds have no median."""
    with pytest.raises(ValueError, match="at least 3"):
        run(entry_of(Fake("ours"), Fake("peer")), rounds=2, quick=True, run_one=lambda *_: {})
    assert command.main(["clone", "--rounds", "2"]) == 2


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All missing peers are named with what to install, and nothing runs."""
    program = Need("program", "no-such-server", "Debian package no-such-server")
    module = Need("module", "no_such_module", "PyPI")
    entry = entry_of(
        Fake("ours", needs=(Need("module", "json", "Python"),)), Fake("peer", needs=(program, module))
    )
    with pytest.raises(Missing) as raised:
        require([entry])
    assert "Debian package no-such-server" in str(raised.value) and "no_such_module: PyPI" in str(
        raised.value
    )
    assert "json" not in str(raised.value)
    monkeypatch.setitem(ENTRIES, "clone", entry)
    assert command.main(["clone"]) == 2
    assert "no-such-server" in capsys.readouterr().err


def test_a_contender_is_stopped_whatever_happens() -> None:
    """`stop` follows a failed start as it follows a measurement."""
    works, fails = Fake("ours", figures={"rate": 1.0}), Fake("peer")
    assert measure(works) == {"rate": 1.0}
    with pytest.raises(OSError, match="does not start"):
        measure(fails)
    assert works.done == ["start", "measure", "stop"] and fails.done == ["start", "stop"]


def test_contender_runs_in_a_process_of_its_own() -> None:
    """A real contender's figures come back from its process."""
    clone = ENTRIES["clone"]
    pool = next(one for one in clone.contenders(True) if one.name == "ProcessPoolExecutor")
    figures = run_apart(clone, pool, quick=True)
    assert figures.keys() == {measure.name for measure in clone.measures}
    assert min(figures.values()) > 0


def test_a_contender_that_dies_breaks_the_entry_aloud() -> None:
    """The error has the status and what the process said."""
    with pytest.raises(Broken, match=r"nobody ended with status 1(.|\n)*StopIteration"):
        run_apart(ENTRIES["clone"], Fake("nobody"), quick=True)


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_are_consistent(name: str) -> None:
    """Comparisons name contenders and measures that exist, contenders say what they promise."""
    entry = ENTRIES[name]
    contenders = {one.name: one for one in entry.contenders(True)}
    measures = {measure.name for measure in entry.measures}
    assert entry.name == name and len(contenders) == len(entry.contenders(True))
    assert all(one.promises for one in contenders.values())
    for comparison in entry.comparisons:
        assert {comparison.ours, comparison.peer} <= contenders.keys()
        assert set(comparison.measures) <= measures


def test_table_and_json_say_the_same() -> None:
    """Both show promises, raw figures, ratio, goal and verdict; a quick run gives no verdict."""
    result = result_of(rounds([1e-4] * 3, [9000] * 3), rounds([2.5e-4] * 3, [3000] * 3), goal=2.6)
    output = io.StringIO()
    report.show(result, Console(file=output, width=160), quick=False)
    shown = output.getvalue()
    for expected in ("100 µs", "250 µs", "9,000/s", "2.50x", "3.00x", "2.60x", "not met", "nothing"):
        assert expected in shown
    options = {"failures": {}, "started": "now", "load_at_start": 0.1}
    plain = json.loads(json.dumps(report.document([result], quick=False, **options)))
    ratios = plain["entries"][0]["ratios"]
    assert [one["verdict"] for one in ratios] == ["not met", "met"]
    assert [one["ratio"] for one in ratios] == pytest.approx([2.5, 3.0])
    assert plain["entries"][0]["figures"]["ours"]["rate"] == [9000] * 3
    assert plain["entries"][0]["rounds"] == 3
    quick = report.document([result], quick=True, **options)
    assert {one["verdict"] for one in quick["entries"][0]["ratios"]} == {""}
    assert report.summary([result]) == "1 of 2 goals met"


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (1.5, "s", "1.5 s"),
        (0.01234, "s", "12.3 ms"),
        (56e-6, "s", "56 µs"),
        (7e-7, "s", "700 ns"),
        (123456.7, "1/s", "123,457/s"),
        (3.14159, "1/s", "3.14/s"),
        (99.9, "B", "99.9 B"),
        (0, "B", "0 B"),
        (1000, "B", "1000 B"),
        (1234, "B", "1.21 KiB"),
        (300 * 1024**2, "B", "300 MiB"),
        (3 * 1024**3 / 2, "B", "1.5 GiB"),
    ],
)
def test_figures_in_words(value: float, unit: str, words: str) -> None:
    """Three digits and the unit that fits."""
    assert report.figure(value, unit) == words


def test_clocks_count_every_call() -> None:
    """A call of known length is timed as such, one at a time and in batches, and batches reach their time."""
    calls = itertools.count()
    timed = one_at_a_time(lambda: next(calls), time_s=0.02)
    assert 0 < timed.p50_s <= timed.p99_s < 0.02
    assert timed.rate > 1000 and next(calls) > 1
    sizes: list[int] = []
    assert many_at_once(sizes.append, time_s=1e9, count_max=300) > 0
    assert sizes == [100, 300]
