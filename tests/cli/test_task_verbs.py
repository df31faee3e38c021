"""`virgo ps` and `virgo logs`, for people and for scripts."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import cloudpickle
import pytest

from cli.conftest import Ran, Virgo, beside
from conftest import RunningCloud

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def on(virgo: Virgo, cloud3: RunningCloud) -> Virgo:
    """`virgo`, in the home of the three-node cloud; a failure that was not expected fails the test."""

    def run(*words: object, status: int = 0, **options: object) -> Ran:
        done = partial(virgo, home=cloud3.home)(*words, **options)
        assert done.status == status, done.err
        return done

    return run


def count_to(path: str, number: int) -> None:
    for step in range(number):
        print("step", step)
        while not Path(f"{path}{step}").exists():
            time.sleep(0.01)


def test_what_runs_is_shown_and_what_it_writes(on: Virgo, cloud3: RunningCloud, tmp_path: Path) -> None:
    """With its id the output can be read, and followed to its end."""
    with cloud3.connect("n2") as cloud:
        future = cloud.cpu.submit_to(count_to, (str(tmp_path / "go"), 2), node="n2")
        deadline = time.monotonic() + 20
        while not (tasks := [one for one in on("ps", "--json").json if one["label"] == "count_to"]):
            assert time.monotonic() < deadline
        (task,) = tasks
        assert (task["node"], task["state"], task["cpus"]) == ("n2", "running", 1)
        shown = on("ps").text
        assert all(word in shown for word in ("TASK", "WHAT", task["task"], "count_to", "running"))
        while on("logs", task["task"]).text != "step 0\n":
            assert time.monotonic() < deadline
        followed = beside(cloud3.home, "logs", "-f", task["task"])
        for step in range(2):
            (tmp_path / f"go{step}").touch()
            time.sleep(0.3)
        assert future.result(20) is None
        assert followed.communicate(timeout=20)[0] == b"step 0\nstep 1\n"
        found = on("logs", "--json", task["task"]).json
        assert found["output"] == "step 0\nstep 1\n" and found["ended"] and found["node"] == "n2"
        assert "leased" in on("ps", "--all").text


def test_a_call_that_wrote_nothing_is_said(on: Virgo) -> None:
    """With what to do; and a cloud that does nothing says so."""
    assert "virgo ps" in on("logs", "nonsense", status=1).err
    assert "Nothing runs" in on("ps").text or "TASK" in on("ps").text
