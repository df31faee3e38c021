"""The module in three joined nodes: the calls, their forms, forwarding, placement, faults."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from files.loopback import Cloud, Node
from virgo import context as contexts
from virgo.config import Config, FilesConfig, Placement
from virgo.context import Context, Identity
from virgo.errors import (
    BadArgument,
    BadConfig,
    BadDescriptor,
    Denied,
    DiskFull,
    FileMissing,
    FileRefused,
    FileThere,
    NodeLost,
    NoNode,
    PathEscape,
    TooLarge,
    VirgoError,
)
from virgo.files import descriptors, roots, service
from virgo.limits import FILE_IO_BYTES_MAX
from virgo.members import node_of
from virgo.wire.resp import OK

Test = Callable[[Node, Node, Node], Awaitable[None]]


def on_cloud(directory: Path, test: Test, config: Config | None = None) -> None:
    """Run the test on three fresh nodes."""

    async def main() -> None:
        async with Cloud(directory, 3, config) as nodes:
            await test(*nodes)

    asyncio.run(main())


def test_a_file_of_one_node_from_the_others(tmp_path: Path) -> None:
    """A descriptor sticks to its node and works on every node, in both forms of the calls."""

    async def test(n1: Node, n2: Node, n3: Node) -> None:
        opened = await n1.send("VIRGO_OPEN", "/n3/dir/file")
        assert node_of(opened) == 3
        assert await n2.send("VIRGO_WRITE", opened, b"hello world", 0) == 11
        assert await n1.send("virgo_cloud_write", opened, b"HELLO!", 5, 0) == 5
        assert await n1.send("VIRGO_READ", opened, 5, 6) == b"world"
        assert await n3.send("virgo_cloud_read", opened, "none", 5, 0) == b"HELLO"
        assert await n2.send("VIRGO_READ", opened, 100, 11) == b""
        assert await n2.send("VIRGO_READ", opened, 100, 2**63 - 1) == b""
        assert await n2.send("VIRGO_READ", opened, 0, 0) == b""
        assert await n2.send("FILES.SYNC", opened) is OK
        assert await n2.send("FILES.TRUNCATE", opened, 3) is OK
        assert json.loads(await n1.send("FILES.FSTAT", opened))["size"] == 3
        assert await n1.send("VIRGO_CLOSE", opened) is OK
        for node in (n1, n3):
            with pytest.raises(BadDescriptor):
                await node.send("VIRGO_READ", opened, 1, 0)
        assert (n3.directory / "files/dir/file").read_bytes() == b"HEL"

    on_cloud(tmp_path, test)


def test_bad_arguments_are_typed(tmp_path: Path) -> None:
    """Every wrong request has its own kind of error, here and on another node, and breaks nothing."""

    async def test(n1: Node, _n2: Node, n3: Node) -> None:
        opened = await n1.send("VIRGO_OPEN", "/n3/file")
        reading = await n1.send("VIRGO_OPEN", "/n3/file", "r")
        writing = await n1.send("VIRGO_OPEN", "/n3/file", "a")
        await n1.send("FILES.MKDIR", "/n3/dir")
        cases: list[tuple[type[VirgoError], tuple[object, ...]]] = [
            (BadArgument, ("VIRGO_READ", opened, -1, 0)),
            (BadArgument, ("VIRGO_READ", opened, 1, -1)),
            (BadArgument, ("VIRGO_READ", opened, "x", 0)),
            (BadArgument, ("VIRGO_READ", "", 1, 0)),
            (BadArgument, ("VIRGO_READ", opened, 1, 2**63)),
            (BadArgument, ("VIRGO_READ", opened, 1)),
            (BadArgument, ("VIRGO_WRITE", opened, b"x", -1)),
            (BadArgument, ("VIRGO_WRITE", opened, b"x", -1, 0)),
            (TooLarge, ("VIRGO_READ", opened, FILE_IO_BYTES_MAX + 1, 0)),
            (TooLarge, ("VIRGO_WRITE", opened, bytes(FILE_IO_BYTES_MAX + 1), 0)),
            (BadDescriptor, ("VIRGO_READ", 0, 1, 0)),
            (BadDescriptor, ("VIRGO_READ", -5, 1, 0)),
            (BadDescriptor, ("VIRGO_CLOSE", opened + 1000)),
            (BadDescriptor, ("VIRGO_CLOSE", (99 << 48) + 1)),
            (FileRefused, ("VIRGO_READ", writing, 1, 0)),
            (FileRefused, ("VIRGO_WRITE", reading, b"x", 0)),
            (FileRefused, ("FILES.TRUNCATE", reading, 0)),
            (FileRefused, ("VIRGO_WRITE", opened, b"x", 2**63 - 1)),
            (FileRefused, ("VIRGO_OPEN", "/n3/dir")),
            (FileRefused, ("VIRGO_OPEN", "/n3/file/", "r")),
            (FileRefused, ("VIRGO_OPEN", "/n3/file/below", "w")),
            (FileRefused, ("VIRGO_OPEN", "/")),
            (FileRefused, ("VIRGO_OPEN", "/n3")),
            (FileRefused, ("VIRGO_OPEN", "/pool")),
            (FileMissing, ("VIRGO_OPEN", "/n3/absent", "r")),
            (FileMissing, ("VIRGO_OPEN", "absent", "r+")),
            (FileThere, ("VIRGO_OPEN", "/n3/file", "x")),
            (FileThere, ("FILES.MKDIR", "/n3/dir")),
            (FileMissing, ("FILES.STAT", "/n3/absent")),
            (FileMissing, ("FILES.REMOVE", "/n3/absent")),
            (FileMissing, ("FILES.LIST", "/n3/absent")),
            (FileRefused, ("FILES.LIST", "/n3/file")),
            (FileRefused, ("FILES.REMOVE", "/")),
            (FileRefused, ("FILES.REMOVE", "/n3")),
            (FileRefused, ("FILES.RENAME", "/n3/file", "/n1/file")),
            (FileRefused, ("FILES.RENAME", "/n3/file", "/pool/file")),
            (FileRefused, ("FILES.RENAME", "/n3", "/n1")),
            (BadArgument, ("VIRGO_OPEN", "/n3/x", "rw")),
            (BadArgument, ("VIRGO_OPEN", "/n3/x", "")),
            (BadArgument, ("VIRGO_OPEN", "/n3/\0")),
            (BadArgument, ("VIRGO_OPEN", "")),
            (TooLarge, ("VIRGO_OPEN", "/n3/" + "x" * 256)),
            (TooLarge, ("VIRGO_OPEN", "/n3/" + "x/" * 3000)),
            (PathEscape, ("VIRGO_OPEN", "/n3/../n1/x")),
            (PathEscape, ("FILES.LIST", "/n3/..")),
            (PathEscape, ("FILES.RENAME", "/n3/file", "/n3/../../x")),
            (NoNode, ("FILES.HERE", "STAT", "/n3/file")),
            (BadArgument, ("FILES.HERE", "NONSENSE", "/n1/file")),
        ]
        for kind, request in cases:
            with pytest.raises(VirgoError) as caught:
                await n1.send(*request)
            assert type(caught.value) is kind, (request[:3], caught.value)
        assert await n3.send("VIRGO_READ", opened, 1, 0) == b""
        assert [item["name"] for item in json.loads(await n1.send("FILES.LIST", "/n3"))] == ["dir", "file"]

    on_cloud(tmp_path, test)


def test_links_do_not_lead_out_of_an_export(tmp_path: Path) -> None:
    """Links in an export that point out are refused for opening and listing, here and elsewhere."""
    (tmp_path / "secret").write_bytes(b"secret")
    export = tmp_path / "export"
    export.mkdir()
    (export / "out").symlink_to(tmp_path / "secret")
    (export / "up").symlink_to("..")
    os.mkfifo(export / "fifo")

    async def test(n1: Node, _n2: Node, _n3: Node) -> None:
        for node in ("/n1", "/n2"):
            for path in ("out", "up/secret", "../secret", "up/../secret"):
                for mode in ("r", "w", "r+"):
                    with pytest.raises(PathEscape):
                        await n1.send("VIRGO_OPEN", f"{node}/data/{path}", mode)
            with pytest.raises(PathEscape):
                await n1.send("FILES.LIST", f"{node}/data/up")
            with pytest.raises(FileRefused):
                await n1.send("VIRGO_OPEN", f"{node}/data/fifo", "r")
            kinds = {
                item["name"]: item["kind"] for item in json.loads(await n1.send("FILES.LIST", f"{node}/data"))
            }
            assert kinds == {"out": "link", "up": "link", "fifo": "FIFO"}
        names = [item["name"] for item in json.loads(await n1.send("FILES.LIST", "/n2"))]
        assert names == ["data", "fixed"]
        for request in (
            ("VIRGO_OPEN", "/n2/fixed/new"),
            ("VIRGO_OPEN", "/n1/fixed/secret", "r+"),
            ("FILES.REMOVE", "/n1/fixed/secret"),
            ("FILES.MKDIR", "/n1/fixed/dir"),
            ("FILES.RENAME", "/n1/fixed/secret", "/n1/moved"),
        ):
            with pytest.raises(FileRefused, match="read-only"):
                await n1.send(*request)
        opened = await n1.send("VIRGO_OPEN", "/n2/fixed/secret", "r")
        assert await n1.send("VIRGO_READ", opened, 10, 0) == b"secret"

    exports = {"data": str(export), "fixed": str(tmp_path)}
    on_cloud(tmp_path / "home", test, Config(files=FilesConfig(exports=exports, read_only=["fixed"])))
    assert (tmp_path / "secret").read_bytes() == b"secret"


@pytest.mark.parametrize(
    "files",
    [
        FilesConfig(exports={"a/b": "/tmp"}),
        FilesConfig(exports={"data": "relative"}),
        FilesConfig(exports={"data": "/tmp"}, read_only=["date"]),
    ],
)
def test_a_wrong_configuration_stops_the_module(tmp_path: Path, files: FilesConfig) -> None:
    """An export that cannot be served is said at start."""

    async def test(*_nodes: Node) -> None:
        raise AssertionError("it started")

    with pytest.raises(BadConfig):
        on_cloud(tmp_path, test, Config(files=files))


def test_an_export_that_went_away_is_named_and_may_come_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A node starts without it, says so in its log and to who asks, and serves it once it is there."""
    disk = tmp_path / "disk"

    async def test(n1: Node, *_nodes: Node) -> None:
        assert f"the export data cannot be served: {disk} is not there" in caplog.text
        for request in (("VIRGO_OPEN", "/n1/data/x", "r"), ("FILES.LIST", "/n1/data")):
            with pytest.raises(FileMissing) as caught:
                await n1.send(*request)
            assert f"{disk}, the directory of the export 'data', is not there" in caught.value.message
            assert "doctor" in caught.value.hint
        disk.mkdir()
        (disk / "x").write_bytes(b"back")
        opened = await n1.send("VIRGO_OPEN", "/n1/data/x", "r")
        assert await n1.send("VIRGO_READ", opened, 9, 0) == b"back"
        await n1.stop()
        await n1.module.start()
        disk.rename(tmp_path / "elsewhere")
        with pytest.raises(FileMissing, match="the directory of the export 'data'"):
            await n1.send("VIRGO_READ", opened, 9, 0)
        (tmp_path / "elsewhere").rename(disk)
        assert await n1.send("VIRGO_READ", opened, 9, 0) == b"back"

    on_cloud(tmp_path / "home", test, Config(files=FilesConfig(exports={"data": str(disk)})))


