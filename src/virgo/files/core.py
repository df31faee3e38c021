"""Where a path leads, and what a mode allows. Pure: text in, decisions out; no I/O.

Promises: a `Place` never names anything above its root, whatever the input (the kernel checks again, with
links, when the file is opened); `parse_mode` accepts and refuses exactly what Python's `open` does.

Two kinds of path meet `..` differently. Below a node's root it is left to the kernel, since `link/..` is
the parent of what the link points at; it is only refused here when it would climb above the root by
counting. A placed path is a name in a register, so `..` is taken out of it by text, and it may not climb
above the pool.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from virgo.config import Placement
from virgo.errors import BadArgument, BadConfig, PathEscape, TooLarge
from virgo.limits import FILE_NAME_BYTES_MAX, PATH_BYTES_MAX, PLACED_PATH_BYTES_MAX
from virgo.members import Member

POOL: Final = "pool"
PRIVATE: Final = ""
POOL_ROOT: Final = ":pool"  # no export can have this name
_REGISTER_PREFIX: Final = "files/place/"


# --- paths ----------------------------------------------------------------------------------


class Kind(Enum):
    """What the first part of a path says."""

    TOP = "top"
    NODE = "node"
    POOL = "pool"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a virtual path leads.

    Attributes:
        kind: the top directory, a node's files, or the pool.
        node: the node's name, for `Kind.NODE`.
        parts: the names below the node or the pool; of a placed path without `..`.
        directory: the path was written with a slash at its end.
    """

    kind: Kind
    node: str = ""
    parts: tuple[str, ...] = ()
    directory: bool = False

    @property
    def path(self) -> str:
        """The path in its one canonical spelling."""
        head = {Kind.TOP: (), Kind.NODE: (self.node,), Kind.POOL: (POOL,)}[self.kind]
        return "/" + "/".join((*head, *self.parts))

    @property
    def placed(self) -> str:
        """A placed path as rules and registers know it: without `/pool/`."""
        return "/".join(self.parts)


@dataclass(frozen=True, slots=True)
class Spot:
    """A path on one node: the root's name (`PRIVATE`, `POOL_ROOT` or an export) and the path below it."""

    root: str
    path: str

    @property
    def parent(self) -> str:
        """The path of the directory it is in, "" for the root."""
        return self.path.rpartition("/")[0]

    @property
    def name(self) -> str:
        """Its last name, "" for the root itself."""
        return self.path.rpartition("/")[2]


def split(path: str) -> tuple[str, ...]:
    """The names of a path; empty ones and `.` mean nothing.

    Raises:
        BadArgument: it is empty or holds NUL.
        TooLarge: it, or a name in it, is longer than the kernel takes.
    """
    if not path:
        raise BadArgument("the path is empty", hint="Write /NODE/path, or any other path for the pool.")
    if "\0" in path:
        raise BadArgument("a path must not contain NUL", hint="No file's name can; take it out.")
    if len(os.fsencode(path)) >= PATH_BYTES_MAX:
        raise TooLarge(f"a path must be shorter than {PATH_BYTES_MAX} bytes", hint="Shorten it.")
    names = tuple(name for name in path.split("/") if name not in ("", "."))
    for name in names:
        if len(name) * 4 > FILE_NAME_BYTES_MAX and len(os.fsencode(name)) > FILE_NAME_BYTES_MAX:
            raise TooLarge(
                f"the name {name[:24]!r}... is longer than {FILE_NAME_BYTES_MAX} bytes", hint="Shorten it."
            )
    return names


def locate(path: str, is_node: Callable[[str], bool]) -> Place:
    """Where a virtual path leads.

    Raises:
        PathEscape: `..` climbs above the node or the pool.
        BadArgument, TooLarge: see `split`; a placed path is also bounded by PLACED_PATH_BYTES_MAX.
    """
    names = split(path)
    directory = path.endswith(("/", "/.", "/..")) or path in (".", "..")
    if not names:
        return Place(Kind.TOP, directory=True)
    if names[0] != POOL and is_node(names[0]):
        check_depth(names[1:], path)
        return Place(Kind.NODE, names[0], names[1:], directory)
    parts = collapse(names[1:] if names[0] == POOL else names, path)
    place = Place(Kind.POOL, parts=parts, directory=directory)
    if len(register_name(place.placed).encode()) - len(_REGISTER_PREFIX) > PLACED_PATH_BYTES_MAX:
        raise TooLarge(
            f"a placed path may have {PLACED_PATH_BYTES_MAX} bytes",
            hint="Shorten it, or say where the file lives: /NODE/path.",
        )
    return place


def check_depth(names: Iterable[str], path: str) -> None:
    """Raise PathEscape if `..` climbs above where the names begin, at any point of the way."""
    depth = 0
    for name in names:
        depth += -1 if name == ".." else 1
        if depth < 0:
            raise PathEscape(f"{path[:200]!r} leads out of its root")


def collapse(names: Iterable[str], path: str) -> tuple[str, ...]:
    """The names with each `..` and the name before it taken out. Raises PathEscape at the top."""
    kept: list[str] = []
    for name in names:
        if name != "..":
            kept.append(name)
        elif kept:
            kept.pop()
        else:
            raise PathEscape(f"{path[:200]!r} leads out of the pool")
    return tuple(kept)


