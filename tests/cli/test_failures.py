"""Failures are one line, a hint and an exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from cli.conftest import Virgo
from virgo.cli import failures
from virgo.errors import NodeLost, NotRunning

COMMAND = (sys.executable, "-m", "virgo.cli")
READING = (
    ["status"], ["nodes"], ["modules"], ["doctor"], ["ls", "/"], ["cat", "/n1/x"], ["get", "1"],
    ["call", "--list"], ["call", "hostname"], ["version"], ["down"], ["malloc", "1"], ["free", "1"],
    ["token", "list"],
)  # fmt: skip


def fail_with(error: BaseException) -> None:
    raise error


def test_an_error_is_one_line_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    """A VirgoError is told on standard error in two lines, with status 1 and nothing on standard output."""
    status = failures.guarded(lambda: fail_with(NodeLost("n2 is gone", hint="Wait.")), as_json=False)
    out, err = capsys.readouterr()
    assert (status, out, err) == (1, "", "virgo: n2 is gone\nhint: Wait.\n")


def test_an_error_as_json_is_an_object_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json the failure is machine-readable too, and the lines stay where they were."""
    assert failures.guarded(lambda: fail_with(NotRunning("no", hint="yes")), as_json=True) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"code": "NOTRUNNING", "message": "no", "hint": "yes"}}
    assert err.splitlines() == ["virgo: no", "hint: yes"]


def test_messages_cannot_break_out_of_their_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Line ends and terminal commands in a message, from a file's name say, are shown and not obeyed."""
    failures.guarded(lambda: fail_with(NodeLost("a\nb\x1b[2Jc\udcff", hint="h\r\ni")), as_json=False)
    assert capsys.readouterr().err == "virgo: a b\\x1b[2Jc\\udcff\nhint: h i\n"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (typer.Exit(3), 3, ""),
        (
            FileNotFoundError(2, "No such file or directory", "/no"),
            1,
            "virgo: /no: No such file or directory\nhint: Look",
        ),
        (
            PermissionError(13, "Permission denied", "/no"),
            1,
            "virgo: /no: Permission denied\nhint: This user",
        ),
        (OSError(110, "Connection timed out"), 1, "virgo: Connection timed out\nhint: This machine"),
        (ZeroDivisionError("a defect"), 1, "virgo: ZeroDivisionError: a defect\nhint: This is a defect"),
    ],
)
def test_every_failure_has_a_status(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C is 130, what the machine refuses and our own defects are 1; none shows a traceback."""
    assert failures.guarded(lambda: fail_with(error), as_json=False) == status
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert "Traceback" not in err


def test_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """VIRGO_DEBUG=1 adds where it happened."""
    monkeypatch.setenv("VIRGO_DEBUG", "1")
    failures.guarded(lambda: fail_with(ZeroDivisionError("here")), as_json=False)
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "fail_with" in err


@pytest.mark.parametrize(
    "words",
    [["status", "--json"], ["status"], ["doctor"], ["--help"], ["get", "x", "--json"], ["version"]],
    ids=" ".join,
)
def test_a_reader_that_goes_away_is_no_error(words: list[str], tmp_path: Path) -> None:
    """`virgo ... | head -0`: status 141 as for any program that SIGPIPE ends, and not a word."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [*COMMAND, *words],
            stdout=pipe,
            stderr=subprocess.PIPE,
            env={**os.environ, "VIRGO_HOME": str(tmp_path)},
        )
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    "words",
    [["status", "--json"], ["status"], ["doctor"], ["--help"], ["get", "x", "--json"], ["ca", "init"]],
    ids=" ".join,
)
def test_output_that_cannot_be_written_is_one_line(words: list[str], tmp_path: Path) -> None:
    """On a full disk (/dev/full) the failure names standard output, once; status 1 and no traceback."""
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, *words],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "VIRGO_HOME": str(tmp_path)},
            text=True,
        )
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert lines[-2] == "virgo: standard output: No space left on device"
    assert lines[-1].startswith("hint: ")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("No space left") == 1


