"""The blocking and the asyncio face side by side: what one has, the other has, or a reason is written here.

Compared are the names of each pair of classes, whether a name is called or read, what is awaited, and the
parameters of methods. A name that a face gets, and the other does not, fails until it is added or explained.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import io
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

import virgo
from virgo import aio
from virgo.cloud import Cloud, connect
from virgo.cpu.aclient import AsyncCpuClient
from virgo.cpu.client import CpuClient
from virgo.errors import VirgoError
from virgo.files.aclient import AsyncFilesClient
from virgo.files.astream import AsyncBinaryFile
from virgo.files.atext import AsyncTextFile, text_format
from virgo.files.client import FilesClient
from virgo.files.core import parse_mode
from virgo.files.cursor import Cursor
from virgo.files.stream import RemoteFile
from virgo.memory.aclient import AsyncMemoryClient, AsyncNamespace, AsyncRegion
from virgo.memory.amapping import AsyncReach
from virgo.memory.client import MemoryClient, Namespace, Region
from virgo.memory.reach import Reach
from virgo.wire.aclient import AsyncClient
from virgo.wire.address import Address
from virgo.wire.client import Client

_NOWHERE = Address(path="/nowhere")
_RUNNER: Any = object()  # nothing is run
_SPECIAL = {  # how `with` and iteration are called on the other side
    "__enter__": "__aenter__",
    "__exit__": "__aexit__",
    "__iter__": "__aiter__",
    "__next__": "__anext__",
}
_NO_AWAIT = "an operator cannot be awaited"
_LOCAL = "asks nobody, so there is nothing to await"
_NO_DESCRIPTOR = "there is no descriptor of this process"
_INSIDE = "layers of Python's io that an asyncio file does not have"


@dataclasses.dataclass(frozen=True, repr=False)
class Pair:
    """Two objects with one surface, and the differences that are meant, each with its reason.

    Attributes:
        only_blocking: names that asyncio does not have.
        only_asyncio: names that the blocking face does not have.
        not_awaited: methods that are plain functions in asyncio too.
        read_there: names that the blocking face has as properties and asyncio as methods.
        parameters: methods whose parameters differ.
    """

    blocking: Any
    asyncio: Any
    only_blocking: dict[str, str] = dataclasses.field(default_factory=dict)
    only_asyncio: dict[str, str] = dataclasses.field(default_factory=dict)
    not_awaited: dict[str, str] = dataclasses.field(default_factory=dict)
    read_there: dict[str, str] = dataclasses.field(default_factory=dict)
    parameters: dict[str, str] = dataclasses.field(default_factory=dict)


def names(thing: Any) -> set[str]:
    """The public names, and the special ones by which `with`, iteration and operators work."""
    ours = {name for name in dir(thing) if not name.startswith("_")}
    return ours | {
        name for name in [*_SPECIAL, *_SPECIAL.values(), *_OPERATORS] if hasattr(type(thing), name)
    }


_OPERATORS = ("__getitem__", "__setitem__", "__delitem__", "__contains__", "__len__")


def kind(thing: Any, name: str) -> str:
    """`awaited` (a coroutine or a stream), `called`, or `read`, without touching properties."""
    found = inspect.getattr_static(thing, name)
    if inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found):
        return "awaited"
    return "called" if inspect.isroutine(found) and not isinstance(found, cached_property) else "read"


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each parameter."""
    return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]


_OF_KEYS: dict[str, dict[str, str]] = {
    "only_blocking": {
        "__getitem__": f"{_NO_AWAIT}: get",
        "__setitem__": f"{_NO_AWAIT}: set",
        "__delitem__": f"{_NO_AWAIT}: delete",
        "__contains__": f"{_NO_AWAIT}: exists",
        "__len__": f"{_NO_AWAIT}: count",
        "view": "a coroutine that holds it would hold up the pool: get",
    },
    "only_asyncio": {"exists": "for `in`", "count": "for `len`"},
    "parameters": {
        "setdefault": "a mapping's default is None, which is no value here",
        "update": "a mapping's is inherited: the same, annotated otherwise",
    },
}


