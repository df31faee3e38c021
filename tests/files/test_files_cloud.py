"""Files on real nodes: written here, read there, by Python, a Redis client, typed text and asyncio."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import redis

from virgo import aio
from virgo.cloud import Cloud
from virgo.errors import BadArgument, BadDescriptor, FileMissing, NodeLost, NotLoaded, PathEscape
from virgo.limits import NODE_LOST_S
from virgo.members import node_of

_serial = count(1)


@pytest.fixture
def top() -> str:
    """A directory name of the test's own."""
    return f"files-test-{os.getpid()}-{next(_serial)}"


@pytest.fixture(scope="module")
def clients(cloud3: Any) -> Iterator[dict[str, Cloud]]:
    """A Python connection through each node."""
    opened = {name: cloud3.connect(name) for name in ("n1", "n2", "n3")}
    yield opened
    for client in opened.values():
        client.close()


def redis_client(cloud: Any, node: str, **options: Any) -> redis.Redis:
    """redis-py on the files port of a node."""
    return redis.Redis(port=cloud.ports(node)["files"], password=cloud.token, **options)


def say(cloud: Any, node: str, *lines: bytes) -> list[bytes]:
    """Type lines at the port of a node, as by telnet; the first lines of the answers."""
    with (
        socket.create_connection(("127.0.0.1", cloud.ports(node)["files"]), 10) as connection,
        connection.makefile("rwb") as stream,
    ):
        answers = []
        for line in (b"AUTH " + cloud.token.encode(), *lines):
            stream.write(line + b"\r\n")
            stream.flush()
            answer = stream.readline().rstrip()
            if answer[:1] == b"$":
                answer = stream.read(int(answer[1:]) + 2)[:-2]
            answers.append(answer)
        return answers[1:]


def test_three_clients_one_file(cloud3: Any, clients: dict[str, Cloud], top: str) -> None:
    """Written by Python on n1, read by redis-py on n2 and by typed text on n3, and the other way round."""
    path = f"/n3/{top}/shared"
    with clients["n1"].files.open(path, "w") as file:
        print("from python", file=file)
    with redis_client(cloud3, "n2") as client:
        opened = client.execute_command("VIRGO_OPEN", path)
        numbers = {member.name: member.number for member in clients["n1"].nodes}
        assert node_of(opened) == numbers["n3"]
        assert client.execute_command("VIRGO_READ", opened, 100, 0) == b"from python\n"
        assert client.execute_command("VIRGO_WRITE", opened, b"from redis,", 12) == 11
    name = str(opened).encode()
    answers = say(
        cloud3,
        "n1",
        b"virgo_cloud_read(%b,none,11,12)" % name,
        b'virgo_cloud_write(%b," text, (typed)",14,23)' % name,
        b"VIRGO_READ %b 100 23" % name,
        b"virgo_close(%b)" % name,
        b"virgo_cloud_close(%b)" % name,
    )
    assert answers[:4] == [b"from redis,", b":14", b" text, (typed)", b"+OK"]
    assert answers[4].startswith(b"-BADFD")
    assert clients["n2"].files.read_text(path) == "from python\nfrom redis, text, (typed)"


def test_a_descriptor_belongs_to_no_connection(cloud3: Any, top: str) -> None:
    """Each command on a connection of its own, as redis-cli does it, on changing nodes."""
    opened: Any = None
    for number, request in enumerate(
        [
            ("VIRGO_OPEN", f"{top}/placed"),
            ("VIRGO_WRITE", b"0123456789", 0),
            ("FILES.SYNC",),
            ("VIRGO_READ", 4, 3),
            ("VIRGO_CLOSE",),
        ]
    ):
        with redis_client(cloud3, f"n{number % 3 + 1}") as client:
            rest = request[1:] if opened is None else (opened, *request[1:])
            reply = client.execute_command(request[0], *rest)
            opened = reply if opened is None else opened
            if request[0] == "VIRGO_READ":
                assert reply == b"3456"
            if request[0] == "VIRGO_CLOSE":
                with pytest.raises(redis.ResponseError, match="BADFD"):
                    client.execute_command("VIRGO_READ", opened, 1, 0)


def test_placed_files(clients: dict[str, Cloud], top: str) -> None:
    """A placed file is the same file from every node; moved and removed it leaves nothing behind."""
    files = {name: client.files for name, client in clients.items()}
    files["n1"].write_bytes(f"{top}/a", b"a" * 100)
    assert files["n3"].read_bytes(f"/pool/{top}/a") == b"a" * 100
    files["n2"].write_bytes(f"/{top}/b", b"b")
    assert [item.name for item in files["n3"].ls(f"/{top}")] == ["a", "b"]
    files["n3"].rename(f"{top}/a", f"{top}/b")
    assert files["n1"].read_bytes(f"{top}/b") == b"a" * 100
    assert not files["n1"].exists(f"{top}/a")
    files["n2"].remove(f"{top}/b")
    with pytest.raises(FileMissing):
        files["n1"].open(f"{top}/b")
    files["n1"].remove(top)
    assert top not in [item.name for item in files["n1"].ls("/pool")]
    assert [item.name for item in files["n2"].ls("/")] == ["n1", "n2", "n3", "pool"]


