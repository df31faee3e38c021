"""Bounds over all connections of a node: memory, descriptors, handshakes."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from virgo.config import SecurityConfig
from virgo.context import Identity
from virgo.errors import Busy, VirgoError
from virgo.limits import HANDSHAKE_S, MiB
from virgo.wire import authority, tls
from virgo.wire.address import Address
from virgo.wire.client import Client
from virgo.wire.commands import Command, CommandTable
from virgo.wire.crowd import Crowd
from virgo.wire.server import Listener, Service
from wire.serving import Gate

OWNER = Identity("uid:0", frozenset({"admin"}), node=True)
Start = Callable[..., Address]


@pytest.fixture
def start() -> Iterator[Start]:
    """Serve BIG and SLOW at an address, with a crowd of the test's own."""
    ends: list[Callable[[], None]] = []

    def begin(address: Address, crowd: Crowd, context: ssl.SSLContext | None = None) -> Address:
        ready, found, stop = threading.Event(), [], []

        async def main() -> None:
            over = asyncio.Event()
            loop = asyncio.get_running_loop()
            stop.append(lambda: loop.call_soon_threadsafe(over.set))

            async def slow(_session: object, request: list[bytes]) -> bytes:
                await asyncio.sleep(float(request[1]))
                return b"late"

            table = CommandTable(
                [
                    Command("BIG", lambda _s, request: b"x" * int(request[1]), "read", 1, 1),
                    Command("SLOW", slow, "read", 1, 1, concurrent=True),
                    Command("WHOAMI", lambda _s, _r: b"you", ""),
                ]
            )
            async with Listener(Service(table, Gate(OWNER), crowd=crowd), address, tls=context) as listener:
                if listener._door is not None:
                    found.append(listener._door._listening.getsockname()[1])
                ready.set()
                await over.wait()

        thread = threading.Thread(target=lambda: uvloop.run(main()))
        thread.start()
        assert ready.wait(10)
        ends.extend([*stop, thread.join])
        return Address(host="127.0.0.1", port=found[0], tls=True) if found else address

    yield begin
    for end in ends:
        end()


def test_answers_that_nobody_reads_are_bounded_together(start: Start, tmp_path: Path) -> None:
    """Connections that each ask for one large answer and do not read are refused once all hold too much."""
    address = start(Address(path=str(tmp_path / "s")), Crowd(bytes_max=20 * MiB))
    lazy = []
    for _ in range(6):
        plain = socket.socket(socket.AF_UNIX)
        plain.connect(address.path)
        plain.sendall(b"BIG %d\r\n" % (6 * MiB))
        plain.recv(1)
        lazy.append(plain)
    with Client(address) as client:
        with pytest.raises(Busy):
            client.execute("BIG", 6 * MiB)
        assert client.execute("BIG", 10) == b"x" * 10  # the connection goes on
        for plain in lazy:
            plain.close()
        deadline = time.monotonic() + 10
        while True:
            try:
                assert len(client.execute("BIG", 6 * MiB)) == 6 * MiB
                break
            except Busy:
                assert time.monotonic() < deadline
                time.sleep(0.02)


def test_requests_that_do_not_end_are_bounded_together(start: Start, tmp_path: Path) -> None:
    """Those that send parts of large requests are refused once all hold too much; small ones are served."""
    address = start(Address(path=str(tmp_path / "s")), Crowd(bytes_max=20 * MiB))
    senders = []
    for _ in range(8):
        plain = socket.socket(socket.AF_UNIX)
        plain.settimeout(10)
        plain.connect(address.path)
        senders.append(plain)
        plain.sendall(b"*2\r\n$3\r\nBIG\r\n$%d\r\n" % (100 * MiB) + b"x" * (5 * MiB))
    poll = select.poll()
    for plain in senders:
        poll.register(plain, select.POLLIN)
    deadline = time.monotonic() + 10
    refused: list[socket.socket] = []
    while len(refused) < 3:
        assert time.monotonic() < deadline, len(refused)
        ready = dict(poll.poll(50))
        refused = [plain for plain in senders if plain.fileno() in ready]
    assert len(refused) <= 6
    assert all(plain.recv(5) == b"-BUSY" for plain in refused)
    with Client(address) as client:
        assert client.execute("BIG", 10) == b"x" * 10
    for plain in senders:
        plain.close()


def test_answers_behind_a_slow_one_are_bounded(start: Start, tmp_path: Path) -> None:
    """What waits behind a call that takes long stops being worked on, and all of it is answered in order."""
    address = start(Address(path=str(tmp_path / "s")), Crowd(bytes_max=1 << 40))
    plain = socket.socket(socket.AF_UNIX)
    plain.settimeout(20)
    plain.connect(address.path)
    plain.sendall(b"SLOW 0.5\r\n" + b"BIG %d\r\n" % MiB * 200)
    answer = plain.makefile("rb")
    assert answer.readline() == b"$4\r\n" and answer.readline() == b"late\r\n"
    for _ in range(200):
        assert answer.readline() == b"$%d\r\n" % MiB
        assert len(answer.read(MiB + 2)) == MiB + 2
    plain.close()


def test_strangers_at_a_tls_port_are_few_and_have_little_time(start: Start, tmp_path: Path) -> None:
    """Connections that never shake hands are closed in time, and more than the crowd has room for at once."""
    home = tmp_path / "home"
    authority.create_authority(home / "tls")
    authority.issue(home / "tls", "n1", hosts=["127.0.0.1"], node=True, into=home / "tls")
    context = tls.server_context(home, SecurityConfig())
    address = start(Address(host="127.0.0.1", port=0), Crowd(connections_max=20), context)
    began = time.monotonic()
    strangers = [socket.create_connection((address.host, address.port)) for _ in range(30)]
    closed = 0
    for stranger in strangers:
        stranger.settimeout(HANDSHAKE_S + 5)
        closed += stranger.recv(1) == b""
        stranger.close()
    assert closed == 30
    assert HANDSHAKE_S - 1 < time.monotonic() - began < HANDSHAKE_S + 5
    with Client(address, tls=tls.client_context(home, SecurityConfig())) as client:
        assert client.execute("WHOAMI") == b"you"
    with pytest.raises(VirgoError), Client(address, tls=ssl.create_default_context()) as client:
        client.execute("WHOAMI")


def test_a_crowd_says_how_it_is() -> None:
    """Its bounds come from the machine, and are never nothing."""
    crowd = Crowd()
    assert crowd.bytes_max >= 64 * MiB and crowd.connections_max >= 1
    assert not crowd.full() and crowd.take(0) is None
    assert repr(crowd) == "<Crowd of 0 sessions, 0 by TCP, 0 bytes>"
