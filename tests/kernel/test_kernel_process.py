"""Processes by pid and start time: signals reach the one that is meant, or nobody."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from virgo.errors import BadArgument, DeadlineExceeded, Denied, NotRunning
from virgo.kernel import process
from virgo.kernel.process import ProcessMark, terminate

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); input()"
PLAIN = "print(1, flush=True); input()"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[str]]:
    """A process that waits to be ended."""
    yield from started(PLAIN)


@pytest.fixture
def stubborn() -> Iterator[subprocess.Popen[str]]:
    """A process that ignores SIGTERM."""
    yield from started(STUBBORN)


def started(code: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child
        child.kill()


def test_a_mark_survives_being_written_down(sleeper: subprocess.Popen[str]) -> None:
    """The mark of a process, through JSON, still means that process."""
    mark = ProcessMark.from_json(json.loads(json.dumps(ProcessMark.of(sleeper.pid).to_json())))
    assert mark == ProcessMark.of(sleeper.pid)
    assert mark.alive()
    assert mark.signal(signal.SIGKILL)
    sleeper.wait()
    assert not mark.alive()


def test_a_recycled_pid_is_not_signalled(sleeper: subprocess.Popen[str]) -> None:
    """A mark with the pid of a living process but another start is gone, and nothing reaches the process."""
    stranger = dataclasses.replace(ProcessMark.of(sleeper.pid), started="0:0")
    assert not stranger.alive()
    assert not stranger.signal(signal.SIGKILL)
    assert terminate(stranger, 1) == "gone"
    assert sleeper.poll() is None


def test_the_start_is_the_kernels(sleeper: subprocess.Popen[str]) -> None:
    """Two processes that were started one after the other differ in their start, and a mark is stable."""
    first = ProcessMark.of(sleeper.pid)
    time.sleep(0.03)  # a clock tick or more
    with subprocess.Popen(["sleep", "60"]) as second:
        assert ProcessMark.of(second.pid).started != first.started
        second.kill()
    assert ProcessMark.of(sleeper.pid) == first


def test_an_unreaped_process_is_dead() -> None:
    """A zombie is not alive: there is nothing left to signal or wait for."""
    child = subprocess.Popen(["sleep", "60"])
    mark = ProcessMark.of(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not mark.alive()
    with pytest.raises(NotRunning):
        ProcessMark.of(child.pid)
    assert terminate(mark, 1) == "gone"
    child.wait()


def test_odd_names_do_not_disturb(tmp_path: Path) -> None:
    """A program whose name holds parentheses and blanks is read all the same."""
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as child:
        mark = ProcessMark.of(child.pid)
        assert mark.alive()
        assert terminate(mark, 5) == "terminated"


def test_terminate_asks_first_and_then_kills(
    sleeper: subprocess.Popen[str], stubborn: subprocess.Popen[str]
) -> None:
    """SIGTERM ends what listens to it; what does not is killed after the grace, and both are said."""
    assert terminate(ProcessMark.of(sleeper.pid), 5) == "terminated"
    assert sleeper.wait() == -signal.SIGTERM
    began = time.monotonic()
    assert terminate(ProcessMark.of(stubborn.pid), 0.2) == "killed"
    assert 0.2 <= time.monotonic() - began < 5
    assert stubborn.wait() == -signal.SIGKILL


def test_what_does_not_even_take_sigkill_is_an_error(
    stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that stays is DeadlineExceeded and not a wait without end."""
    monkeypatch.setattr(process, "PROCESS_KILL_S", 0.05)
    monkeypatch.setattr(process, "_send", lambda *_arguments: True)
    with pytest.raises(DeadlineExceeded, match="did not end"):
        terminate(ProcessMark.of(stubborn.pid), 0.05)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to be someone else")
def test_a_process_of_another_user_is_denied(sleeper: subprocess.Popen[str]) -> None:
    """Without the right to signal it, the answer is Denied and not `gone`."""
    mark = ProcessMark.of(sleeper.pid)
    child = os.fork()
    if child == 0:
        os.setuid(54_321)
        try:
            mark.signal(signal.SIGTERM)
        except Denied:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert sleeper.poll() is None


@pytest.mark.parametrize(
    "value", [None, [], {}, {"pid": "1", "started": "x"}, {"pid": 1}, {"pid": True, "started": "x"}, "1"]
)
def test_what_is_no_mark_is_refused(value: object) -> None:
    """A spoilt record is BadArgument."""
    with pytest.raises(BadArgument):
        ProcessMark.from_json(value)


@pytest.mark.parametrize("pid", [0, -1, 2**31, 2**70])
def test_impossible_pids_are_nobody(pid: int) -> None:
    """A pid that cannot be is not running; above all 0 and -1 do not mean everyone."""
    mark = ProcessMark(pid, "x:1")
    assert not mark.alive()
    assert not mark.signal(0)
    assert terminate(mark, 0) == "gone"
