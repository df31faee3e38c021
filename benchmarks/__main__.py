"""`python -m benchmarks [ENTRY...] [--quick] [--rounds N] [--json FILE]`.

Ends with 0 if everything was measured, whether or not goals are met; 1 if an entry failed; 2 if a peer is
missing or the arguments are wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.apart import run_apart
from benchmarks.entries import ENTRIES
from benchmarks.harness import (
    ROUNDS,
    ROUNDS_MIN,
    Broken,
    Contender,
    Entry,
    Figures,
    Missing,
    Result,
    require,
    run,
)

RESULTS = Path(__file__).resolve().parent / "results"
_LOAD_QUIET = 0.5  # above this much load a processor at the start, the figures are suspect


def main(arguments: list[str] | None = None) -> int:
    """Run the entries; returns the exit status."""
    options = _parser().parse_args(arguments)
    rounds = ROUNDS_MIN if options.quick and options.rounds is None else options.rounds
    if rounds is not None and rounds < ROUNDS_MIN:
        sys.stderr.write(f"benchmarks: --rounds {rounds} are too few; at least {ROUNDS_MIN}\n")
        return 2
    entries = [ENTRIES[name] for name in dict.fromkeys(options.entries)] or list(ENTRIES.values())
    try:
        require(entries)
    except Missing as missing:
        sys.stderr.write(f"benchmarks: {missing}\n")
        return 2
    started = datetime.datetime.now(datetime.UTC)
    load = os.getloadavg()[0]
    console = Console(width=None if sys.stdout.isatty() else 150)
    _warn(console, load, quick=options.quick)
    results, failures = _run_all(entries, console, rounds=rounds, quick=options.quick)
    document = report.document(
        results,
        failures=failures,
        quick=options.quick,
        started=started.isoformat(timespec="seconds"),
        load_at_start=load,
    )
    path = options.json or RESULTS / f"{started:%Y%m%dT%H%M%SZ}{'-quick' if options.quick else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    console.print("quick run: the figures mean nothing" if options.quick else report.summary(results))
    console.print(f"written to {path}", soft_wrap=True)
    for name, failure in failures.items():
        sys.stderr.write(f"benchmarks: entry {name} FAILED: {failure}\n")
    return 1 if failures else 0


def _run_all(
    entries: list[Entry], console: Console, *, rounds: int | None, quick: bool
) -> tuple[list[Result], dict[str, str]]:
    """Run and show each entry; one that fails does not keep the others from running."""

    def run_one(entry: Entry, contender: Contender) -> Figures:
        return run_apart(entry, contender, quick=quick)

    results: list[Result] = []
    failures: dict[str, str] = {}
    with console.status("") as status:
        for entry in entries:
            try:
                result = run(
                    entry,
                    rounds=rounds if rounds is not None else entry.rounds,
                    quick=quick,
                    run_one=run_one,
                    progress=status.update,
                )
            except Broken as broken:
                failures[entry.name] = str(broken)
                continue
            report.show(result, console, quick=quick)
            results.append(result)
    return results, failures


def _warn(console: Console, load: float, *, quick: bool) -> None:
    cpus = len(os.sched_getaffinity(0))
    if not quick and load > _LOAD_QUIET * cpus:
        console.print(f"[yellow]the machine is not quiet: load {load:.1f} on {cpus} processors")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="VIRGO beside its peers, in one run."
    )
    parser.add_argument(
        "entries", nargs="*", metavar="ENTRY", choices=[*ENTRIES, []], help=", ".join(ENTRIES)
    )
    parser.add_argument("--quick", action="store_true", help="little work: shows that it runs, means nothing")
    parser.add_argument(
        "--rounds",
        type=int,
        default=None,
        help=f"default {ROUNDS}, {ROUNDS_MIN} for long entries and with --quick",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"default: a new file in {RESULTS.name}/")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that all is stopped
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
