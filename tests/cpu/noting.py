"""A call that says in a file which process runs it, and goes on for long."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import cloudpickle
from tests.waiting import until

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def note_and_sleep(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(100)


def noted(path: Path) -> int:
    until(lambda: path.exists() and path.read_text())
    return int(path.read_text())
