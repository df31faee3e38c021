"""Path and mode decisions: where a path leads, and that no path leads out."""

from __future__ import annotations

import itertools
import os
import posixpath
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virgo.config import Placement
from virgo.errors import BadArgument, BadConfig, PathEscape, TooLarge, VirgoError
from virgo.files import core
from virgo.files.core import Kind, Place
from virgo.limits import PLACED_PATH_BYTES_MAX
from virgo.members import Load, Member

NODES = {"n1", "n2"}
PIECES = st.sampled_from(
    ["n1", "n2", "n9", "pool", "..", ".", "", "a", "link", "data", "%", "\udcff", "é", "*>."]
)
PATHS = st.lists(PIECES, max_size=12).map("/".join) | st.text(max_size=40)


def is_node(name: str) -> bool:
    return name in NODES


@pytest.mark.parametrize(
    ("path", "kind", "node", "parts"),
    [
        ("/n1/a/b", Kind.NODE, "n1", ("a", "b")),
        ("n1/a", Kind.NODE, "n1", ("a",)),
        ("//n1//./a/", Kind.NODE, "n1", ("a",)),
        ("/n1", Kind.NODE, "n1", ()),
        ("/n1/a/../b", Kind.NODE, "n1", ("a", "..", "b")),
        ("/", Kind.TOP, "", ()),
        (".", Kind.TOP, "", ()),
        ("/pool/x", Kind.POOL, "", ("x",)),
        ("/etc/x", Kind.POOL, "", ("etc", "x")),
        ("data/x", Kind.POOL, "", ("data", "x")),
        ("/data/../x", Kind.POOL, "", ("x",)),
        ("/n9/x", Kind.POOL, "", ("n9", "x")),
        ("/pool/n1/x", Kind.POOL, "", ("n1", "x")),
        ("/pool/pool/x", Kind.POOL, "", ("pool", "x")),
        ("/pool", Kind.POOL, "", ()),
    ],
)
def test_where_a_path_leads(path: str, kind: Kind, node: str, parts: tuple[str, ...]) -> None:
    """The first name decides: a registered node's files, or else the pool, whose own name may be left out."""
    place = core.locate(path, is_node)
    assert (place.kind, place.node, place.parts) == (kind, node, parts)


@pytest.mark.parametrize(
    "path",
    ["..", "/..", "/n1/..", "/n1/../n2/x", "/n1/a/../../b", "/pool/../n1/x", "x/../../y", "../etc/passwd"],
)
def test_climbing_out_is_an_escape(path: str) -> None:
    """`..` above the node or the pool is refused by name."""
    with pytest.raises(PathEscape):
        core.locate(path, is_node)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("", BadArgument),
        ("/n1/\0", BadArgument),
        ("/n1/" + "x" * 256, TooLarge),
        ("/n1/" + "é" * 128, TooLarge),
        ("/n1/" + "x/" * 2046, TooLarge),
        ("/pool/" + "x/" * 250, TooLarge),
    ],
)
def test_paths_the_kernel_would_not_take(path: str, error: type[VirgoError]) -> None:
    """Empty, NUL and too long are typed errors before anything is asked of the kernel."""
    with pytest.raises(error):
        core.locate(path, is_node)


def test_names_of_255_bytes_are_fine() -> None:
    """The kernel's bound on a name is reached, not undercut."""
    for name in ("x" * 255, "é" * 127):
        assert core.locate(f"/n1/{name}", is_node).parts == (name,)


@given(PATHS)
def test_no_path_leads_out(path: str) -> None:
    """Whatever the input, what is handed to the kernel is relative and, by counting, below its root."""
    try:
        place = core.locate(path, is_node)
        if place.kind is Kind.TOP:
            return
        spot = core.spot(place, {"data"})
    except (BadArgument, TooLarge, PathEscape):
        return
    assert not spot.path.startswith("/")
    assert "\0" not in spot.path
    normal = posixpath.normpath("root/" + spot.path)
    assert normal == "root" or normal.startswith("root/")
    if place.kind is Kind.POOL:
        assert spot.root == core.POOL_ROOT
        assert ".." not in place.parts


@given(PATHS)
def test_the_canonical_path_means_the_same(path: str) -> None:
    """A place's path leads to the place again, so nodes may pass it on."""
    try:
        place = core.locate(path, is_node)
    except (BadArgument, TooLarge, PathEscape):
        return
    again = core.locate(place.path, is_node)
    assert (again.kind, again.node, again.parts) == (place.kind, place.node, place.parts)


