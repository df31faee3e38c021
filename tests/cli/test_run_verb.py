"""`virgo run`: commands on nodes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cli.conftest import Virgo, beside
from conftest import RunningCloud
from virgo.cpu.command import Command
from virgo.errors import BadArgument


def test_a_command_runs_where_it_is_told(on: Virgo) -> None:
    """Its words are its own, its output and status come back."""
    for node in ("n1", "n3"):
        assert (
            on("run", "--on", node, "--", "sh", "-c", "echo $VIRGO_NODE; exit 7", status=7).text
            == f"{node}\n"
        )
    assert on("run", "--on", "best", "echo", "-n", "--on", "n2").text == "--on n2"
    assert on("run", "true").text == ""
    found = on(
        "run", "--json", "--on", "n2", "--", "sh", "-c", "echo out; echo err >&2; kill -9 $$", status=137
    ).json
    assert (found["node"], found["status"], found["output"]) == ("n2", 137, "out\nerr\n")
    assert on("run", "--directory", "/usr", "--", "pwd").text == "/usr\n"


def test_long_output_comes_whole_and_as_it_is_written(
    on: Virgo, cloud3: RunningCloud, tmp_path: Path
) -> None:
    """A line is seen while the command goes on."""
    assert on("run", "--", "seq", "100000").text == "".join(f"{number}\n" for number in range(1, 100_001))
    script = f"echo first; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; echo last"
    process = beside(cloud3.home, "run", "--", "sh", "-c", script)
    deadline = time.monotonic() + 20
    while not (tasks := [one for one in on("ps", "--json").json if one["label"].startswith("sh -c")]):
        assert time.monotonic() < deadline
    while on("logs", tasks[0]["task"]).text != "first\n":
        assert time.monotonic() < deadline
    (tmp_path / "go").touch()
    assert process.communicate(timeout=20)[0] == b"first\nlast\n"
    assert process.returncode == 0


def test_limits_stop_a_command(on: Virgo) -> None:
    """Time, memory, and what no node has."""
    began = time.monotonic()
    assert "deadline" in on("run", "--timeout", 0.5, "--", "sleep", 60, status=1).err
    assert time.monotonic() - began < 15
    on("run", "--memory", "64MiB", "--", "python3", "-c", "bytearray(200 << 20)", status=1)
    on("run", "--memory", "300MiB", "--", "python3", "-c", "bytearray(200 << 20)")
    assert "which no node" in on("run", "--gpus", 60, "--", "true", status=1).err


def test_what_cannot_be_started_is_said(on: Virgo) -> None:
    """With where, and what to do."""
    assert (
        "no-such-program cannot be started on node n2"
        in on("run", "--on", "n2", "no-such-program", status=1).err
    )
    assert "directory" in on("run", "--directory", "/nowhere", "--", "true", status=1).err
    assert "COMMAND" in on("run", status=2).err
    assert on("run", "--on", "nowhere", "true", status=1).err
    for wrong in ([], ["a\0b"]):
        with pytest.raises(BadArgument):
            Command(wrong)
