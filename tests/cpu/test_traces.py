"""What calls leave in a worker: nothing that who has it next would meet."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
from tests.conftest import RunningCloud
from tests.waiting import until

from virgo.cpu.traces import Setting

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def spoil() -> int:
    """Leave what a process can be left with, all of which can be set back."""
    os.environ["LEFT"] = "behind"
    os.environ.pop("VIRGO_NODE", None)
    os.chdir("/tmp")
    os.umask(0o777)
    os.nice(3)
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    signal.alarm(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft // 2, hard))
    sys.setrecursionlimit(200)
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - as a call may do that does not tidy up
    return os.getpid()


def seen() -> dict[str, Any]:
    return {
        "environment": {name: os.environ.get(name) for name in ("LEFT", "VIRGO_NODE")},
        "directory": str(Path.cwd()),
        "umask": os.popen("umask").read(),
        "nice": os.nice(0),
        "processors": sorted(os.sched_getaffinity(0)),
        "handler": str(signal.getsignal(signal.SIGTERM)),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "alarm": signal.getitimer(signal.ITIMER_REAL),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "recursion": sys.getrecursionlimit(),
        "stdout": os.fstat(sys.stdout.fileno()).st_rdev,
    }


def test_the_next_client_finds_a_worker_as_it_was(running: RunningCloud, options: dict[str, Any]) -> None:
    """With all that a call can set for a process, whichever way it came; nor is it killed by an alarm."""
    with running.connect() as first:
        before = first.cpu.clone(seen, **options)
        spoilt = {first.cpu.submit_to(spoil, (), {}, **options).result(30) for _ in range(4)}
    with running.connect() as second:
        pids = set()
        for _ in range(8):
            assert second.cpu.clone(seen, **options) == before
            pids.add(second.cpu.clone(os.getpid, **options))
        assert pids & spoilt, "no worker was used again, so this shows nothing"
        second.cpu.submit_to(time.sleep, (1.5,), {}, **options).result(30)


def start(seconds: float) -> int:
    return subprocess.Popen(["sleep", str(seconds)]).pid


def test_what_a_call_has_started_ends_with_it_or_its_client(
    running: RunningCloud, options: dict[str, Any]
) -> None:
    with running.connect() as client:
        pid = client.cpu.clone(start, 1000, **options)
        assert client.cpu.clone(abs, -1, **options) == 1
    until(lambda: not psutil.pid_exists(pid))


@pytest.mark.parametrize("spoilt", [True, False])
def test_a_process_that_is_as_it_was_may_go_on(spoilt: bool) -> None:
    """In a process of its own: it is set back whatever was set, and has no children."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.environ["VIRGO_NODE"] = "n1"
            setting, before = Setting(), seen()
            if spoilt:
                spoil()
            right = setting.restore() and seen() == before
            children = subprocess.Popen(["sleep", "100"])
            right = right and not setting.restore()
            children.kill()
            children.wait()
            os.write(writing, b"right" if right and setting.restore() else b"wrong")
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    assert os.read(reading, 10) == b"right"
    os.close(reading)
