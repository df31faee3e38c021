"""A silent node: asked whether it lives, called lost when it does not answer, waited for when it does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvloop

from virgo.config import SecurityConfig
from virgo.context import Identity
from virgo.errors import Busy, DeadlineExceeded, NodeLost, NotRunning, VirgoError
from virgo.kernel.process import Vitals, vitals
from virgo.limits import LIFE_ANSWER_S, LIFE_LOOK_S, LIFE_QUIET_S, LIFE_WORK_S, NODE_LOST_S
from virgo.wire import authority, tls
from virgo.wire.aclient import AsyncClient
from virgo.wire.address import Address
from virgo.wire.call import Call
from virgo.wire.client import Client
from virgo.wire.life import Answer, Pulse, answer_of, judge
from wire.serving import TOKEN, Served, serving

OWNER = Identity("uid:0", frozenset({"admin"}), node=True)
LONG_S = 60.0  # what a request would take if nobody asked whether the node lives
PLACE = Address(path="/s")


def both(address: Address, *request: Any, timeout_s: float = LONG_S, **options: Any) -> list[Any]:
    """What the request gives, result or error, by either client at the same time."""

    def blocking() -> Any:
        with Client(address, **options) as client:
            return client.execute(*request, timeout_s=timeout_s)

    async def waiting() -> Any:
        async with AsyncClient(address, **options) as client:
            return await client.execute(*request, timeout_s=timeout_s)

    with ThreadPoolExecutor(2) as threads:
        work = [threads.submit(blocking), threads.submit(lambda: asyncio.run(waiting()))]
        return [one.exception() or one.result() for one in work]


def bounded(outcomes: Callable[[], list[Any]]) -> list[NodeLost]:
    """The outcomes, all losses with a hint, long before the request's own deadline."""
    started = time.monotonic()
    found = outcomes()
    assert time.monotonic() - started < LONG_S / 2
    assert [type(one) for one in found] == [NodeLost] * len(found), found
    assert all(one.hint for one in found)
    return found


def lost(address: Address, *request: Any, **options: Any) -> list[NodeLost]:
    """How both clients lose the node at that address."""
    return bounded(lambda: both(address, *request, **options))


@pytest.fixture
def deaf() -> Iterator[socket.socket]:
    """A TCP port that accepts, as the kernel does for a stopped process, and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        yield listening


@pytest.fixture
def tcp() -> Iterator[Served]:
    with serving(None) as served:
        yield served


def place(listening: socket.socket) -> Address:
    host, port = listening.getsockname()[:2]
    return Address(host=host, port=port)


@contextlib.contextmanager
def program(path: Path, code: str) -> Iterator[int]:
    """Another process that listens on the Unix socket `path` as `listening`; yields its pid."""
    begin = f"""
import os, signal, socket, time
listening = socket.socket(socket.AF_UNIX)
listening.bind({str(path)!r})
listening.listen(100)
print('ready', flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", begin + code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


# --- lost -----------------------------------------------------------------------------------------


def test_the_bounds_keep_the_promise() -> None:
    """Silence, the looks and the time for the answer together stay within the promise to callers."""
    assert LIFE_QUIET_S + 2 * LIFE_LOOK_S + LIFE_ANSWER_S <= NODE_LOST_S


def test_a_node_that_accepts_and_says_nothing_is_lost(deaf: socket.socket) -> None:
    """Over TCP, a PING without an answer is the loss, and the error says that the outcome is unknown."""
    for loss in lost(place(deaf), "VIRGO_TEST"):
        assert str(place(deaf)) in loss.message
        assert "unknown" in loss.hint


def test_a_node_that_takes_no_bytes_is_lost(deaf: socket.socket) -> None:
    """The same while the request itself is still being sent."""
    lost(place(deaf), "VIRGO_TEST", bytes(64 << 20))


def test_every_call_of_a_pipeline_is_told(deaf: socket.socket) -> None:
    """run_many fails as a whole, also where a thread sends it; no second failure is complained of."""
    calls = [Call(("VIRGO_TEST", bytes(4 << 20)), lambda reply: reply, LONG_S) for _ in range(4)]
    complaints: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, what: complaints.append(what))
        async with AsyncClient(place(deaf)) as client:
            await client.run_many(calls)

    with Client(place(deaf)) as client, ThreadPoolExecutor(2) as threads:
        work = [threads.submit(client.run_many, calls), threads.submit(lambda: asyncio.run(main()))]
        bounded(lambda: [one.exception() for one in work])
    gc.collect()
    assert complaints == []


