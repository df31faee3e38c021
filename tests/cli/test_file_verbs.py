"""`virgo get`, `cp`, `tree`, `stat` and `df` on three real nodes."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

import pytest

from cli.conftest import Virgo

_serial = count(1)


@pytest.fixture
def top(on: Virgo, tmp_path: Path) -> str:
    """A directory on n2 with a few files."""
    path = f"/n2/verbs-{os.getpid()}-{next(_serial)}"
    for name, content in (("a.txt", b"first"), ("sub/b.bin", bytes(range(256)) * 40)):
        (tmp_path / "source").write_bytes(content)
        on("put", str(tmp_path / "source"), f"{path}/{name}")
    return path


def test_a_file_comes_here(on: Virgo, top: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the name given, to its own name, to output; a region is still found by its id."""
    on("get", f"{top}/sub/b.bin", str(tmp_path / "here"))
    assert (tmp_path / "here").read_bytes() == bytes(range(256)) * 40
    monkeypatch.chdir(tmp_path)
    assert on("get", f"{top}/a.txt", "--json").json == {"path": f"{top}/a.txt", "local": "a.txt", "bytes": 5}
    assert (tmp_path / "a.txt").read_bytes() == b"first"
    assert on("get", f"{top}/a.txt", "-").out == b"first"
    assert "no such file" in on("get", f"{top}/absent", status=1).err
    identifier = on("malloc", "10").text.strip()
    on("set", identifier, "region")
    assert on("get", identifier).out == b"region"
    on("free", identifier)


def test_trees_are_copied_and_shown(on: Virgo, top: str) -> None:
    """To another node with all in them; a directory needs to be asked for."""
    assert "--recursive" in on("cp", top, "/n3/copy", status=1).err
    on("cp", "-r", f"{top}/", f"/n3{top[3:]}")
    shown = on("tree", f"/n3{top[3:]}").text.splitlines()
    assert shown == [f"/n3{top[3:]}", "├── a.txt  5 B", "└── sub/", "    └── b.bin  10.0 KiB"]
    listed = on("tree", top, "--json").json
    assert [entry["path"] for entry in listed] == [f"{top}/a.txt", f"{top}/sub", f"{top}/sub/b.bin"]
    on("cp", f"{top}/a.txt", f"{top}/c.txt", "--json")
    assert on("cat", f"{top}/c.txt").out == b"first"


def test_what_is_there_and_how_much_room(on: Virgo, top: str) -> None:
    """Kind, size and node of paths; the free disk of every node."""
    first, second = on("stat", f"{top}/a.txt", top, "--json").json
    assert (first["type"], first["size"], first["node"], second["type"]) == ("file", 5, "n2", "directory")
    assert "a.txt" in on("stat", f"{top}/a.txt").text
    free = {entry["node"]: entry["free_bytes"] for entry in on("df", "--json").json}
    assert set(free) == {"n1", "n2", "n3"} and all(amount > 0 for amount in free.values())
    assert on("df").text.splitlines()[0].split() == ["NODE", "STATE", "FREE"]