def spot(place: Place, exports: Collection[str]) -> Spot:
    """The root and path of a place on the node that holds it. Raises PathEscape."""
    if place.kind is Kind.POOL:
        return Spot(POOL_ROOT, place.placed)
    assert place.kind is Kind.NODE
    if place.parts and place.parts[0] in exports:
        check_depth(place.parts[1:], place.path)
        return Spot(place.parts[0], "/".join(place.parts[1:]))
    return Spot(PRIVATE, "/".join(place.parts))


def check_exports(names: Iterable[str]) -> None:
    """Raise BadConfig for an export whose name cannot be one name of a path."""
    for name in names:
        if not name or "/" in name or "\0" in name or name in (".", "..") or name.startswith(":"):
            raise BadConfig(
                f"files.exports: {name!r} cannot be the name of an export",
                hint="A name is one part of a path and does not begin with ':'.",
            )


def name_fields(name: str) -> dict[str, str]:
    """A name as JSON holds it: `bytes` is added, in Base64, if it is not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raw = os.fsencode(name)
        return {"name": raw.decode("utf-8", "replace"), "bytes": base64.b64encode(raw).decode()}
    return {"name": name}


def entry_name(entry: Mapping[str, Any]) -> str:
    """The name in a listing's entry: the inverse of `name_fields`."""
    if "bytes" in entry:
        return os.fsdecode(base64.b64decode(entry["bytes"]))
    return str(entry["name"])


# --- placement ------------------------------------------------------------------------------


def register_name(placed: str) -> str:
    """The register of a placed path: UTF-8, with `%XX` for `%`, control characters and other bytes."""
    if placed.isprintable() and "%" not in placed:
        return _REGISTER_PREFIX + placed
    quoted = []
    for character in placed:
        if character == "%" or not character.isprintable():
            quoted += [f"%{byte:02X}" for byte in os.fsencode(character)]
        else:
            quoted.append(character)
    return _REGISTER_PREFIX + "".join(quoted)


def placed_of(name: str) -> str:
    """The placed path of a register: the inverse of `register_name`."""
    pieces = name.removeprefix(_REGISTER_PREFIX).split("%")
    data = os.fsencode(pieces[0])
    for piece in pieces[1:]:
        data += bytes.fromhex(piece[:2]) + os.fsencode(piece[2:])
    return os.fsdecode(data)


def ruled(parts: Sequence[str], rules: Iterable[Placement]) -> str | None:
    """The node that the longest fitting rule names, or None.

    A rule fits whole names: `/data` and `data` both fit `/pool/data/x`, and neither fits `/pool/database`.
    """
    best, best_length = None, -1
    for rule in rules:
        prefix = [name for name in rule.prefix.split("/") if name not in ("", ".")]
        if prefix[:1] == [POOL]:
            prefix = prefix[1:]
        if len(prefix) > best_length and list(parts[: len(prefix)]) == prefix:
            best, best_length = rule.node, len(prefix)
    return best


def roomiest(members: Iterable[Member], here: int) -> int | None:
    """The number of the node with most free disk; of nearly equal ones this node, else the first.

    Nodes of one machine measure the same disk at different moments, so a difference of less than one
    part in 64 counts as none.
    """
    found = list(members)
    if not found:
        return None
    most = max(member.load.disk_free_bytes for member in found)
    equal = [member.number for member in found if member.load.disk_free_bytes >= most - most // 64]
    return here if here in equal else min(equal)


# --- modes ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mode:
    """What an open may do. `create` makes an absent file, `exclusive` demands that it is absent."""

    read: bool
    write: bool
    append: bool = False
    create: bool = False
    truncate: bool = False
    exclusive: bool = False

    @property
    def flags(self) -> int:
        """As flags of open(2)."""
        flags = os.O_RDWR if self.read and self.write else os.O_WRONLY if self.write else os.O_RDONLY
        for wanted, flag in (
            (self.append, os.O_APPEND),
            (self.create, os.O_CREAT),
            (self.truncate, os.O_TRUNC),
            (self.exclusive, os.O_EXCL),
        ):
            flags |= flag if wanted else 0
        return flags


DEFAULT_MODE: Final = Mode(read=True, write=True, create=True)


def parse_mode(mode: str) -> Mode:
    """The meaning of a mode as of Python's `open`; `b` and `t` change nothing here. Raises BadArgument."""
    kinds = [letter for letter in mode if letter in "rwax"]
    plus = "+" in mode
    if (
        set(mode) - set("rwaxbt+")
        or len(set(mode)) != len(mode)
        or len(kinds) != 1
        or ("b" in mode and "t" in mode)
    ):
        raise BadArgument(
            f"{mode[:16]!r} is not a mode",
            hint="One of r, w, a, x, with + for both directions, as in Python's open().",
        )
    kind = kinds[0]
    return Mode(
        read=kind == "r" or plus,
        write=kind != "r" or plus,
        append=kind == "a",
        create=kind != "r",
        truncate=kind == "w",
        exclusive=kind == "x",
    )
