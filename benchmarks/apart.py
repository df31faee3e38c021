"""One contender in a process of its own: `python -m benchmarks.apart ENTRY CONTENDER RESULT [--quick]`.

So no contender inherits another's threads, heap or imports. `run_apart` is the side of the harness: it
waits in bounded time, and ends what is left of the process's group if it failed. Servers are children of
that process in that group, or (our cloud) end with it by themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Broken, Contender, Entry, Figures

ROOT = Path(__file__).resolve().parent.parent
_STOP_S = 30.0
_TAIL_LINES = 40


def run_apart(entry: Entry, contender: Contender, *, quick: bool) -> Figures:
    """Start, measure and stop a contender elsewhere. Raises Broken, with the end of what it printed."""
    # Short, since Unix sockets have short paths. The servers' directories lie below, so none is left behind.
    with tempfile.TemporaryDirectory(prefix="vb-", ignore_cleanup_errors=True) as directory:
        result, output = Path(directory) / "result.json", Path(directory) / "output"
        command = [sys.executable, "-m", "benchmarks.apart", entry.name, contender.name, str(result)]
        with output.open("wb") as stream:
            process = subprocess.Popen(
                [*command, *(["--quick"] if quick else [])],
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TMPDIR": directory},
                start_new_session=True,
            )  # fmt: skip
        try:
            late = not _ended(process.pid, entry.time_s_max)
        finally:
            status = _finish(process)
        if late or status or not result.exists():
            tail = "\n".join(output.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
            reason = f"did not end within {entry.time_s_max:g} s" if late else f"ended with status {status}"
            raise Broken(f"{entry.name}: {contender.name} {reason}\n{tail}")
        figures: Figures = json.loads(result.read_text())
        return figures


def _ended(pid: int, time_s: float) -> bool:
    """Wait for the end of a child without reaping it, so that its group's id stays ours."""
    deadline = time.monotonic() + time_s
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _finish(process: subprocess.Popen[bytes]) -> int:
    """Stop the process if it runs, gently first; then what is left of its group. Returns its status."""
    if not _ended(process.pid, 0):
        process.terminate()
        _ended(process.pid, _STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def measure(contender: Contender) -> Figures:
    """Start, measure, stop: in this process."""
    try:
        contender.start()
        return contender.measure()
    finally:
        contender.stop()


def main(arguments: list[str]) -> int:
    """Entry of the process."""
    from benchmarks.entries import ENTRIES

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    entry_name, contender_name, result, *options = arguments
    contenders = ENTRIES[entry_name].contenders("--quick" in options)
    contender = next(one for one in contenders if one.name == contender_name)
    Path(result).write_text(json.dumps(measure(contender)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
