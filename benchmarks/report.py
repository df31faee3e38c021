"""Results as tables for people and as JSON for programs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from benchmarks.harness import Result, Spread, Verdict, compare

FORMAT = 2  # of the JSON; a change of meaning raises it
_PACKAGES = (
    "virgo-os", "loky", "ray", "distributed", "pymemcache", "redis", "hiredis", "numpy", "lmdb", "uvloop",
)  # fmt: skip
_PROGRAMS = {"redis-server": ["redis-server", "--version"], "memcached": ["memcached", "--version"]}


def figure(value: float, unit: str) -> str:
    """A figure with three significant digits: `12.3 µs`, `45,600/s`, `1.21 GiB`."""
    if unit == "1/s":
        return f"{value:,.0f}/s" if value >= 100 else f"{value:.3g}/s"
    if unit == "B":
        for scale, name in ((1024.0**3, "GiB"), (1024.0**2, "MiB"), (1024.0, "KiB")):
            if value >= scale:
                return (
                    f"{value / scale:.3g} {name}" if value / scale < 999.5 else f"{value / scale:.0f} {name}"
                )
        return f"{value:.3g} B" if value < 999.5 else f"{value:.0f} B"
    for scale, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{value / scale:.3g} {name}" if value / scale < 999.5 else f"{value / scale:.0f} {name}"
    return f"{value / 1e-9:.3g} ns"


def spread(value: Spread, unit: str) -> str:
    """Median, then least to greatest in brackets."""
    least, greatest = figure(value.least, unit), figure(value.greatest, unit)
    return f"{figure(value.median, unit)} ({least} - {greatest})"


def factor(value: float) -> str:
    """A ratio: `0.93x`, `12x`, `0.0021x`."""
    if value < 0.1:
        return f"{value:.2g}x"
    return f"{value:.2f}x" if value < 10 else f"{value:,.0f}x"


def show(result: Result, console: Console, *, quick: bool) -> None:
    """Print an entry: what each side promised, the raw figures, the ratios."""
    entry = result.entry
    console.rule(f"{entry.name}: {entry.title}")
    console.print(Group(_promises(result), _raw(result), _ratios(result, quick=quick)))


def _promises(result: Result) -> Table:
    table = Table("contender", "promises", title="what an answer means", title_justify="left", box=None)
    for contender in result.entry.contenders(True):
        table.add_row(contender.name, contender.promises)
    return table


def _raw(result: Result) -> Table:
    table = Table(
        "measure", "contender", "median (least - greatest)", title="raw figures", title_justify="left"
    )
    for measure in result.entry.measures:
        found = [(name, result.spread(name, measure.name)) for name in result.figures]
        label = measure.name
        for name, value in found:
            if value is not None:
                table.add_row(label, name, spread(value, measure.unit))
                label = ""  # once for each group of rows
        table.add_section()
    return table


def _ratios(result: Result, *, quick: bool) -> Table:
    title = "ratios: how many times faster, or smaller, is ours (least - greatest of a round)"
    table = Table("measure", "ours", "peer", "ratio", "goal", "verdict", title=title, title_justify="left")
    for verdict in compare(result):
        least, greatest = factor(verdict.ratio.least), factor(verdict.ratio.greatest)
        table.add_row(
            verdict.measure,
            verdict.ours,
            verdict.peer,
            f"{factor(verdict.ratio.median)} ({least} - {greatest})",
            factor(verdict.goal) if verdict.goal is not None else "",
            Text("quick run: no verdict", "dim") if quick and verdict.words else _coloured(verdict),
        )
    return table


def _coloured(verdict: Verdict) -> Text:
    return Text(verdict.words, {"met": "green", "not met": "red"}.get(verdict.words, ""))


def summary(results: Sequence[Result]) -> str:
    """One line: how many goals are met."""
    words = [verdict.words for result in results for verdict in compare(result) if verdict.words]
    return f"{words.count('met')} of {len(words)} goals met"


def document(
    results: Sequence[Result],
    *,
    failures: Mapping[str, str],
    quick: bool,
    started: str,
    load_at_start: float,
) -> dict[str, Any]:
    """Everything as plain data for JSON."""
    return {
        "format": FORMAT,
        "started": started,
        "quick": quick,
        "machine": {**machine(), "load_1min_at_start": round(load_at_start, 2)},
        "versions": versions(),
        "failures": dict(failures),
        "entries": [_entry(result, quick=quick) for result in results],
    }


def _entry(result: Result, *, quick: bool) -> dict[str, Any]:
    entry = result.entry
    return {
        "name": entry.name,
        "title": entry.title,
        "rounds": result.rounds,
        "promises": {one.name: one.promises for one in entry.contenders(True)},
        "units": {measure.name: measure.unit for measure in entry.measures},
        "figures": {name: dict(taken) for name, taken in result.figures.items()},
        "ratios": [
            {
                "measure": verdict.measure,
                "ours": verdict.ours,
                "peer": verdict.peer,
                "ratio": verdict.ratio.median,
                "ratio_least": verdict.ratio.least,
                "ratio_greatest": verdict.ratio.greatest,
                "goal": verdict.goal,
                "verdict": "" if quick else verdict.words,
            }
            for verdict in compare(result)
        ],
    }


def machine() -> dict[str, Any]:
    """The machine, as far as it matters for speed."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": models[0] if models else platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages and programs that may take part; "" for what is not there."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    for name, command in _PROGRAMS.items():
        try:
            found[name] = subprocess.run(command, text=True, capture_output=True).stdout.strip()
        except FileNotFoundError:
            found[name] = ""
    return found