@pytest.mark.parametrize(
    "path",
    [
        "/n3/../../../etc/passwd",
        "/n3/..",
        "../etc/passwd",
        "/pool/../../etc/passwd",
        "/n2/out/passwd",
        "/n3/out2",
    ],
)
def test_hostile_paths(cloud3: Any, clients: dict[str, Cloud], path: str) -> None:
    """Dots and links that lead out are refused from every node, and the nodes go on."""
    for name, link in (("n2", "out"), ("n3", "out2")):
        place = Path(cloud3.home, "nodes", name, "files", link)
        if not place.is_symlink():
            place.symlink_to("/etc" if link == "out" else "/etc/passwd")
    for client in clients.values():
        for mode in ("r", "w", "a"):
            with pytest.raises(PathEscape):
                client.files.open(path, mode)
    assert all(node["state"] == "up" for node in cloud3.status()["nodes"])


def test_all_bytes_of_a_big_file(clients: dict[str, Cloud], top: str) -> None:
    """A file larger than a request's bound travels in pieces through a third node, whole."""
    data = os.urandom(1 << 20) * 40
    assert clients["n1"].files.write_bytes(f"/n2/{top}/big", data) == len(data)
    assert clients["n3"].files.read_bytes(f"/n2/{top}/big") == data
    with clients["n3"].files.open(f"/n2/{top}/big", "rb") as file:
        file.seek(-10, 2)
        assert file.read() == data[-10:]
    clients["n1"].files.remove(f"/n2/{top}/big")


def test_many_at_once(clients: dict[str, Cloud], top: str) -> None:
    """Threads on all nodes that append to one file and read others lose and mix nothing."""

    def work(number: int) -> None:
        files = clients[f"n{number % 3 + 1}"].files
        own = f"/n{(number + 1) % 3 + 1}/{top}/{number}"
        for step in range(10):
            with files.open(f"/n2/{top}/log", "a") as log:
                log.write(f"{number} {step}\n")
            files.write_bytes(own, b"%d" % number * (step + 1))
            assert files.read_bytes(own) == b"%d" % number * (step + 1)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    lines = clients["n1"].files.read_text(f"/n2/{top}/log").splitlines()
    assert sorted(lines) == sorted(f"{number} {step}" for number in range(6) for step in range(10))


def test_asyncio(cloud3: Any, top: str) -> None:
    """The asyncio client does the same operations, many at once on one loop."""

    async def main() -> None:
        async with await aio.connect(f"unix:{cloud3.socket('n1')}", home=cloud3.home) as cloud:
            files = cloud.files
            await files.mkdir(f"/n2/{top}")
            await asyncio.gather(*[files.write_bytes(f"/n2/{top}/{n}", b"%d" % n * n) for n in range(20)])
            assert {item.name for item in await files.ls(f"/n2/{top}")} == {str(n) for n in range(20)}
            contents = await asyncio.gather(*[files.read_bytes(f"/n2/{top}/{n}") for n in range(20)])
            assert contents == [b"%d" % n * n for n in range(20)]
            descriptor = await files.open_descriptor(f"/n2/{top}/5", "r+")
            assert await files.write(descriptor, b"x", 2) == 1
            assert await files.read(descriptor, 10, 0) == b"55x55"
            await files.sync(descriptor)
            await files.close(descriptor)
            with pytest.raises(BadDescriptor):
                await files.close(descriptor)
            assert not await files.exists(f"/n2/{top}/absent")

    asyncio.run(main())


def test_asyncio_file_objects(cloud3: Any, clients: dict[str, Cloud], top: str, tmp_path: Path) -> None:
    """File objects, whole texts and copies of asyncio are the same files as those of the blocking client."""
    lines = [f"{number} é\n" for number in range(50_000)]
    (tmp_path / "local").write_text("".join(lines), encoding="utf-8")

    async def main() -> None:
        async with await aio.connect(f"unix:{cloud3.socket('n1')}", home=cloud3.home) as cloud:
            files = cloud.files
            async with await files.open(f"/n2/{top}/lines", "w") as file:
                await file.writelines(lines)
                await files.sync(file)
            async with await files.open(Path(f"/n2/{top}/lines")) as file:
                assert await file.readline() == lines[0]
                place = await file.tell()
                assert [line async for line in file] == lines[1:]
                await file.seek(place)
                assert await file.read(len(lines[1])) == lines[1]
            async with await files.open(f"/n2/{top}/lines", "r+b") as file:
                await file.seek(-1, 2)
                await file.write(b"!\n")
                assert await file.tell() == (await file.status()).size + 1
            assert await files.read_text(f"/n2/{top}/lines") == "".join(lines)[:-1] + "!\n"
            assert await files.write_text(f"{top}/placed", "ü") == 2
            assert await files.get(f"/n2/{top}/lines", tmp_path / "got") == (tmp_path / "got").stat().st_size
            assert await files.put(tmp_path / "local", f"/n3/{top}/put", durable=True) > 0

    asyncio.run(main())
    files = clients["n3"].files
    assert files.read_text(f"{top}/placed") == "ü"
    assert files.read_bytes(f"/n2/{top}/lines") == (tmp_path / "got").read_bytes()
    assert files.read_bytes(f"/n3/{top}/put") == (tmp_path / "local").read_bytes()


