"""Runs memcached's own test suites against VIRGO, and compares with what is written down.

    python scripts/peers/suites.py [--only FILE...] [--keep DIRECTORY]

memcached's `t/*.t` come with Debian's source package, whose version is the one of the protocol that is
spoken here; pymemcache's integration tests come with its source distribution. Both are fetched into a
temporary directory. `expected.toml` lists each file and each assertion that may fail, with the reason: what
fails without being listed, and what is listed and passes, makes this program fail.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
VERSION = "1.6.18"
PYMEMCACHE = "pymemcache==4.0.0"
_SOURCES = """\
Types: deb-src
URIs: http://deb.debian.org/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb-src
URIs: http://deb.debian.org/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
_FILE_S = 300


@dataclass
class Outcome:
    """What became of one file: assertions that passed and failed, and how it ended."""

    passed: int = 0
    failed: list[int] = field(default_factory=list)
    planned: int = 0
    skipped: str = ""
    output: str = ""

    @property
    def ended_early(self) -> bool:
        """Whether the file ended before its last assertion."""
        return not self.skipped and not 0 < self.planned <= self.passed + len(self.failed)

    def __str__(self) -> str:
        if self.skipped:
            return f"skips itself: {self.skipped}"
        text = f"{self.passed} of {self.planned} assertions pass"
        if self.ended_early:
            text += f", ends after {self.passed + len(self.failed)}"
        return text + (f", failing: {ranges(self.failed)}" if self.failed else "")


def ranges(numbers: list[int]) -> list[int | str]:
    """Numbers as they are written down: [3, "5-8"]."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return [low if low == high else f"{low}-{high}" for low, high in found]


# --- fetching ---------------------------------------------------------------------------------


def fetch_memcached(directory: Path) -> Path:
    """The sources, unpacked, with our launcher in the place of the server. Needs dpkg-dev, gcc and perl."""
    (directory / "lists" / "partial").mkdir(parents=True)
    (directory / "deb.sources").write_text(_SOURCES)
    apt = [
        *("apt-get", "-qq", "-o", f"Dir::Etc::sourcelist={directory}/deb.sources"),
        *("-o", "Dir::Etc::sourceparts=-", "-o", f"Dir::State::lists={directory}/lists"),
    ]
    subprocess.run([*apt, "update"], check=True, cwd=directory)
    subprocess.run([*apt, "source", "memcached"], check=True, cwd=directory, stdout=subprocess.DEVNULL)
    root = directory / f"memcached-{VERSION}"
    subprocess.run(["gcc", "-o", "timedrun", "timedrun.c"], check=True, cwd=root)
    launcher = root / "memcached-debug"
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE}/launcher.py "$@"\n')
    launcher.chmod(0o755)
    return root


def fetch_pymemcache(directory: Path) -> Path:
    """The source distribution, unpacked."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "pymemcache"]
    subprocess.run([*pip, PYMEMCACHE], check=True, cwd=directory)
    (archive,) = directory.glob("pymemcache-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(directory, filter="data")
    return directory / archive.name.removesuffix(".tar.gz")


# --- running ----------------------------------------------------------------------------------


def run_perl(root: Path, path: Path) -> Outcome:
    """One file of `t`, with servers of its own, in a process group that is ended with it."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            ["perl", "-I", "t/lib", f"t/{path.name}"],
            cwd=root, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_FILE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # servers that the file left, or the file itself
        process.wait()
        output.seek(0)
        return read_tap(output.read())


def read_tap(output: str) -> Outcome:
    """The outcome that a file printed."""
    found = Outcome(output=output)
    for line in output.splitlines():
        if match := re.match(r"1\.\.(\d+)(?:\s*# ?skip\w*\s*(.*))?", line, re.IGNORECASE):
            found.planned = int(match[1])
            if found.planned == 0:
                found.skipped = match[2] or "no reason"
        elif match := re.match(r"(not )?ok (\d+)", line):
            if match[1] and "# TODO" not in line:
                found.failed.append(int(match[2]))
            else:
                found.passed += 1
    return found


def run_pymemcache(root: Path) -> Outcome:
    """The integration tests, against a node of their own."""
    port = "21211"
    server = subprocess.Popen([sys.executable, HERE / "launcher.py", "-l", "127.0.0.1", "-p", port])
    try:
        _wait_for(port)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "pymemcache/test", "-m", "integration", "--server", "127.0.0.1",
             "--port", port, "-o", "addopts=", "-o", "filterwarnings=default", "-q", "-rfE",
             "--ignore", "pymemcache/test/test_compression.py", "-k", "not tls"],
            cwd=root, capture_output=True, text=True, timeout=_FILE_S, check=False,
            env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip
    finally:
        server.terminate()
        server.wait()
    output = done.stdout + done.stderr
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", output)}
    bad = counts.get("failed", 0) + counts.get("error", 0)
    return Outcome(
        counts.get("passed", 0), list(range(1, bad + 1)), counts.get("passed", 0) + bad, output=output
    )


def _wait_for(port: str) -> None:
    import socket

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(port))) == 0:
                return
        time.sleep(0.1)
    raise SystemExit("the node did not start")


# --- comparing --------------------------------------------------------------------------------


def differs(outcome: Outcome, expected: dict[str, object] | None) -> str:
    """How the outcome is other than what is written down, "" if it is not."""
    listed = expected or {}
    if expected is not None and not str(expected.get("reason", "")).strip():
        return "is listed without a reason"
    if bool(outcome.skipped) != bool(listed.get("skips")):
        return f"{outcome}, which is not what is written down"
    if outcome.ended_early != bool(listed.get("ends_early")):
        return f"{outcome}, which is not what is written down"
    fails, may_fail = _numbers(listed.get("fails", [])), _numbers(listed.get("may_fail", []))
    if listed.get("ends_early"):
        return ""
    if set(fails) - set(outcome.failed) or set(outcome.failed) - {*fails, *may_fail}:
        return f"{outcome}, but written down: {ranges(fails)}, and maybe {ranges(may_fail)}"
    return ""


def _numbers(ranges: object) -> list[int]:
    """Assertions of a list like [3, "5-8"]."""
    found: list[int] = []
    for one in ranges if isinstance(ranges, list) else []:
        low, _, high = str(one).partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


def main() -> int:
    """Run and compare; 0 if all is as written down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="files, pymemcache among them")
    parser.add_argument("--keep", type=Path, help="directory for the sources, used again if they are there")
    chosen = parser.parse_args()
    expected = tomllib.loads((HERE / "expected.toml").read_text())
    directory = chosen.keep or Path(tempfile.mkdtemp(prefix="virgo-peers-"))
    directory.mkdir(parents=True, exist_ok=True)
    try:
        return compare_all(directory, set(chosen.only), expected)
    finally:
        if chosen.keep is None:
            shutil.rmtree(directory, ignore_errors=True)