def test_a_node_that_listens_no_more_is_lost() -> None:
    """A machine that came back without its node refuses the second connection; the first stays silent."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = place(listening)
        accepted: list[socket.socket] = []

        def accept_two() -> None:
            accepted.extend(listening.accept()[0] for _ in range(2))
            listening.close()

        thread = threading.Thread(target=accept_two)
        thread.start()
        losses = lost(address, "VIRGO_TEST")
        thread.join()
        for connection in accepted:
            connection.close()
    assert all("a second connection to it fails" in loss.message for loss in losses)


def test_a_silent_node_over_tls_is_lost(tmp_path: Path) -> None:
    """The second connection of a TLS client is TLS too; a handshake without an answer is silence."""
    directory = tmp_path / "tls"
    authority.create_authority(directory, name="test")
    authority.issue(directory, "n1", hosts=["127.0.0.1"], node=True, into=directory)
    server = tls.server_context(tmp_path, SecurityConfig())
    client = tls.client_context(tmp_path, SecurityConfig())
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        accepted: list[ssl.SSLSocket] = []

        def shake_twice() -> None:
            taken = (listening.accept()[0] for _ in range(2))
            accepted.extend(server.wrap_socket(one, server_side=True) for one in taken)

        for request in (("VIRGO_TEST",), ("VIRGO_TEST", bytes(8 << 20))):
            thread = threading.Thread(target=shake_twice)
            thread.start()
            address = Address(host="127.0.0.1", port=listening.getsockname()[1], tls=True)
            lost(address, *request, tls=client)
            thread.join()
            listening.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # the questions that nobody took
                while True:
                    listening.accept()[0].close()
            listening.setblocking(True)
        for connection in accepted:
            connection.close()


def test_a_stopped_process_is_named(tmp_path: Path) -> None:
    """On a Unix socket the error names the stopped process, and the way to let it go on."""
    path = tmp_path / "s"
    with program(path, "os.kill(os.getpid(), signal.SIGSTOP)") as pid:
        for loss in lost(Address(path=str(path)), "PING"):
            assert f"{pid} is stopped" in loss.message
            assert f"kill -CONT {pid}" in loss.hint


def test_a_process_that_does_nothing_is_lost(tmp_path: Path) -> None:
    """A process that neither answers nor works, frozen for example, is lost although it exists."""
    path = tmp_path / "s"
    with program(path, "time.sleep(600)") as pid:
        for loss in lost(Address(path=str(path)), "PING"):
            assert f"{pid} does nothing" in loss.message


def test_all_waiting_calls_learn_of_the_loss_from_one_question(deaf: socket.socket) -> None:
    """Twenty calls of one client are told in the time of one, and do not ask each for itself."""

    async def main(client: AsyncClient) -> list[Any]:
        async with client:
            work = [client.execute("VIRGO_TEST", timeout_s=LONG_S) for _ in range(20)]
            return await asyncio.gather(*work, return_exceptions=True)

    with Client(place(deaf)) as client, ThreadPoolExecutor(21) as threads:
        work = [threads.submit(client.execute, "VIRGO_TEST", timeout_s=LONG_S) for _ in range(20)]
        other = threads.submit(lambda: asyncio.run(main(AsyncClient(place(deaf)))))
        bounded(lambda: [*(one.exception() for one in work), *other.result()])
    deaf.setblocking(False)
    connections = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            deaf.accept()[0].close()
            connections += 1
    assert 42 <= connections < 50


def test_a_call_with_less_time_ends_at_its_deadline(deaf: socket.socket) -> None:
    """A deadline that passes before the node can be called lost is a DeadlineExceeded, and in time."""
    started = time.monotonic()
    for outcome in both(place(deaf), "VIRGO_TEST", timeout_s=2.5):
        assert isinstance(outcome, DeadlineExceeded)
        assert "within 2.5 s" in outcome.message
    assert time.monotonic() - started < LONG_S / 2


def test_a_login_without_an_answer_is_no_node(deaf: socket.socket) -> None:
    """Before anything was sent the node is not lost but not there: NotRunning, and another can be tried."""
    started = time.monotonic()
    for outcome in both(place(deaf), "VIRGO_TEST", token=TOKEN):
        assert isinstance(outcome, NotRunning)
        assert "login" in outcome.message
    assert time.monotonic() - started < LONG_S / 2


# --- alive ----------------------------------------------------------------------------------------


def test_a_long_call_on_a_living_node_is_waited_for(tcp: Served) -> None:
    """8 s of silence are no loss: the node answers when asked, on one more connection of each client."""
    seen: list[int] = []
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.extend(both(tcp.address, "SLOW", "8", token=TOKEN)))
    thread.start()
    while thread.is_alive():
        seen.append(len(tcp.service.sessions))
        thread.join(0.05)
    assert answers == [b"8", b"8"]
    assert max(seen) == 4


def test_a_node_held_up_for_two_seconds_again_and_again_is_not_lost(tcp: Served) -> None:
    """An event loop that a large value blocks for 2 s, again and again, answers in time over TCP."""
    over = threading.Event()

    def hold_up() -> None:
        while not over.wait(0.5):
            tcp.loop.call_soon_threadsafe(time.sleep, 2.0)
            over.wait(2.0)

    thread = threading.Thread(target=hold_up)
    thread.start()
    try:
        assert both(tcp.address, "SLOW", "7", token=TOKEN) == [b"7", b"7"]
    finally:
        over.set()
        thread.join()


def test_a_local_process_that_computes_is_not_lost(tmp_path: Path) -> None:
    """On a Unix socket a node that computes for 8 s without answering anything is busy, not lost."""
    path = tmp_path / "s"
    busy = """
