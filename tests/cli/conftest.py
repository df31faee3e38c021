"""Running the command line in this process, as quickly as a function call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import RunningCloud
from virgo.cli.app import app


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    status: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Virgo = Callable[..., Ran]


def beside(home: Path, *words: object) -> subprocess.Popen[bytes]:
    """A command line in a process of its own, for what goes on meanwhile."""
    command = [sys.executable, "-m", "virgo.cli", *map(str, words)]
    return subprocess.Popen(command, env={**os.environ, "VIRGO_HOME": str(home)}, stdout=subprocess.PIPE)


@pytest.fixture
def virgo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Virgo:
    """Run a command line in a VIRGO_HOME of the test's own, or in `home`."""
    monkeypatch.setenv("VIRGO_HOME", str(tmp_path / "home"))
    for name in ("VIRGO_URL", "VIRGO_DEBUG", "VIRGO_CONFIG"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: object, home: Path | None = None, stdin: bytes = b"") -> Ran:
        with monkeypatch.context() as changed:
            changed.setenv("VIRGO_HOME", str(home or tmp_path / "home"))
            done = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
        return Ran(done.exit_code, done.stdout_bytes, done.stderr)

    return run


@pytest.fixture
def on(virgo: Virgo, cloud3: RunningCloud) -> Virgo:
    """`virgo`, in the home of the three-node cloud; a status that was not expected fails the test."""

    def run(*words: object, status: int = 0, **options: object) -> Ran:
        done = partial(virgo, home=cloud3.home)(*words, **options)
        assert done.status == status, (done.status, done.text, done.err)
        return done

    return run
