"""Faults: kill -9 of nodes, engine, clients and the supervisor; SIGSTOP; taken ports; two clouds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import until

from conftest import RunningCloud, stop_cloud
from virgo.cloud import connect
from virgo.engine.binary import find_binary
from virgo.errors import Busy, NodeLost, NotLoaded, NotRunning, PortTaken, UnknownId, UnsafeEngine, VirgoError
from virgo.limits import NODE_LOST_S
from virgo.node import control
from virgo.node.supervisor import UpOptions


def attempt(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except VirgoError as error:
        return error


def test_a_killed_node_is_named_replaced_and_has_lost_nothing(
    make_cloud: Callable[..., RunningCloud],
) -> None:
    """kill -9 of a node: NodeLost in time, the others go on, it is restarted, all data is there."""
    running = make_cloud(3)
    with running.connect("n1") as cloud:
        region = cloud.memory.malloc(1000, node="n2")
        region.set(b"acknowledged")
        cloud.files.write_bytes("/n2/kept.txt", b"on n2")
        old = running.node("n2")["pid"]
        os.kill(old, signal.SIGKILL)
        started = time.monotonic()
        first = attempt(region.get)
        assert time.monotonic() - started < NODE_LOST_S
        assert isinstance(first, NodeLost) or first == b"acknowledged", first
        if isinstance(first, NodeLost):
            assert "n2" in str(first)
            assert first.hint
        other = cloud.memory.malloc(10, node="n3")
        other.set(b"goes on")
        assert other.get() == b"goes on"
        until(lambda: attempt(region.get) == b"acknowledged", within_s=15, what="n2 is back with its memory")
        assert cloud.files.read_bytes("/n2/kept.txt") == b"on n2"
        assert running.node("n2")["pid"] != old


def test_a_stopped_node_is_lost_in_bounded_time_and_comes_back(
    make_cloud: Callable[..., RunningCloud],
) -> None:
    """SIGSTOP: calls to the node fail with NodeLost in time, it leaves the list, SIGCONT brings it back."""
    running = make_cloud(2)
    with running.connect("n1") as cloud:
        region = cloud.memory.malloc(10, node="n2")
        region.set(b"x")
        pid = running.node("n2")["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(NodeLost, match="n2"):
                cloud.client.execute("VIRGO_SET", region.id, b"y")
            assert time.monotonic() - started < NODE_LOST_S
            until(
                lambda: [n.name for n in cloud.nodes] == ["n1"],
                within_s=NODE_LOST_S,
                what="n2 is off the list",
            )
            assert cloud.memory.malloc(10).set(b"goes on") is None
        finally:
            os.kill(pid, signal.SIGCONT)
        until(lambda: len(cloud.nodes) == 2, within_s=10, what="n2 is back")
        assert cloud.client.execute("VIRGO_GET", region.id) in (b"x", b"y")


def test_a_killed_engine_is_restarted_and_nothing_is_forgotten(
    make_cloud: Callable[..., RunningCloud],
) -> None:
    """kill -9 of the engine: what exists stays usable, it is restarted, numbers and slots persist."""
    running = make_cloud(2)
    with running.connect("n1") as cloud:
        cloud.memory[b"before"] = b"1"
        region = cloud.memory.malloc(10, node="n2")
        region.set(b"x")
        old = running.status()["engine"]["pid"]
        os.kill(old, signal.SIGKILL)
        assert region.get() == b"x"
        assert cloud.memory[b"before"] == b"1"

        def back() -> bool:
            engine = running.status()["engine"]
            return engine["pid"] not in (0, None, old) and engine["connected"]

        until(back, within_s=20, what="the engine is back")
        until(
            lambda: attempt(lambda: cloud.memory.update({b"after": b"2"})) is None,
            within_s=15,
            what="new slots",
        )
        assert (cloud.memory[b"before"], cloud.memory[b"after"]) == (b"1", b"2")
        assert len(cloud.nodes) == 2


def test_a_killed_client_leaves_nothing_running(make_cloud: Callable[..., RunningCloud]) -> None:
    """kill -9 of a client: the calls that it had in flight are cancelled on their nodes."""
    running = make_cloud(2)
    program = """