def test_a_node_sweeps_idle_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the module is up it looks for them by itself; the one who comes back is told through any node."""
    monkeypatch.setattr(service, "DESCRIPTOR_SWEEP_S", 0.01)
    monkeypatch.setattr(descriptors, "DESCRIPTOR_IDLE_S", 0.0)

    async def test(n1: Node, n2: Node, _n3: Node) -> None:
        opened = await n1.send("VIRGO_OPEN", "/n1/file")
        async with asyncio.timeout(30):
            while json.loads(await n1.send("FILES.DESCRIPTORS")):
                await asyncio.sleep(0.01)
        with pytest.raises(BadDescriptor, match="has expired"):
            await n2.send("VIRGO_READ", opened, 1, 0)

    on_cloud(tmp_path, test)


def test_exports_are_looked_at_before_a_start(tmp_path: Path) -> None:
    """Absent directories and files in their place are BadConfig that names export, directory and remedy."""
    (tmp_path / "file").write_bytes(b"")
    roots.check_present(FilesConfig(exports={"data": str(tmp_path)}))
    for name, what in (("gone", "not there"), ("file", "not a directory")):
        with pytest.raises(BadConfig) as caught:
            roots.check_present(FilesConfig(exports={"good": str(tmp_path), name: str(tmp_path / name)}))
        assert f"files.exports: {name} = " in caught.value.message
        assert f"{tmp_path / name} is {what}" in caught.value.message
        assert name in caught.value.hint


def test_placement_by_room_and_register(tmp_path: Path) -> None:
    """A new placed file goes to the node with most room and is found from every node in any spelling."""

    async def test(n1: Node, n2: Node, n3: Node) -> None:
        n2.free_bytes *= 2
        opened = await n1.send("VIRGO_OPEN", "/data/deep/file", "w")
        assert node_of(opened) == 2
        assert await n3.send("VIRGO_WRITE", opened, b"content", 0) == 7
        n3.free_bytes *= 4
        for path in ("data/deep/file", "/pool/data/deep/file", "/data/x/../deep/file"):
            again = await n3.send("VIRGO_OPEN", path, "r")
            assert node_of(again) == 2
            assert await n1.send("VIRGO_READ", again, 100, 0) == b"content"
        assert json.loads(await n3.send("FILES.STAT", "data/deep/file"))["node"] == "n2"
        assert not (n2.directory / "files/data").exists(), "placed files cannot be reached as /n2/..."
        assert [item["name"] for item in json.loads(await n1.send("FILES.LIST", "/n2"))] == []
        other = await n1.send("VIRGO_OPEN", "data/deep/other")
        assert node_of(other) == 3
        entries = json.loads(await n1.send("FILES.LIST", "/pool/data/deep"))
        assert {item["name"]: item["node"] for item in entries} == {"file": "n2", "other": "n3"}
        assert [item["name"] for item in json.loads(await n1.send("FILES.LIST", "/"))] == [
            "n1",
            "n2",
            "n3",
            "pool",
        ]
        assert [item["name"] for item in json.loads(await n1.send("FILES.LIST", "pool"))] == ["data"]

    on_cloud(tmp_path, test)


def test_placement_by_rule(tmp_path: Path) -> None:
    """Rules decide before registers, and a rule that names no node is an error that names the rule."""
    rules = [Placement("/data", "n3"), Placement("/data/hot", "n1"), Placement("/lost", "n9")]

    async def test(_n1: Node, n2: Node, n3: Node) -> None:
        assert node_of(await n2.send("VIRGO_OPEN", "/data/x")) == 3
        assert node_of(await n2.send("VIRGO_OPEN", "data/hot/x")) == 1
        assert node_of(await n2.send("VIRGO_OPEN", "/pool/database")) == 2
        assert set(n2.cloud.registers.kept) == {"files/place/database"}
        with pytest.raises(NoNode, match=r"files\.placement puts '/pool/lost/x' on 'n9'") as caught:
            await n2.send("VIRGO_OPEN", "/lost/x")
        assert "rule" in caught.value.hint
        assert await n2.send("FILES.RENAME", "/data/x", "/data/y") is OK
        with pytest.raises(FileRefused, match="EXDEV"):
            await n2.send("FILES.RENAME", "/data/y", "/data/hot/y")
        assert await n2.send("FILES.REMOVE", "/data/y") is OK
        assert not (n3.directory / "files-pool/data/y").exists()

    on_cloud(tmp_path, test, Config(files=FilesConfig(placement=rules)))


def test_removing_and_renaming_keep_the_registers_right(tmp_path: Path) -> None:
    """After each change the registers name exactly the files that exist, on the nodes that hold them."""

    async def test(n1: Node, n2: Node, n3: Node) -> None:
        async def check(expected: dict[str, tuple[Node, bytes]]) -> None:
            registers = {
                name.removeprefix("files/place/"): json.loads(register.value)["node"]
                for name, register in n1.cloud.registers.kept.items()
            }
            assert registers == {path: node.number for path, (node, _) in expected.items()}
            on_disk = {}
            for node in (n1, n2, n3):
                top = node.directory / "files-pool"
                for path in top.rglob("*"):
                    if path.is_file():
                        on_disk[str(path.relative_to(top))] = (node, path.read_bytes())
            assert on_disk == expected
            for path, (_, content) in expected.items():
                opened = await n1.send("VIRGO_OPEN", path, "r")
                assert await n2.send("VIRGO_READ", opened, 100, 0) == content
                await n3.send("VIRGO_CLOSE", opened)

        async def create(via: Node, path: str, content: bytes) -> int:
            opened: int = await via.send("VIRGO_OPEN", path, "w+")
            await via.send("VIRGO_WRITE", opened, content, 0)
            return opened

        one, two = await create(n1, "a/one", b"1"), await create(n2, "b/two", b"2")
        await check({"a/one": (n1, b"1"), "b/two": (n2, b"2")})
        await n3.send("FILES.RENAME", "a/one", "c/three")
        await check({"c/three": (n1, b"1"), "b/two": (n2, b"2")})
        await n3.send("FILES.RENAME", "c/three", "b/two")  # replaces a file of another node
        await check({"b/two": (n1, b"1")})
        assert await n3.send("VIRGO_READ", one, 10, 0) == b"1"
        assert await n3.send("VIRGO_READ", two, 10, 0) == b"2", "the replaced file stays open"
        await n3.send("FILES.RENAME", "b/two", "b/two")
        await create(n1, "b/new", b"3")
        await n2.send("FILES.RENAME", "b/new", "b/two")  # replaces a file of the same node
        await check({"b/two": (n1, b"3")})
        await n2.send("FILES.REMOVE", "b/two")
        await check({})
        for request in (
            ("FILES.REMOVE", "b/two"),
            ("FILES.RENAME", "b/two", "x"),
            ("VIRGO_OPEN", "b/two", "r"),
        ):
            with pytest.raises(FileMissing):
                await n3.send(*request)
        await check({})
        await create(n3, "b/two", b"4")
        await check({"b/two": (n3, b"4")})

    on_cloud(tmp_path, test)


def test_what_a_crash_leaves_behind_is_not_found_again(tmp_path: Path) -> None:
    """A register without a file is no file, and a file without its register is cleared before a new one."""

    async def test(n1: Node, n2: Node, _n3: Node) -> None:
        opened = await n1.send("VIRGO_OPEN", "half", "w")
        await n1.send("VIRGO_WRITE", opened, b"old secret", 0)
        (n1.directory / "files-pool/half").rename(n1.directory / "files-pool/orphan")
        with pytest.raises(FileMissing):
            await n2.send("VIRGO_OPEN", "half", "r")
        fresh = await n2.send("VIRGO_OPEN", "half")
        assert node_of(fresh) == 1, "the register decides"
        other = await n1.send("VIRGO_OPEN", "orphan")
        assert await n1.send("VIRGO_READ", other, 100, 0) == b""

    on_cloud(tmp_path, test)


def test_one_place_for_a_file_that_all_create_at_once(tmp_path: Path) -> None:
    """Nodes that create the same placed file at the same moment agree on one file."""

    async def test(n1: Node, n2: Node, n3: Node) -> None:
        for step in range(10):
            opened = await asyncio.gather(*[node.send("VIRGO_OPEN", f"race{step}") for node in (n1, n2, n3)])
            assert len({node_of(item) for item in opened}) == 1
            outcomes = await asyncio.gather(
                *[node.send("VIRGO_OPEN", f"exclusive{step}", "x") for node in (n1, n2, n3)],
                return_exceptions=True,
            )
            assert sorted(type(item).__name__ for item in outcomes) == ["FileThere", "FileThere", "int"]

    on_cloud(tmp_path, test)


def test_directories_of_the_pool(tmp_path: Path) -> None:
    """A pool directory is one directory over all nodes: made, seen, refused while full, removed."""

    async def test(n1: Node, n2: Node, n3: Node) -> None:
        await n1.send("FILES.MKDIR", "/pool/dir/empty")
        assert json.loads(await n2.send("FILES.STAT", "dir/empty"))["kind"] == "directory"
        with pytest.raises(FileThere):
            await n3.send("FILES.MKDIR", "dir/empty")
        file = await n3.send("VIRGO_OPEN", "dir/empty/file", "w")
        assert node_of(file) == 3
        for request in (
            ("VIRGO_OPEN", "dir", "r"),
            ("FILES.REMOVE", "dir/empty"),
            ("FILES.RENAME", "dir", "d"),
        ):
            with pytest.raises(FileRefused):
                await n2.send(*request)
        with pytest.raises(FileThere):
            await n1.send("FILES.MKDIR", "dir/empty/file")
        for path in ("dir", "dir/empty", "dir/empty/file/below"):
            with pytest.raises(FileRefused):
                await n1.send("VIRGO_OPEN", path, "w")
        with pytest.raises(FileRefused):
            await n1.send("FILES.LIST", "dir/empty/file")
        await n2.send("FILES.REMOVE", "dir/empty/file")
        await n2.send("FILES.REMOVE", "dir/empty")
        with pytest.raises(FileMissing):
            await n1.send("FILES.LIST", "dir/empty")
        assert json.loads(await n1.send("FILES.LIST", "dir")) == []

    on_cloud(tmp_path, test)


def test_a_lost_node_is_named(tmp_path: Path) -> None:
    """Paths, placed files and descriptors of a lost node are NodeLost, and the rest goes on."""

    async def test(n1: Node, n2: Node, n3: Node) -> None:
        placed = await n3.send("VIRGO_OPEN", "dir/placed", "w")
        own = await n1.send("VIRGO_OPEN", "/n3/own", "w")
        await n1.send("VIRGO_OPEN", "dir/here", "w")
        n3.up = False
        for request in (
            ("VIRGO_OPEN", "dir/placed", "r"),
            ("VIRGO_OPEN", "/n3/own", "r"),
            ("VIRGO_OPEN", "/n3/new", "w"),
            ("VIRGO_READ", placed, 1, 0),
            ("VIRGO_WRITE", own, b"x", 0),
            ("VIRGO_CLOSE", own),
            ("FILES.REMOVE", "dir/placed"),
            ("FILES.STAT", "dir/placed"),
            ("FILES.LIST", "/n3"),
        ):
            with pytest.raises(NodeLost, match="n3"):
                await n2.send(*request)
        entries = json.loads(await n2.send("FILES.LIST", "dir"))
        assert {item["name"]: item.get("lost", False) for item in entries} == {"here": False, "placed": True}
        assert [item["name"] for item in json.loads(await n2.send("FILES.LIST", "/"))] == ["n1", "n2", "pool"]
        n3.up = True
        assert await n1.send("VIRGO_WRITE", own, b"back", 0) == 4

    on_cloud(tmp_path, test)


def test_descriptors_outlive_the_module(tmp_path: Path) -> None:
    """After a restart of its node a descriptor goes on, from every node."""

    async def test(n1: Node, _n2: Node, n3: Node) -> None:
        opened = await n1.send("VIRGO_OPEN", "/n3/file", "w+")
        await n1.send("VIRGO_WRITE", opened, b"before", 0)
        await n3.stop()
        await n3.module.start()
        assert await n1.send("VIRGO_WRITE", opened, b" after", 6) == 6
        assert await n3.send("VIRGO_READ", opened, 100, 0) == b"before after"
        shown = json.loads(await n3.send("FILES.DESCRIPTORS"))
        assert shown == [{"descriptor": opened, "path": "/n3/file"}]

    on_cloud(tmp_path, test)


def test_roles(tmp_path: Path) -> None:
    """With `read` one reads; what creates, changes or opens for writing needs `write`, on any way."""

    async def test(n1: Node, _n2: Node, _n3: Node) -> None:
        opened = await n1.send("VIRGO_OPEN", "/n2/file", "w+")
        await n1.send("VIRGO_WRITE", opened, b"data", 0)
        with contexts.using(Context(identity=Identity("reader", frozenset({"read"})))):
            reading = await n1.send("VIRGO_OPEN", "/n2/file", "r")
            assert await n1.send("VIRGO_READ", reading, 4, 0) == b"data"
            for request in (
                ("VIRGO_OPEN", "/n2/file"),
                ("VIRGO_OPEN", "/n2/new", "w"),
                ("VIRGO_OPEN", "/n1/file", "a"),
                ("FILES.HERE", "OPEN", "/n1/file", "w"),
                ("FILES.HERE", "OPEN", "/n1/file"),
                ("FILES.HERE", "REMOVE", "/n1/file"),
                ("FILES.HERE", "STALE", "/pool/file"),
            ):
                with pytest.raises(Denied):
                    await n1.send(*request)

    on_cloud(tmp_path, test)


def test_appending_ignores_the_position(tmp_path: Path) -> None:
    """Two nodes that append to one file lose nothing, whatever positions they give."""

    async def test(n1: Node, n2: Node, n3: Node) -> None:
        opened = [await node.send("VIRGO_OPEN", "/n3/log", "a+") for node in (n1, n2)]
        for step in range(50):
            await asyncio.gather(
                n1.send("VIRGO_WRITE", opened[0], b"one %02d\n" % step, 0),
                n2.send("VIRGO_WRITE", opened[1], b"two %02d\n" % step, 10**9),
            )
        lines = (await n3.send("VIRGO_READ", opened[0], 10_000, 0)).split(b"\n")[:-1]
        assert sorted(lines) == sorted(
            b"%b %02d" % (who, step) for who in (b"one", b"two") for step in range(50)
        )

    on_cloud(tmp_path, test)


def test_odd_names_and_big_holes(tmp_path: Path) -> None:
    """Names that are not UTF-8, 255 bytes long or full of quotes work; a sparse TiB takes no room."""

    async def test(n1: Node, n2: Node, _n3: Node) -> None:
        names = [b"caf\xe9", b"x" * 255, b"a\"b'c,d(e)\n\\", "日本".encode(), b"%41", b"-", b"~"]
        for name in names:
            for top in (b"/n2/odd/", b"/pool/odd/"):
                opened = await n1.send("VIRGO_OPEN", top + name)
                assert await n1.send("VIRGO_WRITE", opened, name, 0) == len(name)
                again = await n2.send("VIRGO_OPEN", top + name, "r")
                assert await n2.send("VIRGO_READ", again, 300, 0) == name
        for directory in ("/n2/odd", "/pool/odd"):
            assert len(json.loads(await n1.send("FILES.LIST", directory))) == len(names)
        for name in names:
            await n1.send("FILES.REMOVE", b"/pool/odd/" + name)
        assert not n1.cloud.registers.kept
        opened = await n1.send("VIRGO_OPEN", "/n2/sparse")
        assert await n1.send("VIRGO_WRITE", opened, b"end", 2**40) == 3
        assert await n1.send("VIRGO_READ", opened, 10, 2**40 - 2) == b"\0\0end"
        assert (n2.directory / "files/sparse").stat().st_blocks < 1000

    on_cloud(tmp_path, test)


def test_cached_reads_are_answered_at_once(tmp_path: Path) -> None:
    """What was just written is read without a thread; the answer is the same either way."""

    async def test(n1: Node, _n2: Node, _n3: Node) -> None:
        opened = await n1.send("VIRGO_OPEN", "/n1/file")
        data = os.urandom(3_000_000)
        await n1.send("VIRGO_WRITE", opened, data, 0)
        for size, position in (
            (10, 0),
            (100_000, 5),
            (2_000_000, 1),
            (10, 2_999_995),
            (10, 3_000_000),
            (5, 2**40),
        ):
            assert await n1.send("VIRGO_READ", opened, size, position) == data[position : position + size]
        stats = json.loads(await n1.send("FILES.STATS"))
        assert (stats["reads"], stats["reads_cached"]) == (6, 5)

    on_cloud(tmp_path, test)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    if os.geteuid() != 0 and not os.environ.get("CI"):
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=64", "virgo-test", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    """On a full disk the count is exact, then DiskFull; reading and closing go on, and room heals it."""

    async def test(n1: Node, _n2: Node, _n3: Node) -> None:
        opened = await n1.send("VIRGO_OPEN", "/n1/disk/big")
        await n1.send("VIRGO_WRITE", opened, b"k" * 4096, 0)
        count = await n1.send("VIRGO_WRITE", opened, b"b" * 1_000_000, 4096)
        assert 0 < count < 1_000_000
        assert (small_disk / "big").stat().st_size == 4096 + count
        with pytest.raises(DiskFull, match="ENOSPC"):
            await n1.send("VIRGO_WRITE", opened, b"more" * 4096, 4096 + count)
        with pytest.raises(DiskFull):
            for index in range(100):
                await n1.send("VIRGO_OPEN", f"/n1/disk/{index}", "w")
        assert await n1.send("VIRGO_READ", opened, 4096, 0) == b"k" * 4096
        await n1.send("FILES.TRUNCATE", opened, 4096)
        assert await n1.send("VIRGO_WRITE", opened, b"again", 4096) == 5
        assert await n1.send("VIRGO_CLOSE", opened) is OK

    on_cloud(tmp_path / "home", test, Config(files=FilesConfig(exports={"disk": str(small_disk)})))


def test_a_full_disk_under_the_table(small_disk: Path) -> None:
    """When the table cannot be written, opening is DiskFull, closing works, and later all is right."""

    async def test(n1: Node, *_others: Node) -> None:
        opened = [await n1.send("VIRGO_OPEN", "/n1/file", "w+") for _ in range(5)]
        (small_disk / "filler").touch()
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(b"x" * 512):
                pass
        with pytest.raises(DiskFull):
            for _ in range(100):
                one_more = await n1.send("VIRGO_OPEN", "/n1/file", "r")
                opened.append(one_more)
        assert await n1.send("VIRGO_CLOSE", opened[0]) is OK
        (small_disk / "filler").unlink()
        opened.append(await n1.send("VIRGO_OPEN", "/n1/file", "r"))
        await n1.stop()
        await n1.module.start()
        assert {item["descriptor"] for item in json.loads(await n1.send("FILES.DESCRIPTORS"))} == set(
            opened[1:]
        )

    async def main() -> None:
        async with Cloud(small_disk, 1) as nodes:
            await test(*nodes)

    asyncio.run(main())


def test_a_caller_that_goes_away_leaves_no_descriptor(tmp_path: Path) -> None:
    """An open that is cancelled while its thread works is closed when the thread is done."""

    async def test(n1: Node, _n2: Node, _n3: Node) -> None:
        for _ in range(20):
            task = asyncio.ensure_future(n1.send("VIRGO_OPEN", "/n1/file"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await n1.send("VIRGO_CLOSE", await task)
        async with asyncio.timeout(5):
            while json.loads(await n1.send("FILES.STATS"))["open"]:
                await asyncio.sleep(0.005)

    on_cloud(tmp_path, test)
