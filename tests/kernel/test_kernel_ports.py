"""Who holds a port, and the error that says so."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from virgo.errors import PortTaken
from virgo.kernel import ports


@pytest.fixture
def listener() -> Iterator[int]:
    """A port on which another process listens."""
    code = "import socket; s = socket.create_server(('127.0.0.1', 0))\n"
    code += "print(s.getsockname()[1], flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


def test_the_holder_is_named(listener: int) -> None:
    """A listening process is named with its pid, also while others are connected to it."""
    with socket.create_connection(("127.0.0.1", listener)):
        named = ports.holder(listener)
    assert named.startswith("python")
    assert "(pid " in named
    assert str(os.getpid()) not in named


def test_the_local_end_of_a_connection_holds_its_port_too(listener: int) -> None:
    """A port that the kernel lent to an outgoing connection is named as such."""
    with socket.create_connection(("127.0.0.1", listener)) as connection:
        named = ports.holder(connection.getsockname()[1])
    assert f"(pid {os.getpid()}, as the local end of a connection)" in named


def test_a_free_port_has_no_holder() -> None:
    """When the holder has let go in the meantime, that is said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert "let go" in ports.holder(port)


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_a_holder_of_another_user_is_not_visible(listener: int) -> None:
    """To an ordinary user a process of another user is `another process`, and never a wrong name."""
    code = f"from virgo.kernel import ports; print(ports.holder({listener}))"
    command = ["setpriv", "--reuid=54321", "--clear-groups", sys.executable, "-c", code]
    done = subprocess.run(command, text=True, capture_output=True, cwd="/")
    if "Permission" in done.stderr or "No module" in done.stderr:
        pytest.skip("the interpreter cannot be run by another user here")
    assert done.stdout.strip() == "another process (its owner is not visible)", done.stderr


def test_the_error_names_holder_and_remedy(listener: int) -> None:
    """`port_taken` says which port of which host, who has it, and how to get another."""
    error = ports.port_taken(listener, "127.0.0.1")
    assert isinstance(error, PortTaken)
    assert f"port {listener} of 127.0.0.1 is held by python" in str(error)
    assert "--port-offset" in error.hint


def test_an_address_of_another_machine_is_said_to_be_one() -> None:
    """Nobody holds a port of an address that this machine does not have (one kept for documents here)."""
    error = ports.port_taken(10_000, "203.0.113.7")
    assert error.message == "port 10000 cannot be had: 203.0.113.7 is no address of this machine"
    assert "--bind" in error.hint
    assert ports.is_own("127.0.0.1")
    assert ports.is_own("0.0.0.0")


def test_lent_ports_come_with_the_setting_that_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a port of the ephemeral range the hint has a sysctl that keeps what was reserved before."""
    monkeypatch.setattr(ports, "ephemeral_range", lambda: (32768, 60999))
    for before, port, setting in (
        ("", 50_000, "50000,60000"),
        ("", 60_002, "50002,60002"),
        ("8080,40000-40010", 50_000, "8080,40000-40010,50000,60000"),
        ("60000", 50_000, "60000,50000"),
    ):
        monkeypatch.setattr(ports, "_reserved_text", lambda text=before: text)
        assert ports.port_taken(port).hint.endswith(f"net.ipv4.ip_local_reserved_ports={setting}")
    assert "sysctl" not in ports.port_taken(10_000).hint
    monkeypatch.setattr(ports, "_reserved_text", lambda: "50000-50010")
    assert ports.reserved() == set(range(50_000, 50_011))
    assert "sysctl" not in ports.port_taken(50_005).hint


def test_the_range_is_the_kernels() -> None:
    """The ephemeral range is read from the kernel: a port it lends lies within."""
    low, high = ports.ephemeral_range()
    assert 0 < low <= high < 65536
    with socket.socket() as lent:
        lent.bind(("127.0.0.1", 0))
        port = lent.getsockname()[1]
    assert low <= port <= high
    assert ports.exposed(port)