connections = [listening.accept()[0], listening.accept()[0]]
until = time.monotonic() + 8
while time.monotonic() < until:
    pass
for connection in connections:
    connection.recv(100)
    connection.sendall(b"+DONE\\r\\n")
time.sleep(60)
"""
    with program(path, busy):
        assert both(Address(path=str(path)), "PING") == [b"DONE", b"DONE"]


def test_a_socket_whose_name_is_gone_still_works(tmp_path: Path) -> None:
    """Somebody removed the socket's file: nobody can connect, but who is connected is answered."""
    with serving(tmp_path, OWNER) as served:
        timer = threading.Timer(0.5, lambda: Path(served.address.path).rename(tmp_path / "elsewhere"))
        timer.start()
        try:
            assert both(served.address, "SLOW", "6") == [b"6", b"6"]
        finally:
            timer.join()
            (tmp_path / "elsewhere").rename(served.address.path)


def test_a_client_whose_own_loop_stood_still_blames_nobody(tcp: Served) -> None:
    """A program that blocks its event loop while its question is under way finds its node alive after it."""

    async def main() -> bytes:
        async with AsyncClient(tcp.address, token=TOKEN) as client:
            call = asyncio.create_task(client.execute("SLOW", "6", timeout_s=LONG_S))
            while not tcp.started.is_set():
                await asyncio.sleep(0.01)
            tcp.loop.call_soon_threadsafe(time.sleep, LIFE_QUIET_S + 1.0)  # the answer will take a while
            await asyncio.sleep(LIFE_QUIET_S + 2 * LIFE_LOOK_S)
            time.sleep(LIFE_ANSWER_S + LIFE_LOOK_S)
            return await call

    assert uvloop.run(main()) == b"6"  # unlike asyncio's own it serves timers before sockets