def compare_all(directory: Path, only: set[str], expected: dict[str, dict[str, object]]) -> int:
    """Run what is wanted; the count of surprises."""
    root = directory / f"memcached-{VERSION}"
    if not (root / "timedrun").exists():
        root = fetch_memcached(directory)
    surprises = passed = planned = 0
    for path in sorted((root / "t").glob("*.t")):
        if only and path.name not in only:
            continue
        listed = expected.get(path.name)
        if listed is not None and listed.get("left_out"):
            print(f"-- {path.name}: left out: {listed['reason']}", flush=True)
            continue
        began = time.monotonic()
        outcome = run_perl(root, path)
        surprises += tell(path.name, outcome, listed, time.monotonic() - began, directory)
        passed, planned = passed + outcome.passed, planned + max(outcome.planned, 0)
    print(f"memcached t/*.t: {passed} of {planned} assertions pass")
    if not only or "pymemcache" in only:
        found = list(directory.glob("pymemcache-*/pymemcache"))
        source = found[0].parent if found else fetch_pymemcache(directory)
        surprises += tell("pymemcache", run_pymemcache(source), expected.get("pymemcache"), 0, directory)
    return min(surprises, 1)


def tell(
    name: str, outcome: Outcome, listed: dict[str, object] | None, took_s: float, directory: Path
) -> int:
    """Print what became of a file; 1 if that is a surprise."""
    surprise = differs(outcome, listed)
    mark = "!!" if surprise else "ok" if not listed else "--"
    print(f"{mark} {name}: {surprise or outcome} ({took_s:.0f} s)", flush=True)
    (directory / f"{name}.log").write_text(outcome.output)
    return int(bool(surprise))


if __name__ == "__main__":
    sys.exit(main())