def memory_pair() -> Pair:
    regions = {"hold_region": "for `memoryview(region)`, which cannot be awaited"}
    return Pair(
        MemoryClient(_RUNNER),
        AsyncMemoryClient(_RUNNER),
        not_awaited={"region": _LOCAL},
        read_there={"mapped": "asks the node at first"},
        **{**_OF_KEYS, "only_blocking": {**_OF_KEYS["only_blocking"], **regions}},
    )


def namespace_pair() -> Pair:
    reaches = Reach(_RUNNER, mapped=False), AsyncReach(_RUNNER, mapped=False)
    return Pair(Namespace(reaches[0], b"n"), AsyncNamespace(reaches[1], b"n"), **_OF_KEYS)


def cpu_pair() -> Pair:
    return Pair(
        CpuClient(_RUNNER),
        AsyncCpuClient(_RUNNER),
        not_awaited={
            "stats": _LOCAL,
            "submit": "gives a task",
            "submit_to": "gives a task",
            "map": "gives a stream; the calls begin at once",
            "starmap": "the same",
            "map_unordered": "the same",
        },
    )


def files(mode: str) -> tuple[RemoteFile, AsyncBinaryFile]:
    """A file object of each face that was never opened; the blocking one is closed at once."""

    class Silent:
        def run(self, _call: Any) -> None:
            return None

    cursor = Cursor(1, name="/n1/file", mode=parse_mode(mode))
    raw = RemoteFile(Silent(), cursor)  # type: ignore[arg-type]
    raw.close()
    there = AsyncBinaryFile(_RUNNER, cursor, 1)
    there._closed = True
    return raw, there


def raw_file_pair() -> Pair:
    raw, there = files("r+")
    return Pair(
        raw,
        there,
        only_blocking={"fileno": _NO_DESCRIPTOR, "readall": "read"},
        only_asyncio={"read1": "of buffered files, which are the same class"},
        not_awaited=_FILE_LOCAL,
    )


_FILE_LOCAL = dict.fromkeys(("readable", "writable", "seekable", "isatty"), _LOCAL)


def buffered_file_pair() -> Pair:
    return Pair(
        io.BufferedRandom(io.BytesIO()),  # type: ignore[arg-type]
        files("r+")[1],
        only_blocking={
            "fileno": _NO_DESCRIPTOR,
            "detach": _INSIDE,
            "raw": _INSIDE,
            "peek": "read1 and seek back",
            "readinto1": "read1",
        },
        only_asyncio={"descriptor": "of `raw`", "status": "of `raw`", "sync": "of `raw`"},
        not_awaited=_FILE_LOCAL,
    )


def text_file_pair() -> Pair:
    text: Any = io.TextIOWrapper(io.BytesIO())
    text.mode = "r+"  # as `open` sets it
    return Pair(
        text,
        AsyncTextFile(files("r+")[1], text_format(None, None, None), mode="r+", line_buffering=False),
        only_blocking={
            "fileno": _NO_DESCRIPTOR,
            "detach": _INSIDE,
            "write_through": _INSIDE,
            "reconfigure": "open it again",
        },
        only_asyncio={"status": "of `buffer.raw`", "sync": "of `buffer.raw`"},
        not_awaited=_FILE_LOCAL,
    )


CLIENTS = [
    Pair(Cloud(_RUNNER), aio.AsyncCloud(_RUNNER), read_there={"nodes": "asks the node"}),
    cpu_pair(),
    memory_pair(),
    namespace_pair(),
    Pair(
        FilesClient(_RUNNER),
        AsyncFilesClient(_RUNNER),
        only_blocking={"fs": "what calls fsspec's blocking file systems is not asyncio"},
    ),
    Pair(
        Region(_RUNNER, 1),
        AsyncRegion(_RUNNER, 1),
        not_awaited={"view": "gives a context manager"},
        read_there={"size": "may ask the node", "node": "asks the node"},
    ),
    Pair(
        Client(_NOWHERE),
        AsyncClient(_NOWHERE),
        only_blocking={"exchange": "for mounts, whose workers are threads"},
        not_awaited={"stats": _LOCAL, "give": _LOCAL},
    ),
]
FILES = [raw_file_pair(), buffered_file_pair(), text_file_pair()]


