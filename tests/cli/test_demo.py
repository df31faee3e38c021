"""The tour: what it shows holds, it notices what does not, and it leaves nothing behind however it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from rich.console import Console

from virgo.cli import demo, tour_words
from virgo.cli.tour_show import CheckFailed, Show
from virgo.limits import NODE_LOST_S
from virgo.members import PORTS


def _processes(directory: Path) -> list[int]:
    """Living processes whose VIRGO_HOME is below the directory."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if any(item.startswith(f"VIRGO_HOME={directory}/".encode()) for item in environment):
            found.append(int(entry.name))
    return found


def _await(condition: Callable[[], bool], limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def _touring(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`virgo demo` as a process whose temporary directory is `directory`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VIRGO_")}
    environment |= {"TMPDIR": str(directory), "PYTHONUNBUFFERED": "1", "VIRGO_NODE_BIND": "0.0.0.0"}
    with subprocess.Popen(
        [sys.executable, "-m", "virgo.cli", "demo", *arguments],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a path short enough for Unix sockets."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="vt-") as directory:
        yield Path(directory)


def _read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came; but {''.join(lines)}")


def test_tour_holds_all_its_claims_and_leaves_nothing(temporary: Path) -> None:
    """The whole tour succeeds, its JSON has the measured figures, and no process or file is left."""
    with _touring(temporary, "--json") as process:
        output, lines = process.communicate(timeout=100)
    assert process.returncode == 0, lines
    figures = json.loads(output)
    assert figures["ok"]
    assert len(figures["checks"]) >= 20
    assert set(figures["words"]["calls_by_node"]) == {"n1", "n2", "n3"}
    assert figures["words"]["bytes"] > 5e6
    assert all(size > 0 for size in figures["memory"]["large"]["bytes_by_node"].values())
    assert figures["loss"]["named_s"] <= NODE_LOST_S
    assert figures["loss"]["calls_lost"] < figures["loss"]["calls"]
    assert figures["loss"]["reads_refused"].keys() == {"n2"}
    assert "5. Loss" in lines
    assert "\x1b" not in lines, "a pipe gets plain lines"
    assert not _processes(temporary)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("line", "number"),
    [("1. Three nodes start", signal.SIGINT), ("2. Processors", signal.SIGTERM)],
    ids=["Ctrl-C while it starts", "SIGTERM while it counts"],
)
def test_interrupted_tour_leaves_nothing(temporary: Path, line: str, number: signal.Signals) -> None:
    """Interrupted at any point, it ends with status 130, no process and no file."""
    with _touring(temporary) as process:
        _read_until(process, line)
        _await(lambda: bool(_processes(temporary)))
        process.send_signal(number)
        output, lines = process.communicate(timeout=60)
        assert process.returncode == 130, lines
        assert "Interrupted" in output
        assert "Traceback" not in lines
    assert not _processes(temporary)
    assert not list(temporary.iterdir())


def test_nodes_end_when_the_tour_is_killed(temporary: Path) -> None:
    """kill -9 of the tour itself ends its nodes and engine, too."""
    with _touring(temporary) as process:
        _read_until(process, "2. Processors")
        assert len(_processes(temporary)) > 3
        process.kill()
        process.wait()
        _await(lambda: not _processes(temporary))


def test_a_claim_that_does_not_hold_ends_the_tour(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed check is named, nothing after it is claimed, and the status is 1."""

    def tour(_home: Any, _offset: int, show: Show, _figures: dict[str, Any]) -> None:
        show.check("two and two are four", 2 + 2 == 4)
        show.check("two and two are five", 2 + 2 == 5, otherwise="it is 4")
        show.check("never said", True)

    monkeypatch.setattr(demo, "_tour", tour)
    assert demo.run(home=None, port_offset=0, json_output=True) == 1
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert not figures["ok"]
    assert figures["checks"] == ["two and two are four"]
    assert "two and two are five: this does not hold, it is 4." in figures["failure"]
    assert "FAILED" in captured.err


def test_taken_ports_are_left_alone() -> None:
    """If one of the default ports is taken, the tour looks elsewhere."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", PORTS["memory"] + 1))
            taken.listen()
        except OSError:
            pass  # somebody else has it: as good
        offset = next(demo._free_offsets())
        assert offset > 0
        assert offset + PORTS["analytics"] + 2 <= 65_535


def test_a_directory_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tour does not move into a VIRGO_HOME with something in it."""
    (tmp_path / "virgo.toml").touch()
    assert demo.run(home=tmp_path, port_offset=0, json_output=True) == 1
    assert "is not empty" in json.loads(capsys.readouterr().out)["failure"]
    assert [path.name for path in tmp_path.iterdir()] == ["virgo.toml"]


def test_user_settings_stay_out_and_come_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Within the tour no VIRGO variable of the user is seen; after it they are as they were."""
    monkeypatch.setenv("VIRGO_ENGINE_URL", "nats://production:4222")
    before = dict(os.environ)
    with demo._own_environment(tmp_path):
        seen = {name for name in os.environ if name.startswith("VIRGO_")}
        assert seen == {"VIRGO_HOME", "VIRGO_CONFIG"}
        assert os.environ["VIRGO_HOME"] == str(tmp_path)
    assert dict(os.environ) == before


def test_library_is_read_whole() -> None:
    """The batches hold every source file once, and none is much larger than the others."""
    library = tour_words.read_library()
    texts = [text for batch in library.batches for text in batch]
    assert len(texts) == library.files > 500
    assert sum(map(len, texts)) == library.size_bytes
    assert (library.directory / "argparse.py").read_bytes() in texts
    assert len(library.batches) > 10


def test_counting_function_needs_nothing_of_the_package(tmp_path: Path) -> None:
    """A node that has never heard of the tour can count: the function travels by value."""
    code = (
        "import pickle, sys; print(pickle.load(sys.stdin.buffer)([b'a b_1 a', b'a']), *sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=cloudpickle.dumps(tour_words.word_counter()), env={"VIRGO_NODE": "n7"}, cwd=tmp_path,
        capture_output=True, check=True,
    )  # fmt: skip
    result, *modules = done.stdout.decode().rsplit(") ", 1)
    assert result + ")" == "('n7', {b'a': 3, b'b_1': 1})"
    assert "virgo.cli" not in modules[0].split()
    assert tour_words.merged([{b"a": 1}, {b"a": 2, b"b": 1}]) == Counter({b"a": 3, b"b": 1})


def test_pipes_get_plain_lines() -> None:
    """Without a terminal there are no escape codes, no bars that move, and no blanks at line ends."""
    console = Console(record=True, force_terminal=False, width=60)
    show = Show(console)
    with show.step("Title"), show.progress("working", 3) as done:
        done(2)
        show.check("it holds", True)
        show.table(("node", "calls"), [("n1", 1234), ("n22", 5)])
    with pytest.raises(CheckFailed):
        show.check("it does not", False)
    text = console.export_text()
    assert "1. Title" in text
    assert "   n1    1,234\n   n22       5\n" in text
    assert "working" not in text
    assert not any(line.endswith(" ") for line in text.splitlines())
