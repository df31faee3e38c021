"""The verbs against three real nodes."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.conftest import Virgo
from conftest import RunningCloud
from virgo.limits import FILE_IO_BYTES_MAX
from virgo.members import PORTS, node_of

BINARY = bytes(range(256)) + b"\r\n\x1b[2J"


def test_status_nodes_and_modules(on: Virgo) -> None:
    """They show the same three nodes, for scripts and for people, without colours in a pipe."""
    status = on("status", "--json").json
    assert [(node["name"], node["state"]) for node in status["nodes"]] == [
        ("n1", "up"), ("n2", "up"), ("n3", "up"),
    ]  # fmt: skip
    assert all(set(PORTS) == set(node["ports"]) for node in status["nodes"])
    assert status["engine"]["pid"] > 0
    shown = on("status").text
    assert shown.startswith("3 nodes up, ")
    assert status["engine"]["url"] in shown
    assert "\x1b" not in shown
    listed = on("nodes", "--json").json
    assert {node["id"] for node in listed} == {node["id"] for node in status["nodes"]}
    assert f"memory:{status['nodes'][1]['ports']['memory']}" in on("nodes").text
    for words in (["modules"], ["modules", "--node", "n3"]):
        names = [one["name"] for one in on(*words, "--json").json]
        assert {"memory", "cpu", "files"} <= set(names)
    assert "memory" in on("modules").text
    assert on("modules", "--node", "n9", status=1).err.splitlines()[1] == "hint: The nodes are: n1, n2, n3."


def test_memory_round_trip(on: Virgo, tmp_path: Path) -> None:
    """malloc prints the id alone; set takes text, input and files; get gives back the very bytes."""
    identifier = on("malloc", "1KiB", "--node", "n2").text.strip()
    nodes = {node["number"]: node["name"] for node in on("nodes", "--json").json}
    assert nodes[node_of(int(identifier))] == "n2"
    assert on("set", identifier, "hello").out == b""
    assert on("get", identifier).out == b"hello"
    on("set", identifier, "-", stdin=BINARY)
    assert on("get", identifier).out == BINARY
    described = on("get", identifier, "--json").json
    assert (described["bytes"], described["text"]) == (len(BINARY), None)
    assert base64.b64decode(described["base64"]) == BINARY
    (tmp_path / "in").write_bytes(BINARY[::-1])
    assert on("set", hex(int(identifier)), f"@{tmp_path / 'in'}", "--json").json["bytes"] == len(BINARY)
    assert on("get", identifier, "-o", tmp_path / "out").out == b""
    assert (tmp_path / "out").read_bytes() == BINARY[::-1]
    on("free", identifier)
    for words in (["free", identifier], ["get", identifier], ["set", identifier, "x"]):
        assert on(*words, "--json", status=1).json["error"]["code"] == "NOID"


def test_free_says_what_became_of_each(on: Virgo) -> None:
    """An id that is unknown does not keep the others from being freed; both are told, and the status is 1."""
    first, second = (on("malloc", "--json", 4).json["id"] for _ in range(2))
    done = on("free", "--json", first, 5, second, first, status=1)
    assert done.json["freed"] == [first, second]
    assert [(one["item"], one["code"]) for one in done.json["failed"]] == [(5, "NOID"), (first, "NOID")]
    assert all(one["message"] and one["hint"] for one in done.json["failed"])
    assert done.json["error"]["code"] == "NOID"
    assert [line[:6] for line in done.err.splitlines()] == ["virgo:", "hint: "] * 2
    for identifier in (first, second):
        assert on("get", identifier, "--json", status=1).json["error"]["code"] == "NOID"
    third = on("malloc", "--json", 4).json["id"]
    assert on("free", third, "--json").json == {"freed": [third]}
    assert on("free", "5", "no-id", "--json", status=1).json["error"]["code"] == "BADARG"


def test_refusals_of_memory_keep_their_hints(on: Virgo) -> None:
    """A size of nothing, too much for the region, a node that is not there, a file that is not there."""
    identifier = on("malloc", "--json", 4).json["id"]
    for words, code in (
        (["malloc", "0"], "BADARG"),
        (["malloc", "2GiB"], "TOOBIG"),
        (["malloc", "4", "--node", "n9"], "NONODE"),
        (["set", identifier, "12345"], "TOOBIG"),
        (["set", identifier, "@/no/such/file"], "OS"),
        (["get", "-o", "/no/such/file", identifier], "OS"),
    ):
        done = on(*words, "--json", status=1)
        assert done.json["error"]["code"] == code, words
        assert done.err.startswith("virgo: ")
    on("free", identifier)


def test_files_round_trip(on: Virgo, tmp_path: Path) -> None:
    """put, ls, cat and rm on a node and in the pool; a directory takes a file under its own name."""
    local = tmp_path / "a file.bin"
    local.write_bytes(BINARY)
    assert on("put", local, "/n2/cli/one", "--json").json == {"path": "/n2/cli/one", "bytes": len(BINARY)}
    assert on("put", local, "/n2/cli", "--durable", "--json").json["path"] == "/n2/cli/a file.bin"
    on("put", "-", "/n2/cli/two", "--durable", stdin=b"second\n")
    assert on("cat", "/n2/cli/one", "/n2/cli/two").out == BINARY + b"second\n"
    shown = on("cat", "--json", "/n2/cli/one", "/n2/cli/two").json
    assert [(one["path"], one["bytes"], one["text"]) for one in shown] == [
        ("/n2/cli/one", len(BINARY), None), ("/n2/cli/two", 7, "second\n"),
    ]  # fmt: skip
    assert base64.b64decode(shown[0]["base64"]) == BINARY
    assert on("ls", "/n2/cli").text.splitlines() == ["a file.bin", "one", "two"]
    assert [entry["size"] for entry in on("ls", "/n2/cli/two", "--json").json] == [7]
    assert on("ls").text.splitlines() == ["n1", "n2", "n3", "pool"]
    on("put", local, "cli-placed")
    assert on("cat", "/pool/cli-placed").out == BINARY
    names = ["cli-placed", "/n2/cli/one", "/n2/cli/two", "/n2/cli/a file.bin", "/n2/cli"]
    done = on("rm", "--json", "/n2/absent", *names, status=1).json
    assert done["removed"] == names
    assert [(one["item"], one["code"]) for one in done["failed"]] == [("/n2/absent", "NOENT")]
    for words, code in (
        (["ls", "/n2/cli"], "NOENT"),
        (["rm", "cli-placed"], "NOENT"),
        (["put", local, "/n1/../../x"], "ESCAPE"),
        (["put", tmp_path / "absent", "/n1/x"], "OS"),
        (["ls", "/n9/"], "NOENT"),
        (["cat", "/n2/cli/one"], "NOENT"),
    ):
        assert on(*words, "--json", status=1).json["error"]["code"] == code, words
    assert on("cat", "/n2/cli/one", status=1).out == b""
    assert on("put", "-", "/n2/", status=1).err.startswith("virgo: /n2/ is a directory\nhint: ")


def test_cat_does_not_make_json_of_what_is_too_large(on: Virgo, cloud3: RunningCloud) -> None:
    """A file above the bound of one read is refused with the way out."""
    with cloud3.connect() as cloud:
        descriptor = cloud.files.open_descriptor("/n1/cli-large")
        cloud.files.truncate(descriptor, FILE_IO_BYTES_MAX + 1)
        done = on("cat", "--json", "/n1/cli-large", status=1)
        assert done.json["error"]["code"] == "TOOBIG"
        assert "Leave --json out" in done.json["error"]["hint"]
        cloud.files.close(descriptor)
        cloud.files.remove("/n1/cli-large")


POSIX = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_names_of_files_survive_a_locale_that_lacks_them(on: Virgo, cloud3: RunningCloud) -> None:
    """Into a pipe they are the bytes that they are, also as arguments; a terminal gets them escaped."""
    name = os.fsencode("/n1/cli-grün-日本")
    on("put", "-", os.fsdecode(name), stdin=b"content")

    def ran(*words: bytes, status: int = 0) -> subprocess.CompletedProcess[bytes]:
        environment = {**cloud3.environment, **POSIX}
        done = subprocess.run(
            [sys.executable, "-m", "virgo.cli", *words], env=environment, capture_output=True, timeout=60
        )
        assert done.returncode == status, done.stderr
        return done

    assert name[4:] in ran(b"ls", b"/n1").stdout.splitlines()
    assert ran(b"cat", name).stdout == b"content"
    assert b"stat '" + name + b"x'" in ran(b"ls", name + b"x", status=1).stderr
    assert b"cli-gr\\xfcn-\\u65e5\\u672c" in on_terminal(cloud3, "ls", "/n1", **POSIX)
    on("rm", os.fsdecode(name))


def test_calls(on: Virgo) -> None:
    """Text comes out as it is, structure as JSON; words behind the name are the function's own."""
    assert on("call", "add", "2", "3").text == "5\n"
    assert on("call", "echo", "plain text").text == "plain text\n"
    assert on("call", "echo", "--list", "-x", "1").text == '["--list", "-x", 1]\n'
    assert on("call", "--node", "n3", "node").text == "n3\n"
    assert on("call", "nproc").text.strip().isdigit()
    assert json.loads(on("call", "wordcount", "a b a").out) == {"a": 2, "b": 1}
    assert on("call", "--json", "wordcount", "a b a").json == {
        "name": "wordcount",
        "result": {"a": 2, "b": 1},
    }
    assert on("call", "--json", "echo", "null").json["result"] is None
    exported = {one["name"]: one["kind"] for one in on("call", "--list", "--json").json}
    assert (exported["wordcount"], exported["nproc"]) == ("function", "program")
    assert "wordcount" in on("call", "--list").text