def each(pairs: list[Pair]) -> Any:
    ids = [f"{type(pair.blocking).__name__}-{type(pair.asyncio).__name__}" for pair in pairs]
    return pytest.mark.parametrize("pair", pairs, ids=ids)


@each(CLIENTS + FILES)
def test_no_name_is_on_one_side_only(pair: Pair) -> None:
    """Both have the same names but for those that are explained, and nothing is explained that is not so."""
    blocking = {_SPECIAL.get(name, name) for name in names(pair.blocking)}
    there = names(pair.asyncio)
    assert (blocking - there, there - blocking) == (set(pair.only_blocking), set(pair.only_asyncio))


def shared(pair: Pair) -> list[str]:
    return sorted(name for name in names(pair.blocking) & names(pair.asyncio) if not name.startswith("_"))


@each(CLIENTS + FILES)
def test_what_asks_the_node_is_awaited(pair: Pair) -> None:
    """A method is awaited in asyncio unless it is explained, and a value that asks nobody is a value."""
    plain, read = set(), set()
    for name in shared(pair):
        here, there = kind(pair.blocking, name), kind(pair.asyncio, name)
        assert (here == "read") == (there == "read") or name in pair.read_there, name
        if there == "called":
            plain.add(name)
        if here == "read" != there:
            read.add(name)
    assert (plain, read) == (set(pair.not_awaited), set(pair.read_there))


@each(CLIENTS)
def test_methods_take_the_same(pair: Pair) -> None:
    """A method has the same parameters and defaults in both, unless it is explained."""
    differing = {
        name
        for name in shared(pair)
        if kind(pair.blocking, name) == "called"
        and parameters(getattr(type(pair.blocking), name)) != parameters(getattr(type(pair.asyncio), name))
    }
    assert differing == set(pair.parameters)


def test_connecting_takes_the_same() -> None:
    """`virgo.connect` and `virgo.aio.connect` have the same parameters."""
    assert virgo.aio is aio
    assert parameters(connect) == parameters(aio.connect)


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"target": "unix:/nowhere"}, {"embedded": False}])
def test_connecting_fails_alike(options: dict[str, Any], tmp_path: Path) -> None:
    """What is wrong with the arguments, or with the cloud, is the same error with the same words."""
    with pytest.raises(VirgoError) as blocking:
        connect(home=tmp_path, **options)
    with pytest.raises(VirgoError) as awaited:
        asyncio.run(aio.connect(home=tmp_path, **options))
    assert (awaited.type, str(awaited.value)) == (blocking.type, str(blocking.value))


def test_a_name_on_one_side_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees a method that only one face gets, one that is not awaited, and a new parameter."""
    for target in (CpuClient, AsyncCpuClient):
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(target, "novel", lambda self: None, raising=False)
            test_no_name_is_on_one_side_only(cpu_pair())

    def plain(self: Any, name: str = "") -> None:
        del self, name

    for check in (test_what_asks_the_node_is_awaited, test_methods_take_the_same):
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(AsyncCpuClient, "unpublish", plain)
            check(cpu_pair())


def test_the_blocking_face_does_without_asyncio() -> None:
    """`import virgo` and the blocking clients leave asyncio alone, which costs as much as all the rest."""
    program = (
        "import sys, virgo, virgo.cloud, virgo.wire.client\n"
        "import virgo.memory.client, virgo.files.client, virgo.cpu.client\n"
        "assert 'asyncio' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