@given(
    st.lists(PIECES.filter(lambda name: name not in ("", ".", "..")), min_size=1, max_size=8).map("/".join)
)
def test_register_names_are_utf8_and_invertible(placed: str) -> None:
    """Every placed path has a register of its own, with a name that the engine takes."""
    name = core.register_name(placed)
    assert 1 <= len(name.encode()) <= 512
    assert core.placed_of(name) == placed


def test_the_longest_placed_path_fits_the_engine() -> None:
    """The bound on placed paths is what a register's name can hold."""
    name = core.register_name("a" * PLACED_PATH_BYTES_MAX)
    assert len(name.encode()) <= 512


def test_an_export_is_its_own_root() -> None:
    """The first name below a node picks the export; `..` cannot pick another root."""
    exports = {"data"}
    place = core.locate("/n1/data/x", is_node)
    assert core.spot(place, exports) == core.Spot("data", "x")
    assert core.spot(core.locate("/n1/other/x", is_node), exports) == core.Spot("", "other/x")
    assert core.spot(core.locate("/n1/a/../data/x", is_node), exports).root == ""
    with pytest.raises(PathEscape):
        core.spot(core.locate("/n1/data/../x", is_node), exports)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", ":pool", "a\0b"])
def test_export_names_are_one_name(name: str) -> None:
    """An export that no path could name, or that could clash with the pool, is refused at start."""
    with pytest.raises(BadConfig):
        core.check_exports([name])


def test_rules_fit_whole_names_and_the_longest_wins() -> None:
    """`/data` rules `/pool/data/x` but not `/pool/database`, and `/data/hot` rules over it."""
    rules = [Placement("/data", "n2"), Placement("pool/data/hot/", "n3"), Placement("/logs", "n1")]
    assert core.ruled(("data", "x"), rules) == "n2"
    assert core.ruled(("data", "hot", "x"), rules) == "n3"
    assert core.ruled(("database",), rules) is None
    assert core.ruled(("data",), rules) == "n2"
    assert core.ruled(("x",), [*rules, Placement("/", "n9")]) == "n9"


def member(number: int, free: int) -> Member:
    return Member(name=f"n{number}", number=number, id=str(number), load=Load(disk_free_bytes=free))


def test_new_files_go_where_the_room_is() -> None:
    """Most free disk wins; nearly equal counts as equal, and then this node is first."""
    assert core.roomiest([member(1, 100), member(2, 900), member(3, 500)], here=1) == 2
    assert core.roomiest([member(1, 1000), member(2, 1001), member(3, 999)], here=3) == 3
    assert core.roomiest([member(1, 1000), member(2, 1001)], here=7) == 1
    assert core.roomiest([], here=1) is None


def test_modes_are_those_of_open(tmp_path: Path) -> None:
    """Every text of up to four letters is accepted exactly if Python's open accepts it, with its meaning."""
    letters = "rwaxbt+U"
    for length in range(5):
        for mode in map("".join, itertools.product(letters, repeat=length)):
            try:
                meaning: core.Mode | None = core.parse_mode(mode)
            except BadArgument:
                meaning = None
            assert (meaning is not None) == _python_accepts(mode), mode
    for mode in ("r", "w", "a", "x", "r+", "w+", "a+", "x+"):
        path = tmp_path / mode
        if mode[0] != "x":
            path.write_bytes(b"before")
        with path.open(mode + "b") as file:
            meaning = core.parse_mode(mode)
            assert (meaning.read, meaning.write) == (file.readable(), file.writable())
            assert meaning.truncate == (mode[0] == "w")
            assert meaning.exclusive == (mode[0] == "x")


def _python_accepts(mode: str) -> bool:
    """Whether `open` gets as far as looking for the file; `U` was a mode once, and is refused since 3.11."""
    try:
        with open("/nowhere/at/all", mode):  # noqa: PTH123 - the differential's other side
            raise AssertionError
    except FileNotFoundError:
        return True
    except ValueError:
        return False


def test_without_a_mode_nothing_is_lost() -> None:
    """The default mode reads and writes, creates, and does not truncate."""
    flags = core.DEFAULT_MODE.flags
    assert flags & os.O_ACCMODE == os.O_RDWR
    assert flags & os.O_CREAT
    assert not flags & (os.O_TRUNC | os.O_EXCL | os.O_APPEND)


def test_places_show_where_they_are() -> None:
    """A place's path is the one canonical spelling."""
    assert Place(Kind.POOL, parts=("a", "b")).path == "/pool/a/b"
    assert Place(Kind.NODE, "n1", ("a",)).path == "/n1/a"
    assert Place(Kind.TOP).path == "/"