import virgo
cloud = virgo.connect()
futures = [cloud.cpu.submit('sleep', 60) for _ in range(2)]
print('go', flush=True)
futures[0].result()
"""
    client = subprocess.Popen(
        [sys.executable, "-c", program], env=running.environment, stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "go\n"
    with running.connect("n1") as cloud:

        def outstanding() -> int:
            return sum(node.load.outstanding for node in cloud.nodes)

        until(lambda: outstanding() >= 1, within_s=10, what="the calls run")
        client.kill()
        client.wait()
        client.stdout.close()
        until(lambda: outstanding() == 0, within_s=10, what="the calls are cancelled")


def test_a_killed_supervisor_stops_nobody_and_down_finds_all(make_cloud: Callable[..., RunningCloud]) -> None:
    """kill -9 of `virgo up`: the nodes go on; `down` stops exactly them, and a new `up` starts clean."""
    running = make_cloud(2)
    record = control.running(running.home)
    assert record is not None
    os.kill(record["process"]["pid"], signal.SIGKILL)
    until(lambda: control.running(running.home) is None, within_s=5, what="the supervisor is dead")
    with running.connect("n2") as cloud:
        cloud.memory.malloc(1).set(b"x")
    pids = [node["pid"] for node in running.status()["nodes"]]
    stopped = control.stop(running.home)
    assert {"n1", "n2"} <= set(stopped)
    assert all(
        Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
        for pid in pids
        if Path(f"/proc/{pid}").exists()
    )
    with pytest.raises(NotRunning):
        control.stop(running.home)


def test_two_clouds_run_side_by_side(make_cloud: Callable[..., RunningCloud]) -> None:
    """Clouds of different homes share nothing: ids, tokens, names; stopping one leaves the other."""
    one, two = make_cloud(1), make_cloud(1)
    with one.connect() as first, two.connect() as second:
        region = first.memory.malloc(10)
        region.set(b"mine")
        with pytest.raises(UnknownId):
            second.client.execute("VIRGO_GET", region.id)
        stop_cloud(two.home)
        assert region.get() == b"mine"
    assert one.token != two.token


def test_a_second_up_is_refused(make_cloud: Callable[..., RunningCloud]) -> None:
    """One home has one cloud; the refusal says what to do."""
    running = make_cloud(1)
    with pytest.raises(Busy, match="already") as caught:
        control.start_detached(running.home, UpOptions(nodes=["n1"]))
    assert "virgo down" in caught.value.hint
    assert running.node("n1")["state"] == "up"


def test_a_taken_port_names_its_holder_and_the_remedy(tmp_path: Path) -> None:
    """A node whose port is held by another process does not start; the error names the process."""
    from conftest import free_offset
    from virgo.members import PORTS

    offset = free_offset()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", PORTS["memory"] + offset))
        holder.listen()
        options = UpOptions(nodes=["n1"], environment={"VIRGO_NODE_PORT_OFFSET": str(offset)})
        with pytest.raises(PortTaken) as caught:
            control.start_detached(tmp_path, options)
    assert str(PORTS["memory"] + offset) in str(caught.value)
    assert f"pid {os.getpid()}" in str(caught.value)
    assert "--port-offset" in caught.value.hint
    assert control.leftovers(tmp_path) == {}


def test_data_outlasts_down_and_up(make_cloud: Callable[..., RunningCloud]) -> None:
    """After `down` and `up` in the same home, memory, keys, files and the nodes' numbers are the same."""
    from conftest import start_cloud

    running = make_cloud(2)
    with running.connect() as cloud:
        region = cloud.memory.malloc(10, node="n2")
        region.set(b"kept")
        cloud.memory[b"key"] = b"kept too"
        cloud.files.write_bytes("/n2/f", b"file")
        descriptor = cloud.client.execute("VIRGO_OPEN", "/n2/f", "r")
        numbers = {node.name: node.number for node in cloud.nodes}
    stop_cloud(running.home)
    start_cloud(running.home, 2)
    with running.connect() as cloud:
        assert cloud.client.execute("VIRGO_GET", region.id) == b"kept"
        assert cloud.memory[b"key"] == b"kept too"
        assert cloud.files.read_bytes("/n2/f") == b"file"
        assert cloud.client.execute("VIRGO_READ", descriptor, 10, 0) == b"file"
        assert {node.name: node.number for node in cloud.nodes} == numbers


