"""Blocks of Markdown that are run as tests, and how each kind is run.

A block is run if its fence says `run`: ```python run, ```console run, ```telnet run. What a Python block
prints is compared with the ```text output block behind it, if there is one. In a console block lines after
"$ " are commands for one shell, "> " continues a command, and the rest is what it prints. In a telnet
block "$ telnet HOST PORT" connects, "> " is typed, and the rest is what comes back. Three dots in what is
shown stand for anything.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from virgo.members import PORTS
from virgo.memory.memcached.place import PORT as MEMCACHED_PORT

_FENCE = re.compile(r"^```(\w*)[ ]*(.*)$")
_PORT = re.compile(r"((?:-p|localhost|127\.0\.0\.1)[ :])(\d{5})\b")
_TIMEOUT_S = 60


@dataclass
class Block:
    """One fenced block. `shown` is the output that stands behind a Python block, None without one."""

    place: str
    language: str
    flags: list[str]
    lines: list[str] = field(default_factory=list)
    shown: list[str] | None = None

    def __repr__(self) -> str:
        return f"{self.place} {self.language}"


@dataclass(frozen=True)
class Surroundings:
    """Where blocks are run: an empty directory, a cloud, and by how much its ports are shifted."""

    directory: Path
    environment: dict[str, str]
    token: str
    port_offset: int


def parse(path: Path) -> list[Block]:
    """All fenced blocks of a file; output blocks are joined to the block before them."""
    blocks: list[Block] = []
    open_block: Block | None = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if open_block is not None and line == "```":
            if "output" in open_block.flags:
                assert blocks, f"{open_block!r}: an output without a block"
                blocks[-1].shown = open_block.lines
            else:
                blocks.append(open_block)
            open_block = None
        elif open_block is not None:
            open_block.lines.append(line)
        elif fence is not None:
            open_block = Block(f"{path.name}:{number}", fence[1], fence[2].split())
    assert open_block is None, f"{open_block!r} is not closed"
    return blocks


def run(block: Block, around: Surroundings) -> None:
    """Run one block; AssertionError names it, and what it printed instead."""
    {"python": _run_python, "console": _run_console, "telnet": _run_telnet}[block.language](block, around)


def fits(shown: list[str], got: list[str]) -> bool:
    """Whether the output is what is shown; three dots stand for anything."""
    pattern = ".*".join(re.escape(part) for part in "\n".join(shown).rstrip().split("..."))
    return re.fullmatch(pattern, "\n".join(got).rstrip(), re.DOTALL) is not None


def _compare(block: Block, what: str, shown: list[str], got: list[str]) -> None:
    assert fits(shown, got), "\n".join([f"{block!r}: {what}", "shown:", *shown, "got:", *got])


def _run_python(block: Block, around: Surroundings) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(block.lines)],
        cwd=around.directory, env=around.environment, text=True, capture_output=True, timeout=_TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{block!r} failed:\n{done.stderr}"
    if block.shown is not None:
        _compare(block, "prints something else", block.shown, done.stdout.splitlines())


def _run_console(block: Block, around: Surroundings) -> None:
    commands: list[tuple[str, list[str]]] = []
    for line in block.lines:
        if line.startswith("$ "):
            commands.append((line[2:], []))
        elif line.startswith("> ") and commands and not commands[-1][1]:
            commands[-1] = (f"{commands[-1][0]}\n{line[2:]}", [])
        else:
            assert commands, f"{block!r} begins with output"
            commands[-1][1].append(line)
    script = "".join(f"{shift(command, around)}\nprintf '\\001%d\\001' $?\n" for command, _ in commands)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail\n{script}"],
        cwd=around.directory, env=around.environment, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    pieces = done.stdout.split("\x01")
    assert len(pieces) == 2 * len(commands) + 1, f"{block!r} broke off:\n{done.stdout}"
    for (command, shown), got, status in zip(commands, pieces[::2], pieces[1::2], strict=False):
        assert shown or status == "0", f"{block!r}: {command!r} failed with status {status}:\n{got}"
        _compare(block, command, shown, got.splitlines())


def _run_telnet(block: Block, around: Surroundings) -> None:
    opening = re.fullmatch(r"\$ telnet (\S+) (\d+)", shift(block.lines[0], around))
    assert opening is not None, f"{block!r} does not begin with `$ telnet HOST PORT`"
    with socket.create_connection((opening[1], int(opening[2])), timeout=_TIMEOUT_S) as connection:
        answers = connection.makefile("rb")
        for line in block.lines[1:]:
            if line.startswith("> "):
                connection.sendall(line[2:].replace("$TOKEN", around.token).encode() + b"\r\n")
            else:
                _compare(
                    block, "answers something else", [line], [answers.readline().decode().rstrip("\r\n")]
                )


def shift(text: str, around: Surroundings) -> str:
    """The text with VIRGO's ports as they are in this cloud."""
    first = {*PORTS.values(), MEMCACHED_PORT}

    def shifted(match: re.Match[str]) -> str:
        port = int(match[2])
        return match[1] + str(port + around.port_offset if port in first else port)

    return _PORT.sub(shifted, text)