# --- the rules ------------------------------------------------------------------------------------

SLEEPS, WORKS = Vitals("S", 10.0), Vitals("S", 10.0 + LIFE_WORK_S)


@pytest.mark.parametrize(
    ("answer", "before", "after", "lost"),
    [
        (Answer.GIVEN, None, None, False),
        (Answer.GIVEN, SLEEPS, Vitals("T", 10.0), False),
        (Answer.NONE, None, None, True),
        (Answer.UNREACHABLE, None, None, True),
        (Answer.NONE, SLEEPS, None, True),
        (Answer.NONE, SLEEPS, SLEEPS, True),
        (Answer.NONE, SLEEPS, WORKS, False),
        (Answer.NONE, SLEEPS, Vitals("R", 10.0), False),
        (Answer.NONE, SLEEPS, Vitals("D", 10.0), False),
        (Answer.NONE, SLEEPS, Vitals("T", 20.0), True),
        (Answer.NONE, SLEEPS, Vitals("t", 20.0), True),
        (Answer.NONE, SLEEPS, Vitals("Z", 20.0), True),
        (Answer.UNREACHABLE, SLEEPS, SLEEPS, False),
        (Answer.UNREACHABLE, SLEEPS, Vitals("T", 10.0), True),
        (Answer.UNREACHABLE, SLEEPS, Vitals("X", 0.0), True),
    ],
)
def test_what_is_made_of_an_answer(
    answer: Answer, before: Vitals | None, after: Vitals | None, lost: bool
) -> None:
    """An answer is life; without one a process that works is alive, and one that cannot is lost."""
    loss = judge(PLACE, answer, 4711, before, after)
    assert (loss is not None) == lost
    assert loss is None or loss.hint


def caused(error: VirgoError, cause: OSError) -> VirgoError:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (caused(NotRunning("x"), TimeoutError()), Answer.NONE),
        (caused(NotRunning("x"), BlockingIOError(11, "again")), Answer.NONE),
        (caused(NotRunning("x"), ConnectionRefusedError(111, "refused")), Answer.UNREACHABLE),
        (caused(NotRunning("x"), OSError(99, "no port of ours is free")), Answer.GIVEN),
        (NodeLost("closed"), Answer.UNREACHABLE),
        (Busy("too many connections"), Answer.GIVEN),
    ],
)
def test_what_a_failed_question_says(error: VirgoError, answer: Answer) -> None:
    """Refusals by the node are answers; trouble of our own says nothing against it."""
    assert answer_of(error) is answer


def test_the_pulse_tells_who_waited_through_the_question_and_nobody_else() -> None:
    """A loss holds for requests silent since before it was asked; an answer puts the next question off."""
    pulse = Pulse()
    assert pulse.due_s(100.0, 100.0) == LIFE_QUIET_S
    assert pulse.due_s(100.0, 100.0 + LIFE_QUIET_S) <= 0
    pulse.beat(105.0)
    assert pulse.due_s(100.0, 105.0) == LIFE_QUIET_S
    pulse.lose(110.0, NodeLost("lost", hint="look"))
    pulse.check(110.5)
    with pytest.raises(NodeLost, match="lost Hint: look"):
        pulse.check(110.0)
    pulse.beat(120.0)
    pulse.check(110.0)


def test_vitals_of_processes(tmp_path: Path) -> None:
    """A stopped, a working and an ended process are told apart."""
    stop, work = "os.kill(os.getpid(), signal.SIGSTOP)", "while True: pass"
    with program(tmp_path / "a", stop) as stopped, program(tmp_path / "b", work) as working:
        before = vitals(working)
        assert before is not None
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            after, other = vitals(working), vitals(stopped)
            assert after is not None
            assert other is not None
            if other.stopped and after.cpu_s > before.cpu_s:
                break
            time.sleep(0.02)
        assert (after.state, after.stopped, other.stopped, other.ended) == ("R", False, True, False)
    gone = vitals(working)
    assert gone is not None
    assert gone.ended