def test_failed_calls_say_why(on: Virgo) -> None:
    """An exception, a name that is not exported, a node that is not there, a time limit, no name at all."""
    for words, code in (
        (["call", "--json", "add", "1", "x"], "CALLFAILED"),
        (["call", "--json", "no_such"], "NOTEXPORTED"),
        (["call", "--json", "--node", "n9", "pid"], "NONODE"),
        (["call", "--json", "--timeout", "0.2", "sleep", "30"], "DEADLINE"),
        (["call", "--json"], "BADARG"),
    ):
        done = on(*words, status=1)
        assert done.json["error"]["code"] == code, words
        assert "Traceback" not in done.err


def test_debug_shows_the_remote_traceback(on: Virgo, monkeypatch: pytest.MonkeyPatch) -> None:
    """VIRGO_DEBUG=1 shows where the function failed, on its node."""
    monkeypatch.setenv("VIRGO_DEBUG", "1")
    assert "return first + second" in on("call", "add", "1", "x", status=1).err


def test_a_terminal_gets_text_and_never_raw_bytes(on: Virgo, cloud3: RunningCloud) -> None:
    """On a terminal text ends with a line end, other bytes are a dump, and tables have colours."""
    identifier = on("malloc", "1KiB").text.strip()
    on("set", identifier, "hello")
    assert on_terminal(cloud3, "get", identifier) == b"hello\r\n"
    on("set", identifier, "-", stdin=BINARY)
    shown = on_terminal(cloud3, "get", identifier)
    assert shown.startswith(b"00000000  00 01 02")
    assert b"\x1b" not in shown
    on("free", identifier)
    assert b"\x1b[32mup" in on_terminal(cloud3, "status")
    assert b"\x1b[32m" not in on_terminal(cloud3, "status", NO_COLOR="1")


def on_terminal(cloud: RunningCloud, *words: str, **variables: str) -> bytes:
    """What a terminal would show."""
    master, slave = os.openpty()
    with os.fdopen(master, "rb", buffering=0) as screen:
        process = subprocess.Popen(
            [sys.executable, "-m", "virgo.cli", *words],
            stdin=slave,
            stdout=slave,
            stderr=subprocess.DEVNULL,
            env={**cloud.environment, "TERM": "xterm", "COLUMNS": "100", **variables},
        )
        os.close(slave)
        shown = b""
        while True:
            try:
                shown += screen.read(65536) or b""
            except OSError:  # the terminal is closed: the program has ended
                break
        assert process.wait(30) == 0
    return shown
