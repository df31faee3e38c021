"""The directories that a node exports, as its configuration names them: looked at, never changed.

`virgo up` refuses to start with an export that is not there. A running node is more patient: a disk may be
unmounted and mounted again under it, so only requests for that export fail meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from virgo.config import FilesConfig
from virgo.errors import BadConfig
from virgo.files import core


@dataclass(frozen=True, slots=True)
class Root:
    """Where a tree begins.

    Attributes:
        node: name of the machine's node that has it.
        name: of the export, "" for the private directory.
        directory: where it lies.
        read_only: nothing in it can be changed.
        keeps_owners: new files become those of whoever makes them, which takes root.
    """

    node: str
    name: str
    directory: str
    read_only: bool = False
    keeps_owners: bool = True


def export_directories(files: FilesConfig) -> dict[str, Path]:
    """Directory by name of the export, present or not.

    Raises:
        BadConfig: a name or a directory cannot be one, or `read_only` names no export.
    """
    core.check_exports(files.exports)
    strange = [name for name in files.read_only if name not in files.exports]
    if strange:
        raise BadConfig(
            f"files.read_only names {strange[0]!r}, which files.exports does not",
            hint=f"The exports are: {', '.join(files.exports) or 'none'}.",
        )
    found = {name: Path(written).expanduser() for name, written in files.exports.items()}
    for name, directory in found.items():
        if not directory.is_absolute():
            raise BadConfig(
                f"files.exports: {name} = {files.exports[name]!r} must be an absolute path",
                hint="Begin it with / or ~: a node has no directory of its own to start from.",
            )
    return found


def absent(files: FilesConfig) -> dict[str, str]:
    """What is wrong with the directories of exports that cannot be served now, by name. Raises BadConfig."""
    return {
        name: f"{directory} is {'not a directory' if directory.exists() else 'not there'}"
        for name, directory in export_directories(files).items()
        if not directory.is_dir()
    }


def check_present(files: FilesConfig) -> None:
    """Raise BadConfig if the directory of an export is not there, or is none."""
    wrong = absent(files)
    if wrong:
        name = next(iter(wrong))
        others = f" (and so with {', '.join(list(wrong)[1:])})" if len(wrong) > 1 else ""
        raise BadConfig(
            f"files.exports: {name} = {files.exports[name]!r}, but {wrong[name]}{others}",
            hint=f"Make or mount the directory, or take {name} out of files.exports.",
        )
