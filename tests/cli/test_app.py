"""The verbs together: help, options that all have, start-up, completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.conftest import Virgo
from conftest import RunningCloud
from virgo._version import __version__
from virgo.cli import data, render
from virgo.cli.up import as_environment, node_names
from virgo.errors import BadArgument

CLOUD = ("up", "down", "status", "nodes", "modules")
WORK = ("call", "malloc", "set", "get", "free", "ls", "cat", "put", "rm", "cp", "tree", "stat", "df")
WORK = (*WORK, "mount", "umount", "mounts")
CARE = ("doctor", "demo", "version", "systemd-unit", "ca", "token")
VERBS = (*CLOUD, *WORK, *CARE)


def test_help_lists_every_verb_whole(virgo: Virgo) -> None:
    """`virgo` and `virgo --help` list all verbs, each with a sentence that is not cut off."""
    done = virgo("--help")
    assert done.status == 0
    assert virgo().out == done.out
    listed = {line.split()[0]: line for line in done.text.splitlines() if line.startswith("  ")}
    assert set(VERBS) <= set(listed)
    assert not [verb for verb in VERBS if listed[verb].endswith("...")]
    for verb in VERBS:
        assert virgo(verb, "--help").status == 0, verb


def test_help_imports_nothing_heavy() -> None:
    """Start-up stays quick: help needs no TLS tools, engine, tables or event loop."""
    heavy = ["asyncio", "cryptography", "nats", "psutil", "rich", "lmdb", "cloudpickle", "uvloop"]
    program = (
        "import sys\nfrom virgo.cli.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as done:\n    assert not done.code\n"
        f"loaded = [name for name in {heavy} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_version(virgo: Virgo) -> None:
    """--version, `version` and its JSON agree."""
    assert virgo("--version").text == virgo("version").text == f"virgo {__version__}\n"
    assert virgo("version", "--json").json["virgo"] == __version__


def test_home_can_be_given_before_and_behind_the_verb(virgo: Virgo, tmp_path: Path) -> None:
    """--home DIR beats VIRGO_HOME in both places, for groups of verbs too."""
    other = tmp_path / "other"
    assert virgo("--home", other, "status", "--json").json["home"] == str(other)
    assert virgo("status", "--home", other, "--json").json["home"] == str(other)
    assert virgo("--home", other, "token", "create", "ci", "--role", "read").status == 0
    assert [one["name"] for one in virgo("--home", other, "token", "list", "--json").json] == ["ci"]
    assert virgo("token", "list", "--json").json == []


def test_nothing_runs_is_no_error(virgo: Virgo, tmp_path: Path) -> None:
    """`status` says so with a hint, and in JSON with an empty list; `down` has nothing to do."""
    done = virgo("status")
    assert (done.status, done.text) == (0, f"Nothing runs under {tmp_path / 'home'}.\n")
    assert done.err == "hint: `virgo up` starts a node.\n"
    shown = virgo("status", "--json").json
    assert shown["nodes"] == []
    assert set(shown["engine"]) == {"url", "pid"}
    done = virgo("down", "--json")
    assert (done.status, done.json["stopped"]) == (0, [])


def test_options_of_up_become_variables() -> None:
    """Only what was given is passed on; lists as JSON; names are checked."""
    assert as_environment() == {}
    assert as_environment(port_offset=7, bind="", advertise="a", join=["h:1"], unsafe_engine=True) == {
        "VIRGO_NODE_PORT_OFFSET": "7",
        "VIRGO_NODE_BIND": "",
        "VIRGO_NODE_ADVERTISE": "a",
        "VIRGO_NODE_JOIN": '["h:1"]',
        "VIRGO_ENGINE_UNSAFE": "true",
    }
    assert node_names(3, "", joining=False) == ["n1", "n2", "n3"]
    assert node_names(1, "lab", joining=False) == ["lab"]
    assert node_names(2, "lab", joining=True) == ["lab-1", "lab-2"]
    assert node_names(1, "", joining=True)[0] not in ("", "n1")
    with pytest.raises(BadArgument, match="cannot be a node's name"):
        node_names(1, "../x", joining=False)


def test_sizes_and_ids() -> None:
    """Sizes with binary units, ids decimal or hexadecimal; anything else is refused by name."""
    sizes = {"100": 100, "64KiB": 65536, "2k": 2048, "1 MiB": 1 << 20, "1G": 1 << 30, "3b": 3}
    assert {text: data.parse_size(text) for text in sizes} == sizes
    assert data.parse_id("0x10") == data.parse_id("16") == 16
    for text in ("", "x", "1.5", "1KiBB", "KiB", "²"):
        with pytest.raises(BadArgument):
            data.parse_size(text)
    with pytest.raises(BadArgument, match="ID must be an integer"):
        data.parse_id("n1")


def test_figures_for_people() -> None:
    """Sizes and times with three figures at most; a dump shows bytes and text."""
    shown = [render.size(count) for count in (0, 1023, 1024, 1288490189, 150 << 20, 1 << 70)]
    assert shown == ["0 B", "1023 B", "1.0 KiB", "1.2 GiB", "150 MiB", "1024 EiB"]
    assert [render.duration(time) for time in (-1, 59, 200, 9000, 1e6)] == [
        "0 s", "59 s", "3 min", "2 h", "12 d",
    ]  # fmt: skip
    assert render.count(1, "node") == "1 node"
    assert data.dump(b"ab\x00" + bytes(14))[0].startswith("00000000  61 62 00 00")
    assert data.dump(b"ab\x00" + bytes(14))[0].endswith(" ab..............")


def test_the_unit_runs_up_with_the_options(virgo: Virgo, tmp_path: Path) -> None:
    """systemd-unit prints the unit alone on standard output; its command is an absolute path."""
    done = virgo("systemd-unit", "--user", "virgo", "--nodes", 2, "--join", "a", "--bind", "10.0.0.2")
    (command,) = [line for line in done.text.splitlines() if line.startswith("ExecStart=")]
    assert command.startswith("ExecStart=/")
    assert command.endswith(" up --nodes 2 --bind 10.0.0.2 --join a")
    assert f"Environment=VIRGO_HOME={tmp_path / 'home'}" in done.text
    assert "User=virgo" in done.text
    assert "systemctl" in done.err


def complete(words: str, home: Path) -> list[str]:
    """What bash would offer behind these words."""
    variables = {
        "_VIRGO_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "VIRGO_HOME": str(home),
    }
    done = subprocess.run(
        [sys.executable, "-m", "virgo.cli"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout.split()


def test_the_shell_completes_verbs_and_is_silent_without_a_cloud(tmp_path: Path) -> None:
    """Verbs are completed; where names would come from a cloud that does not run, there are none."""
    assert complete("virgo stat", tmp_path) == ["status", "stat"]
    assert complete("virgo ca i", tmp_path) == ["init", "issue"]
    assert complete("virgo modules --node ", tmp_path) == []


def test_the_shell_completes_names_of_the_cloud(cloud3: RunningCloud) -> None:
    """Names of nodes and of exported functions, and paths, come from the running cloud."""
    assert complete("virgo malloc 1 --node ", cloud3.home) == ["n1", "n2", "n3"]
    assert "wordcount" in complete("virgo call word", cloud3.home)
    assert complete("virgo ls /n", cloud3.home) == ["/n1", "/n2", "/n3"]


def test_the_command_can_be_interrupted_from_the_start() -> None:
    """What is imported before Ctrl-C is looked after is next to nothing."""
    program = "import sys, virgo.cli\nassert not {'typer', 'msgspec', 'ssl', 'asyncio'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_a_table_must_not_cut_is_kept_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal that is too narrow a number is never shown without its last digits."""
    monkeypatch.setattr(render, "_PIPED_WIDTH_CHARS", 20)
    render.table(
        ("NODE", "PID", "WHAT"), [("n1", 123456, "some longer text"), ("n2", 7, "-")], wrap=("WHAT",)
    )
    lines = capsys.readouterr().out.splitlines()
    assert any("123456" in line for line in lines)
    assert " ".join(" ".join(lines).split()).startswith("NODE PID WHAT")
