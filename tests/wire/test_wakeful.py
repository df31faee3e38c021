"""Who is awake when: an event loop looks for work while that comes soon after work, and sleeps otherwise."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from virgo.errors import DeadlineExceeded, NodeLost
from virgo.wire import connection, wakeful
from virgo.wire.address import Address
from virgo.wire.connection import Connection
from virgo.wire.pool import pack_plain
from virgo.wire.wakeful import Wakeful


@pytest.fixture(autouse=True)
def _several_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests mean the same on a machine with one."""
    monkeypatch.setattr(wakeful, "ALONE", False)
    monkeypatch.setattr(connection, "ALONE", False)


def work(awake: Wakeful, whose: object = "one") -> None:
    awake.begin(whose)
    awake.end()


async def asleep(awake: Wakeful) -> None:
    """Let the loop turn until it would sleep."""
    deadline = time.monotonic() + 5
    while "awake" in repr(awake):
        assert time.monotonic() < deadline
        await asyncio.sleep(0)


def test_the_loop_is_awake_only_while_work_comes_soon() -> None:
    """After one piece of work it sleeps; after two in a row it looks on, for a moment, and sleeps again."""

    async def check() -> None:
        awake = Wakeful(asyncio.get_running_loop())
        for _ in range(3):
            work(awake)
            assert "asleep" in repr(awake)
            work(awake)
            assert "awake" in repr(awake)
            await asleep(awake)
            await asyncio.sleep(wakeful.SOON_S * 2)

    asyncio.run(check())


def test_the_loop_sleeps_while_several_are_at_work() -> None:
    """They keep it busy; each piece of work by itself would be done in more steps."""

    async def check() -> None:
        awake = Wakeful(asyncio.get_running_loop())
        for _ in range(10):
            work(awake, "one")
            work(awake, "other")
            assert "asleep" in repr(awake)
        work(awake, "other")
        assert "awake" in repr(awake)
        await asleep(awake)

    asyncio.run(check())


def test_who_is_alone_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one processor looking would keep the other side from answering."""

    async def check() -> None:
        awake = Wakeful(asyncio.get_running_loop())
        monkeypatch.setattr(wakeful, "ALONE", True)
        work(awake)
        work(awake)
        assert "asleep" in repr(awake)

    asyncio.run(check())


def test_others_have_their_turn_while_it_is_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that looks for work runs its timers and tasks as ever."""
    monkeypatch.setattr(wakeful, "AWAKE_S", 0.3)

    async def check() -> None:
        awake = Wakeful(asyncio.get_running_loop())
        work(awake)
        work(awake)
        began, turns = time.monotonic(), 0
        while time.monotonic() - began < 0.1:
            await asyncio.sleep(0.001)
            turns += 1
        assert turns > 20
        assert "awake" in repr(awake)

    asyncio.run(check())


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[Connection]:
    """A connection to a server that does that with its end."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with listening.accept()[0] as end:
                answer(end)

        thread = threading.Thread(target=serve)
        thread.start()
        made = Connection(Address(host="127.0.0.1", port=listening.getsockname()[1]))
        try:
            yield made
        finally:
            made.close()
            thread.join(10)


def test_replies_are_whole_however_they_come() -> None:
    """In pieces, late, several at once: a connection that looks for them gives each one as it is."""

    def answer(end: socket.socket) -> None:
        for number in range(200):
            end.recv(4096)
            reply = b"$%d\r\n%b\r\n" % (number * 50, b"x" * (number * 50))
            for start in range(0, len(reply), 977):
                end.sendall(reply[start : start + 977])
                if number % 20 == 19:
                    time.sleep(0.001)
        end.recv(4096)
        end.sendall(b":1\r\n:2\r\n:3\r\n")
        end.recv(4096)

    with answering(answer) as made:
        for number in range(200):
            made.send(pack_plain(("GET", "k")), 5)
            assert made.receive(5) == b"x" * (number * 50)
        made.send(pack_plain(("GET", "k")), 5)
        assert [made.receive(5) for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("soon", [False, True])
def test_an_end_and_a_silence_are_what_they_are(soon: bool) -> None:
    """Whether or not it was looking, a closed connection is NodeLost, and silence takes as long as it may."""

    def close(end: socket.socket) -> None:
        end.recv(4096)

    with answering(close) as made:
        made._soon = soon
        made.send(pack_plain(("GET", "k")), 5)
        with pytest.raises(NodeLost):
            made.receive(5)

    over = threading.Event()
    with answering(lambda _end: over.wait(10) and None) as made:
        made._soon = soon
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            made.receive(0.2)
        assert 0.15 < time.monotonic() - began < 5
        over.set()


def test_a_connection_looks_only_after_a_prompt_reply() -> None:
    """The first reply is slept for; after a late one it sleeps again."""

    def answer(end: socket.socket) -> None:
        for delay_s in (0.0, 0.0, 0.02, 0.0):
            end.recv(4096)
            time.sleep(delay_s)
            end.sendall(b":1\r\n")

    with answering(answer) as made:
        assert not made._soon
        looked = []
        for _ in range(4):
            made.send(pack_plain(("GET", "k")), 5)
            made.receive(5)
            looked.append(made._soon)
        assert not looked[2]
