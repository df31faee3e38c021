"""Where things are below VIRGO_HOME.

token, tokens/        secrets of clients (0600)
virgo.toml            configuration
tls/                  certificates
run/up.json           what `virgo up` was asked for, and its process
run/NAME.json         a serving node: its process and member record
run/NAME.sock         its Unix socket
run/mounts/           a mount: its process, and where its state is
log/                  one file a process
engine/               the embedded engine's data and credentials
nodes/NAME/           a node's identity and its modules' files
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from virgo.errors import BadArgument, BadConfig, Denied
from virgo.limits import NAME_CHARS_MAX


def run_directory(home: Path) -> Path:
    """Sockets and process records; made on demand. Raises BadConfig if VIRGO_HOME cannot be used.

    Other users may pass through to the sockets, where peer credentials decide; records are the owner's.
    """
    directory = _made(home / "run")
    directory.chmod(0o711)
    return directory


def log_file(home: Path, name: str) -> Path:
    """The log of a node, of the supervisor or of the engine."""
    return _made(home / "log") / f"{name}.log"


def node_directory(home: Path, name: str) -> Path:
    """A node's state; made on demand."""
    return _made(_made(home / "nodes") / check_name(name))


def socket_path(home: Path, name: str) -> Path:
    """A node's Unix socket."""
    return home / "run" / f"{name}.sock"


def record_path(home: Path, name: str) -> Path:
    """The record of a serving node, or of `up`."""
    return home / "run" / f"{name}.json"


def mount_record_path(home: Path, place: Path) -> Path:
    """The record of a mount: under its path, with what cannot stand in a name written out."""
    name = str(place).strip("/").replace("%", "%25").replace("/", "%2F")
    return _made(run_directory(home) / "mounts") / f"{name}.json"


def check_name(name: str) -> str:
    """The name, if a node may have it: letters, digits, '-', '_' and '.', the first a letter or digit.

    Raises:
        BadArgument: it may not.
    """
    plain = name.isascii() and name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    if not plain or not name[0].isalnum() or len(name) > NAME_CHARS_MAX or name == "pool":
        raise BadArgument(
            f"{name!r} cannot be a node's name", hint="Letters, digits, '-', '_' and '.'; not 'pool'."
        )
    return name


def write_record(path: Path, value: Any) -> None:
    """Write JSON so that readers see the old or the new whole; readable by the owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(value))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_record(path: Path) -> dict[str, Any] | None:
    """The JSON record, or None if there is none. Raises Denied if it is another user's."""
    try:
        record = msgspec.json.decode(path.read_bytes())
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    except PermissionError as error:
        raise Denied(
            f"{path} belongs to another user",
            hint=f"VIRGO_URL=unix:{path.parent}/NODE.sock leads to a node of that cloud, if it admits you.",
        ) from error
    return record if isinstance(record, dict) else None


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise BadConfig(
            f"{directory} cannot be made: {error.strerror}",
            hint="VIRGO_HOME, or --home, must be in a directory that this user may write to; choose another.",
        ) from error
    return directory
