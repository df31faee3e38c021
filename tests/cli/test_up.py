"""Up and down, for real, each test in a VIRGO_HOME of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import alive

from conftest import _free, stop_cloud
from virgo.kernel import ports as kernel_ports
from virgo.members import PORTS

OFFSETS = range(700, 1000, 10)


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path, for the sockets in it; whatever runs there is stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="virgo-") as directory:
        try:
            yield Path(directory)
        finally:
            stop_cloud(Path(directory))


@pytest.fixture
def offset() -> int:
    """A port offset that nobody else uses now."""
    for number in OFFSETS:
        if all(_free(port + number + index) for port in PORTS.values() for index in range(2)):
            return number
    pytest.fail(f"no offset is free; {kernel_ports.ephemeral_range()} is lent to outgoing connections")


def virgo(home: Path, *words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command as a person does."""
    done = subprocess.run(
        [sys.executable, "-m", "virgo.cli", *map(str, words)],
        env={**os.environ, "VIRGO_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    return done


def pids_of(status: dict[str, Any]) -> list[int]:
    """Processes of a cloud: nodes, engine, supervisor."""
    return [*(node["pid"] for node in status["nodes"]), status["engine"]["pid"], status["up"]]


def test_up_status_down(home: Path, offset: int) -> None:
    """`up --detach` returns when all serve, a second one is refused, `down` ends these processes only."""
    with subprocess.Popen(["sleep", "60"], env={**os.environ, "VIRGO_HOME": str(home)}) as bystander:
        started = virgo(home, "up", "--nodes", 2, "--detach", "--port-offset", offset, "--json")
        status = json.loads(started.stdout)
        assert started.stderr == ""
        assert status == {**json.loads(virgo(home, "status", "--json").stdout), "nodes": status["nodes"]}
        assert [(node["name"], node["state"]) for node in status["nodes"]] == [("n1", "up"), ("n2", "up")]
        for index, node in enumerate(status["nodes"]):
            assert node["ports"] == {name: port + offset + index for name, port in PORTS.items()}
        processes = pids_of(status)
        assert all(map(alive, processes))

        refused = virgo(home, "up", "--detach", status=1)
        assert refused.stderr.startswith(f"virgo: a cloud is up under {home} already\nhint: ")
        assert all(map(alive, processes))

        assert virgo(home, "down").stdout == "Stopped n1, n2, engine-1.\n"
        assert not any(map(alive, processes))
        assert json.loads(virgo(home, "status", "--json").stdout)["nodes"] == []
        assert bystander.poll() is None
        bystander.terminate()


def test_up_in_front_runs_until_ctrl_c(home: Path, offset: int) -> None:
    """In front, it prints the status when the nodes serve, runs on, and stops all of it at Ctrl-C."""
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "virgo.cli",
            "up",
            "--name",
            "solo",
            "--port-offset",
            str(offset),
            "--home",
            home,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        shown = []
        for line in process.stdout:
            shown.append(line)
            if "virgo doctor" in line:
                break
        assert any(line.startswith("solo") and " up " in line for line in shown)
        status = json.loads(virgo(home, "status", "--json").stdout)
        assert status["up"] == process.pid
        assert all(map(alive, pids_of(status)))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert err.splitlines()[0] == "starting the engine"
    assert err.splitlines()[-1] == "stopped"
    assert not any(map(alive, pids_of(status)))


def test_a_taken_port_is_named(home: Path, offset: int) -> None:
    """`up` on a port that is held fails with its holder and the remedy, and leaves nothing running."""
    with socket.create_server(("127.0.0.1", PORTS["memory"] + offset)):
        failed = virgo(home, "up", "--detach", "--port-offset", offset, status=1)
    message, hint = failed.stderr.splitlines()[-2:]
    assert f"port {PORTS['memory'] + offset}" in message
    assert f"(pid {os.getpid()}" in message
    assert "--port-offset" in hint
    assert json.loads(virgo(home, "status", "--json").stdout)["nodes"] == []


@pytest.mark.parametrize("how", [("--detach",), ()], ids=["detached", "in front"])
def test_an_export_that_is_not_there_is_named(home: Path, how: tuple[str, ...]) -> None:
    """`up` with an export whose directory is absent says which and what to do, before anything runs."""
    (home / "virgo.toml").write_text('[files]\nexports = { data = "/no/such/place" }\n')
    failed = virgo(home, "up", *how, status=1)
    message, hint = failed.stderr.splitlines()[-2:]
    assert message == "virgo: files.exports: data = '/no/such/place', but /no/such/place is not there"
    assert hint.startswith("hint: Make or mount the directory")
    assert json.loads(virgo(home, "status", "--json").stdout)["nodes"] == []
    assert not (home / "engine").exists()


@pytest.mark.parametrize("spare", [0, 16, 64])
@pytest.mark.parametrize("how", [("--detach",), ()], ids=["detached", "in front"])
def test_a_full_disk_is_named(tmp_path: Path, how: tuple[str, ...], spare: int) -> None:
    """`up` where nothing is free, or too little to get far, says so, although it cannot write a log."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], check=True)
    try:
        (tmp_path / "home").mkdir(mode=0o700)
        with pytest.raises(OSError, match="No space left"), (tmp_path / "filler").open("wb", 0) as filler:
            while True:
                filler.write(bytes(4096))
        os.truncate(tmp_path / "filler", (tmp_path / "filler").stat().st_size - spare * 1024)
        failed = virgo(tmp_path / "home", "up", *how, status=1)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
    message, hint = failed.stderr.splitlines()[-2:]
    assert "is full" in message
    assert hint.startswith("hint: Make room")


def test_a_program_that_is_not_there_is_named(home: Path) -> None:
    """`up` with an allowed program that cannot be executed says which, before anything runs."""
    (home / "virgo.toml").write_text('[cpu]\nprograms = { none = ["/no/such/program"] }\n')
    failed = virgo(home, "up", "--detach", status=1)
    assert "cpu.programs: 'none'" in failed.stderr
    assert not (home / "engine").exists()


def test_ctrl_c_while_a_cloud_starts_leaves_nothing(home: Path, offset: int) -> None:
    """Who interrupts `up --detach` before it returns has no cloud afterwards."""
    words = [sys.executable, "-m", "virgo.cli", "up", "--nodes", "2", "-d", "--port-offset", str(offset)]
    with subprocess.Popen(words, env={**os.environ, "VIRGO_HOME": str(home)}) as starting:
        record = home / "run" / "up.json"
        while not record.exists():
            assert starting.poll() is None
            time.sleep(0.01)
        pid = json.loads(record.read_bytes())["process"]["pid"]
        starting.send_signal(signal.SIGINT)
        assert starting.wait(30) == 130
    assert not alive(pid)
    assert json.loads(virgo(home, "status", "--json").stdout)["nodes"] == []


def test_nothing_outlives_its_home(home: Path, offset: int) -> None:
    """A cloud whose VIRGO_HOME was removed ends, for nobody could find it any more."""
    started = virgo(home, "up", "--detach", "--port-offset", offset, "--json")
    processes = pids_of(json.loads(started.stdout))
    shutil.rmtree(home)
    deadline = time.monotonic() + 30
    while any(map(alive, processes)):
        assert time.monotonic() < deadline, [pid for pid in processes if alive(pid)]
        time.sleep(0.05)
    home.mkdir()


def test_down_leaves_the_node_of_a_program(home: Path) -> None:
    """What `virgo.connect()` started for a program is not what `up` started: `down` says whose it is."""
    program = (
        "import virgo, sys\ncloud = virgo.connect()\nsys.stdin.read()\nprint(cloud.cpu.clone(pow, 2, 3))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "VIRGO_HOME": str(home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        while not (home / "run" / "n1.json").exists():
            assert running.poll() is None
            time.sleep(0.02)
        left = virgo(home, "down")
        assert f"pid {running.pid}" in left.stderr
        assert running.communicate("", timeout=30)[0] == "8\n"
