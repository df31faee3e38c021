"""`virgo ps` and `virgo logs`, for people and for scripts."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import cloudpickle
import pytest

from cli.conftest import Virgo, beside
from conftest import RunningCloud
from virgo import context as contexts
from virgo.errors import CallFailed

cloudpickle.register_pickle_by_value(sys.modules[__name__])


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
        assert followed.stdout is not None
        for step in range(2):
            assert followed.stdout.readline() == f"step {step}\n".encode()
            (tmp_path / f"go{step}").touch()
        assert future.result(20) is None
        assert followed.communicate(timeout=20)[0] == b""
        found = on("logs", "--json", task["task"]).json
        assert found["output"] == "step 0\nstep 1\n" and found["ended"] and found["node"] == "n2"
        assert "leased" in on("ps", "--all").text


def test_a_call_is_killed_by_its_id(on: Virgo, cloud3: RunningCloud, tmp_path: Path) -> None:
    """Its caller is told; an id that is none is refused, with where ids are to be found."""
    with cloud3.connect("n1") as cloud:
        future = cloud.cpu.submit_to(count_to, (str(tmp_path / "never"), 1), node="n3")
        deadline = time.monotonic() + 20
        while not (tasks := [one for one in on("ps", "--json").json if one["label"] == "count_to"]):
            assert time.monotonic() < deadline
        assert "is dead" in on("kill", tasks[0]["task"]).text
        with pytest.raises(CallFailed, match="cancelled by"):
            future.result(20)
    assert "virgo ps" in on("kill", tasks[0]["task"], status=1).err


def test_a_call_that_wrote_nothing_is_said(on: Virgo) -> None:
    """With what to do; and a cloud that does nothing says so."""
    assert "virgo ps" in on("logs", "nonsense", status=1).err
    assert "Nothing runs" in on("ps").text or "TASK" in on("ps").text


def test_long_output_is_shown_whole_and_without_a_word_of_what_is_not_kept(
    on: Virgo, cloud3: RunningCloud
) -> None:
    """All of it was kept, though it is read in parts."""

    def much() -> str:
        print("x" * 600_000)
        current = contexts.current()
        assert current is not None
        return current.id

    with cloud3.connect("n1") as cloud:
        shown = on("logs", cloud.cpu.clone(much))
    assert shown.text == "x" * 600_000 + "\n" and shown.err == ""