def test_ctrl_c_is_quiet(tmp_path: Path) -> None:
    """A command that waits for its input ends at Ctrl-C with 130 and without a traceback."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = subprocess.Popen([*COMMAND, "set", "1", f"@{fifo}"], stderr=subprocess.PIPE)
    writer = None
    while writer is None and process.poll() is None:
        try:
            writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)  # refused until the command reads
        except OSError:
            time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert writer is not None
    os.close(writer)
    assert (process.returncode, err) == (130, b"")


def test_a_wrong_command_line_is_status_2(virgo: Virgo) -> None:
    """Unknown verbs and options and missing arguments: status 2, one line, where to read on."""
    for words, said in (
        (["nodez"], "Did you mean 'nodes'?"),
        (["status", "--no-such"], "No such option"),
        (["malloc"], "Missing argument"),
        (["up", "--engines", "2"], "1, 3 or 5"),
        (["up", "--nodes", "0"], "'--nodes': 0 is not within 1 to 64."),
        (["up", "--nodes", "many"], "--nodes"),
        (["up", "--port-offset", "-5"], "'--port-offset': -5 is not within 0 to 1535."),
        (["doctor", "--port-offset", "1536"], "1536 is not within 0 to 1535."),
        (["demo", "--port-offset", "-1"], "-1 is not within 0 to 1535."),
        (["call", "--timeout", "-1", "pid"], "-1.0 is not within 0 to"),
        (["call", "--timeout", "nan", "pid"], "nan is not within 0 to"),
        (["call", "--timeout", "inf", "pid"], "inf is not within 0 to"),
        (["ca", "issue", "n2", "--node", "--days", "0"], "0 is not within 1 to 3650."),
    ):
        done = virgo(*words)
        assert (done.status, done.out) == (2, b""), words
        message, hint = done.err.splitlines()
        assert message.startswith("virgo: ")
        assert said in message
        assert hint.startswith("hint: `virgo ")
    assert virgo("malloc", "--json").json["error"]["code"] == "USAGE"


def test_numbers_that_do_not_fit_together_are_refused_before_anything_starts(
    virgo: Virgo, tmp_path: Path
) -> None:
    """An offset whose last node would have port 65536 is named with its range, whatever the verb."""
    for words in (
        ["up", "--nodes", "3", "--port-offset", "1534"],
        ["up", "--detach", "--nodes", "3", "--port-offset", "1534"],
        ["demo", "--port-offset", "1534"],
        ["systemd-unit", "--nodes", "3", "--port-offset", "1534"],
    ):
        done = virgo(*words)
        message, hint = done.err.splitlines()
        assert done.status == 1, words
        assert "(--port-offset) is 1534, but must be 0 to 1533 for 3 nodes" in message
        assert "65535" in hint
    assert not (tmp_path / "home").exists()


def test_a_bad_setting_is_named(virgo: Virgo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that cannot be read is an error of status 1 that names it; looking and stopping work."""
    monkeypatch.setenv("VIRGO_NODE_PORT_OFFSET", "plenty")
    for verb in ("status", "down"):
        assert virgo(verb).status == 0
    for verb in ("nodes", "up"):
        done = virgo(verb)
        assert done.status == 1
        assert done.err.startswith("virgo: environment variable VIRGO_NODE_PORT_OFFSET")


def test_a_home_that_cannot_be_made_is_named(virgo: Virgo, tmp_path: Path) -> None:
    """Where VIRGO_HOME cannot be, below a file for example, the error says so and what to choose."""
    (tmp_path / "file").write_text("")
    for words in (["up", "--detach"], ["up"], ["token", "create", "x", "--role", "read"], ["ca", "init"]):
        done = virgo(*words, home=tmp_path / "file" / "home")
        message, hint = done.err.splitlines()[-2:]
        assert done.status == 1, words
        assert message.startswith(f"virgo: {tmp_path / 'file' / 'home'}"), words
        assert hint.startswith("hint: "), words


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_reading_verbs_print_json_and_nothing_else(words: list[str], virgo: Virgo) -> None:
    """With --json standard output is one JSON document, also where no node runs."""
    verb, *rest = words
    at = 2 if verb == "token" else 1
    done = virgo(*words[:at], "--json", *words[at:])
    assert isinstance(done.json, (dict, list)), rest
    if done.status:
        assert done.err.startswith("virgo: ") or verb == "doctor"