def test_connect_without_a_node_starts_an_embedded_one_and_says_so(tmp_path: Path) -> None:
    """In an empty home connect() works, tells what it did, and its node ends with the program."""
    program = """
import virgo
cloud = virgo.connect()
print(cloud.nodes[0].pid)
cloud.memory[b'a'] = b'1'
assert cloud.memory[b'a'] == b'1'
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "VIRGO_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "virgo up" in result.stderr
    pid = int(result.stdout)
    until(lambda: not Path(f"/proc/{pid}").exists(), within_s=15, what="the embedded node ended")
    until(lambda: control.leftovers(tmp_path) == {}, within_s=15, what="its engine ended")


def test_an_unknown_setting_is_an_error_that_names_it(tmp_path: Path) -> None:
    """A typing mistake in virgo.toml keeps the node from starting, with the key in the message."""
    (tmp_path / "virgo.toml").write_text("[memory]\ncapacity_byte = 5\n")
    result = subprocess.run(
        [sys.executable, "-m", "virgo.cli", "up", "--detach"],
        env={**os.environ, "VIRGO_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert "capacity_byte" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bind_beyond_loopback_without_tls_is_refused(tmp_path: Path) -> None:
    """`--bind 0.0.0.0` without certificates does not start, and says how to make them."""
    with pytest.raises(VirgoError, match="TLS") as caught:
        control.start_detached(tmp_path, UpOptions(nodes=["n1"], environment={"VIRGO_NODE_BIND": "0.0.0.0"}))
    assert "virgo ca" in caught.value.hint
    assert json.dumps(list(control.leftovers(tmp_path))) == "[]"


def test_an_engine_of_three_servers_survives_the_loss_of_any(make_cloud: Callable[..., RunningCloud]) -> None:
    """With --engines 3, kill -9 of one server after the other: writes through the engine go on each time."""
    running = make_cloud(1, engines=3)
    servers = running.status()["engine"]["embedded"]
    assert len({server["pid"] for server in servers}) == 3
    with running.connect() as cloud:
        for round_number, server in enumerate(servers):
            os.kill(server["pid"], signal.SIGKILL)

            def write(tag: int = round_number) -> Any:
                return attempt(lambda: cloud.memory.update({b"%d-%d" % (tag, i): b"x" for i in range(50)}))

            until(lambda: write() is None, within_s=30, what="keys in new slots are placed")
            healthy = lambda: all(one["pid"] for one in running.status()["engine"]["embedded"])  # noqa: E731
            until(healthy, within_s=20, what="the killed server is restarted")
        assert cloud.memory[b"0-49"] == b"x"


def test_an_engine_that_cannot_be_seen_to_sync_is_refused(tmp_path: Path) -> None:
    """A NATS of the user's with default settings is refused by its settings, or if they cannot be seen."""
    binary = find_binary().path
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        port, monitor = first.getsockname()[1], second.getsockname()[1]
    command = [
        binary,
        "-js",
        "-sd",
        str(tmp_path / "js"),
        "-a",
        "127.0.0.1",
        "-p",
        str(port),
        "-m",
        str(monitor),
    ]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = {"VIRGO_ENGINE_URL": f"nats://127.0.0.1:{port}", "VIRGO_NODE_BIND": ""}
    seen = {**url, "VIRGO_ENGINE_MONITOR": f"http://127.0.0.1:{monitor}"}
    try:
        until(lambda: _answers(monitor), within_s=10, what="the server answers")
        for environment, reason in ((url, "cannot be seen"), (seen, "sync")):
            with pytest.raises(UnsafeEngine, match=reason) as caught:
                control.start_detached(tmp_path / "home", UpOptions(nodes=["n1"], environment=environment))
            assert "--unsafe-engine" in caught.value.hint
        control.start_detached(
            tmp_path / "home",
            UpOptions(nodes=["n1"], environment={**url, "VIRGO_ENGINE_UNSAFE": "true"}),
        )
        with connect(home=tmp_path / "home", embedded=False) as cloud:
            cloud.memory[b"accepted"] = b"at my own risk"
    finally:
        stop_cloud(tmp_path / "home")
        server.kill()
        server.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.skipif(os.getuid() != 0 and os.environ.get("CI") != "true", reason="mounting needs root")