def test_the_end_of_a_node_under_asyncio_files(make_cloud: Callable[..., Any]) -> None:
    """kill -9 of the node that holds an open file: bounded errors, then the gathered text gets there."""

    async def work(cloud: Any, pid: int) -> None:
        async with await aio.connect(f"unix:{cloud.socket('n1')}", home=cloud.home) as connected:
            async with await connected.files.open("/n2/kept", "w") as file:
                await file.write("acknowledged")
                os.kill(pid, signal.SIGKILL)
                deadline = time.monotonic() + 60
                while True:  # the supervisor starts it anew
                    try:
                        await file.flush()
                        break
                    except (NodeLost, NotLoaded):
                        assert time.monotonic() < deadline
                        await asyncio.sleep(0.05)
            assert await connected.files.read_text("/n2/kept") == "acknowledged"

    cloud = make_cloud(2)
    asyncio.run(work(cloud, cloud.node("n2")["pid"]))


def test_a_pipeline_keeps_its_order(cloud3: Any, top: str) -> None:
    """Writes, reads and closes sent at once on one connection take effect one after the other."""
    with redis_client(cloud3, "n1") as client:
        opened = [client.execute_command("VIRGO_OPEN", f"/{node}/{top}/order") for node in ("n1", "n2")]
        for descriptor in opened:
            pipeline = client.pipeline(transaction=False)
            for step in range(50):
                pipeline.execute_command("VIRGO_WRITE", descriptor, b"%02d" % step, 0)
                pipeline.execute_command("VIRGO_READ", descriptor, 2, 0)
            pipeline.execute_command("VIRGO_CLOSE", descriptor)
            pipeline.execute_command("VIRGO_READ", descriptor, 2, 0)
            replies = pipeline.execute(raise_on_error=False)
            assert replies[1:100:2] == [b"%02d" % step for step in range(50)]
            assert isinstance(replies[-1], redis.ResponseError)


def test_the_end_of_a_node(make_cloud: Callable[..., Any]) -> None:
    """kill -9 of the node that holds files: a bounded error, and its descriptors come back with it."""
    cloud = make_cloud(2)
    with cloud.connect("n1") as client:
        files = client.files
        descriptor = files.open_descriptor("/n2/kept", "w+")
        assert files.write(descriptor, b"acknowledged", 0) == 12
        os.kill(cloud.node("n2")["pid"], signal.SIGKILL)
        start = time.monotonic()
        failures = 0
        while True:  # the supervisor starts it anew
            asked = time.monotonic()
            try:
                assert files.read(descriptor, 100, 0) == b"acknowledged"
                break
            except (NodeLost, NotLoaded):
                failures += 1
                assert time.monotonic() - asked < NODE_LOST_S + 1
                assert time.monotonic() - start < 60
                time.sleep(0.05)
        assert files.write(descriptor, b"!", 12) == 1
        files.close(descriptor)
        assert files.read_bytes("/n2/kept") == b"acknowledged!"


def test_figures(cloud3: Any, clients: dict[str, Cloud]) -> None:
    """The module's figures are in its stats and in the node's INFO."""
    stats = clients["n1"].files.stats()
    assert {
        "open",
        "live",
        "reads",
        "reads_cached",
        "writes",
        "bytes_read",
        "bytes_written",
        "forwarded",
    } <= set(stats)
    with redis_client(cloud3, "n1") as client:
        assert json.loads(client.execute_command("FILES.STATS"))["writes"] == stats["writes"]


def test_paths_may_be_path_objects_and_nothing_else_but_text(cloud3: Any) -> None:
    """A pathlib path names the same file as its text; a number is refused, not taken for a name."""
    with cloud3.connect("n1") as cloud:
        place = Path("/n2/paths/object.txt")
        cloud.files.write_bytes(place, b"by a path")
        with cloud.files.open(place) as file:
            assert file.read() == "by a path"
        assert cloud.files.read_bytes(str(place)) == b"by a path"
        with pytest.raises(BadArgument, match="path is text"):
            cloud.files.open(3)  # type: ignore[arg-type]
