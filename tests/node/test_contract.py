"""The contract for scripts: redis-cli, redis-py, telnet and Python against three real nodes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis

from conftest import RunningCloud
from virgo.members import PORTS


def redis_of(cloud: RunningCloud, node: str, port: str, **options: Any) -> redis.Redis:
    return redis.Redis(host="127.0.0.1", port=cloud.ports(node)[port], password=cloud.token, **options)


def redis_cli(cloud: RunningCloud, node: str, port: str, *words: str) -> str:
    result = subprocess.run(
        ["redis-cli", "-p", str(cloud.ports(node)[port]), "--no-auth-warning", *words],
        env={**os.environ, "REDISCLI_AUTH": cloud.token},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return result.stdout.removesuffix("\n")


def test_status_has_the_promised_shape(cloud3: RunningCloud) -> None:
    """`virgo status --json`: nodes with name, id, pid, state, socket, ports, load; engine with url, pid."""
    status = json.loads(cloud3.virgo("status", "--json").stdout)
    assert [node["name"] for node in status["nodes"]] == ["n1", "n2", "n3"]
    first = cloud3.ports("n1")
    offset = first["cpu"] - PORTS["cpu"]
    for index, node in enumerate(status["nodes"]):
        assert node["state"] == "up"
        assert Path(node["socket"]).is_socket()
        assert node["ports"] == {name: port + offset + index for name, port in PORTS.items()}
        assert Path(f"/proc/{node['pid']}").exists()
        assert node["id"]
        assert node["load"]["cpus"] >= 1
    assert status["engine"]["url"].startswith("nats://")
    assert Path(f"/proc/{status['engine']['pid']}").exists()
    token = cloud3.home / "token"
    assert token.stat().st_mode & 0o777 == 0o600


def test_memory_by_redis_cli_works_from_every_node(cloud3: RunningCloud) -> None:
    """VIRGO_MALLOC on one node; SET, GET and FREE on the others; an unknown id is a typed error."""
    identifier = redis_cli(cloud3, "n1", "memory", "VIRGO_MALLOC", "100")
    assert identifier.isdigit()
    assert redis_cli(cloud3, "n2", "memory", "VIRGO_SET", identifier, "hello cloud") == "OK"
    assert redis_cli(cloud3, "n3", "memory", "virgo_get", identifier) == "hello cloud"
    assert redis_cli(cloud3, "n3", "memory", "virgo_cloud_get", identifier) == "hello cloud"
    assert redis_cli(cloud3, "n2", "memory", "VIRGO_FREE", identifier) == "OK"
    for again in ("VIRGO_FREE", "VIRGO_GET"):
        assert redis_cli(cloud3, "n1", "memory", again, identifier).startswith("NOID")


def test_memory_by_redis_py_takes_any_bytes(cloud3: RunningCloud) -> None:
    """Values of every byte, empty and large, come back whole through another node."""
    with redis_of(cloud3, "n1", "memory") as one, redis_of(cloud3, "n3", "memory") as three:
        for value in (b"", bytes(range(256)), b"\r\n*3\r\n$1\r\n", os.urandom(10 << 20)):
            identifier = one.execute_command("VIRGO_MALLOC", max(1, len(value)))
            assert one.execute_command("VIRGO_SET", identifier, value) == b"OK"
            assert three.execute_command("VIRGO_GET", identifier) == value
            assert three.execute_command("VIRGO_FREE", identifier) == b"OK"


def test_files_by_redis_py_are_shared(cloud3: RunningCloud) -> None:
    """A descriptor opened through one node is written, read and closed through the others."""
    with (
        redis_of(cloud3, "n1", "files") as one,
        redis_of(cloud3, "n2", "files") as two,
        redis_of(cloud3, "n3", "files") as three,
    ):
        descriptor = one.execute_command("VIRGO_OPEN", "/n2/contract/a.txt")
        assert two.execute_command("VIRGO_WRITE", descriptor, b"0123456789", 0) == 10
        assert three.execute_command("VIRGO_READ", descriptor, 4, 3) == b"3456"
        assert one.execute_command("VIRGO_CLOSE", descriptor) == b"OK"
        with pytest.raises(redis.ResponseError, match="BADFD"):
            two.execute_command("VIRGO_READ", descriptor, 1, 0)
        with pytest.raises(redis.ResponseError, match="ESCAPE"):
            two.execute_command("VIRGO_OPEN", "/n2/../../../etc/passwd", "r")
        with pytest.raises(redis.ResponseError, match="NOENT"):
            two.execute_command("VIRGO_OPEN", "/n3/no/such", "r")


def test_clone_by_redis_cli(cloud3: RunningCloud) -> None:
    """An exported function by name with arguments; structured results as JSON; unknown names refused."""
    assert redis_cli(cloud3, "n1", "cpu", "VIRGO_CLONE", "add", "2", "3") == "5"
    words = json.loads(redis_cli(cloud3, "n2", "cpu", "VIRGO_CLONE", "wordcount", "a b a"))
    assert words == {"a": 2, "b": 1}
    assert redis_cli(cloud3, "n3", "cpu", "VIRGO_CLONE", "no_such").startswith("NOTEXPORTED")


def test_the_text_form_over_telnet(cloud3: RunningCloud) -> None:
    """A person with telnet allocates, sets, gets and frees in the reference's own form."""
    port = str(cloud3.ports("n2")["memory"])
    telnet = subprocess.Popen(
        ["telnet", "127.0.0.1", port], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert telnet.stdin is not None
    assert telnet.stdout is not None

    def ask(line: str) -> str:
        telnet.stdin.write(line + "\n")  # type: ignore[union-attr]
        return telnet.stdout.readline().strip()  # type: ignore[union-attr]

    try:
        for _ in range(3):  # Trying, Connected, Escape character
            telnet.stdout.readline()
        assert ask(f"AUTH {cloud3.token}") == "+OK"
        identifier = ask("virgo_cloud_malloc(100)").removeprefix(":")
        assert ask(f'virgo_cloud_set({identifier},"commas, and (brackets)")') == "+OK"
        assert ask(f"virgo_cloud_get({identifier})") == "$22"
        assert telnet.stdout.readline().strip() == "commas, and (brackets)"
        assert ask(f"virgo_cloud_free({identifier})") == "+OK"
        assert ask(f"virgo_cloud_free({identifier})").startswith("-NOID")
    finally:
        telnet.kill()
        telnet.wait()
        telnet.stdin.close()
        telnet.stdout.close()


def test_ports_without_a_module_say_so(cloud3: RunningCloud) -> None:
    """The ports of later modules answer PING and INFO, and NOTLOADED to everything else."""
    for name in ("events", "queue", "analytics"):
        with redis_of(cloud3, "n1", name) as client:
            assert client.ping()
            assert client.info()["node"] == "n1"
            with pytest.raises(redis.ResponseError, match=f"NOTLOADED.*{name}"):
                client.execute_command("QUEUE.PUT", "x")


def test_without_the_token_nothing_is_served(cloud3: RunningCloud) -> None:
    """Over TCP a wrong or missing token is refused; the connection survives it."""
    with socket.create_connection(("127.0.0.1", cloud3.ports("n1")["memory"])) as plain:
        plain.settimeout(10)
        for line, answer in (("VIRGO_MALLOC 1", b"-NOAUTH"), ("AUTH x", b"-WRONGPASS"), ("PING", b"+PONG")):
            plain.sendall(line.encode() + b"\r\n")
            assert plain.recv(1000).startswith(answer)


def test_a_token_has_its_roles_and_no_more(cloud3: RunningCloud) -> None:
    """`read` shows and does not change; `write` changes and does not show; neither ships code."""
    tokens = {role: cloud3.virgo("token", "create", f"t-{role}", "--role", role).stdout.strip() for role in
              ("read", "write")}  # fmt: skip
    ports = cloud3.ports("n1")
    reader, writer = (redis.Redis(port=ports["memory"], password=tokens[role]) for role in ("read", "write"))
    with redis_of(cloud3, "n1", "memory") as owner, reader, writer:
        owner.set("role:secret", "hidden")
        descriptor = owner.execute_command("VIRGO_OPEN", "/n2/contract/roles.txt", "w")
        for request in (("SET", "role:x", "1"), ("VIRGO_MALLOC", 1), ("VIRGO_CLOSE", descriptor)):
            with pytest.raises(redis.ResponseError, match="needs the role"):
                reader.execute_command(*request)
        for request in (
            ("GET", "role:secret"),
            ("GETDEL", "role:secret"),
            ("SET", "role:secret", "x", "GET"),
        ):
            with pytest.raises(redis.ResponseError, match="needs the role"):
                writer.execute_command(*request)
        for client in (reader, writer):
            with pytest.raises(redis.ResponseError, match="needs the role"):
                client.execute_command("CPU.CALL", "x", "y")
        assert reader.get("role:secret") == b"hidden"
        assert owner.execute_command("VIRGO_CLOSE", descriptor) == b"OK"


def test_python_by_connect_and_by_the_nine_calls(cloud3: RunningCloud) -> None:
    """The README's Python: connect, cpu, memory, files, nodes, and the C-shaped calls."""
    program = """
import virgo
cloud = virgo.connect()
assert [node.name for node in cloud.nodes] == ["n1", "n2", "n3"]
assert cloud.cpu.submit(pow, 2, 10).result() == 1024
assert list(cloud.cpu.map(lambda x: x * x, range(20))) == [x * x for x in range(20)]
with cloud.memory.malloc(100) as region:
    region.set(b"abc")
    assert region.get() == b"abc"
cloud.memory[b"contract"] = b"value"
assert cloud.memory[b"contract"] == b"value"
del cloud.memory[b"contract"]
with cloud.files.open("/n3/contract/b.txt", "w") as file:
    file.write("text")
with cloud.files.open("/n3/contract/b.txt") as file:
    assert file.read() == "text"
cloud.close()
i = virgo.virgo_malloc(10)
virgo.virgo_set(i, b"0123456789")
assert virgo.virgo_get(i) == b"0123456789"
virgo.virgo_free(i)
try:
    virgo.virgo_get(i)
except KeyError as error:
    assert "NOID" == error.code and error.hint
fd = virgo.virgo_open("/n2/contract/c.bin")
assert virgo.virgo_write(fd, b"xyz", 0) == 3
assert virgo.virgo_read(fd, 10, 1) == b"yz"
virgo.virgo_close(fd)
assert virgo.virgo_clone(max, 3, 4) == 4
assert virgo.virgo_clone("add", 3, 4) == 7
print("done")
"""
    result = subprocess.run(
        [sys.executable, "-c", program], env=cloud3.environment, capture_output=True, text=True, timeout=60
    )
    assert (result.stdout, result.stderr) == ("done\n", "")


def test_asyncio_has_the_same_surface(cloud3: RunningCloud) -> None:
    """virgo.aio: memory, files and cpu awaited."""
    from virgo import aio

    async def main() -> None:
        async with await aio.connect(f"unix:{cloud3.socket('n2')}", home=cloud3.home) as cloud:
            assert len(await cloud.nodes()) == 3
            region = await cloud.memory.malloc(10)
            await region.set(b"abc")
            assert await region.get() == b"abc"
            await region.free()
            assert await cloud.cpu.clone(pow, 2, 5) == 32
            await cloud.files.write_bytes("/n1/contract/d.bin", b"d" * 100)
            assert await cloud.files.read_bytes("/n1/contract/d.bin") == b"d" * 100

    asyncio.run(main())