def test_after_a_full_disk_the_engine_comes_back_by_itself(tmp_path: Path) -> None:
    """When the disk was full and has room again, the engine is started anew and new keys find a place."""
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "virgo-test", home], check=True)
    try:
        variables = {"VIRGO_MEMORY_CAPACITY_BYTES": "500000000", "VIRGO_NODE_BIND": ""}
        control.start_detached(home, UpOptions(nodes=["n1"], environment=variables))
        with connect(home=home, embedded=False) as cloud:
            blocker = home / "blocker"
            with blocker.open("wb") as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            failures = [attempt(lambda i=i: cloud.memory.update({b"%d" % i: b"x"})) for i in range(70)]
            assert any(failures), "the disk was not full"
            blocker.unlink()

            def write() -> Any:
                return attempt(lambda: cloud.memory.update({b"after-%d" % i: b"x" for i in range(200)}))

            until(lambda: write() is None, within_s=60, what="new keys find a place")
    finally:
        stop_cloud(home)
        subprocess.run(["umount", "-l", home], check=True)


def test_embedded_nodes_of_programs_that_meet_or_follow_each_other(tmp_path: Path) -> None:
    """Programs that start together share one embedded node; one that comes just after gets one of its own."""
    program = "import virgo; c = virgo.connect(); c.memory[b'k'] = b'v'; assert c.cpu.clone('add', 1, 2) == 3"
    environment = {**os.environ, "VIRGO_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program]
    for _ in range(3):
        subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True)
    late = "import time; time.sleep(1)"
    for _ in range(3):
        meet(command, f"{program}; {late}", environment)
    until(lambda: control.running(tmp_path) is None, within_s=15, what="the last embedded node ended")


def meet(command: list[str], program: str, environment: dict[str, str]) -> None:
    """Several programs at the same time; each has to succeed."""
    both = [
        subprocess.Popen([*command[:2], program], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for one in both:
        _, errors = one.communicate(timeout=60)
        assert one.returncode == 0, errors


def test_a_module_that_cannot_start_says_not_loaded(make_cloud: Callable[..., RunningCloud]) -> None:
    """A wrong setting of one module leaves the others up; its own commands answer NOTLOADED."""
    running = make_cloud(1, environment={"VIRGO_CPU_IMPORTS": '["no_such_module"]'})
    with running.connect() as cloud:
        cloud.memory[b"k"] = b"v"
        with pytest.raises(NotLoaded, match="cpu"):
            cloud.client.execute("VIRGO_CLONE", "add", 1, 2)


def test_a_broken_configuration_keeps_nobody_from_stopping(make_cloud: Callable[..., RunningCloud]) -> None:
    """`virgo down` works whatever is in virgo.toml."""
    running = make_cloud(1)
    (running.home / "virgo.toml").write_text("nonsense")
    assert "Stopped n1" in running.virgo("down").stdout
