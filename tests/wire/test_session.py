"""Sessions on real sockets: order, batches, deadlines, cancellation, back-pressure, roles, faults."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hiredis
import pytest
import redis

from virgo import context as contexts
from virgo.context import Identity
from virgo.errors import (
    BadArgument,
    BadRequest,
    DeadlineExceeded,
    Denied,
    InternalFault,
    NodeLost,
    NotAuthenticated,
    NotRunning,
    UnknownCommand,
    WrongToken,
)
from virgo.wire.aclient import AsyncClient
from virgo.wire.address import Address
from virgo.wire.call import Call
from virgo.wire.client import Client
from wire.serving import TOKEN, Served, serving

OWNER = Identity("uid:0", frozenset({"admin"}), node=True)


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path, OWNER) as served:
        yield served


@pytest.fixture
def tcp() -> Iterator[Served]:
    with serving(None) as served:
        yield served


def raw(served: Served) -> socket.socket:
    if served.address.path:
        plain = socket.socket(socket.AF_UNIX)
        plain.connect(served.address.path)
    else:
        plain = socket.create_connection((served.address.host, served.address.port))
    plain.settimeout(10)
    return plain


def replies(plain: socket.socket, count: int) -> list[Any]:
    reader, found = hiredis.Reader(), []
    while len(found) < count:
        data = plain.recv(65536)
        assert data, f"closed after {found}"
        reader.feed(data)
        while (reply := reader.gets()) is not False:
            found.append(reply)
    return found


def test_answers_keep_the_order_of_requests(local: Served) -> None:
    """A fast request behind a slow concurrent one is answered after it; concurrent ones overlap."""
    with raw(local) as plain:
        started = time.monotonic()
        plain.sendall(b"CALL 0.3\r\nCALL 0.2\r\nCALL 0.31\r\nPING\r\nVIRGO_TEST a\r\n")
        assert replies(plain, 5) == [b"0.3", b"0.2", b"0.31", b"PONG", [b"a"]]
        assert time.monotonic() - started < 0.7


def test_a_request_waits_for_the_one_before_it(local: Served) -> None:
    """Commands that are not concurrent run one after the other, in order, on one connection."""
    with raw(local) as plain:
        started = time.monotonic()
        plain.sendall(b"SLOW 0.1\r\nSOMETIMES 0.1\r\nSOMETIMES 0\r\n")
        assert replies(plain, 3) == [b"0.1", b"0.1", b"at once"]
        assert time.monotonic() - started >= 0.2


def test_a_batch_is_closed_once_a_chunk(local: Served) -> None:
    """All writes of one received chunk share a batch, made final before anything is answered."""
    with raw(local) as plain:
        plain.sendall(b"WRITE\r\n" * 50)
        assert replies(plain, 50) == [b"OK"] * 50
        assert local.batches <= 2


def test_a_failed_batch_answers_every_write_of_it(local: Served) -> None:
    """If the batch cannot be made final its writes get the error, and reads among them do not."""
    local.fail_batches = True
    with raw(local) as plain:
        plain.sendall(b"WRITE\r\nPING\r\nWRITE\r\n")
        first, second, third = replies(plain, 3)
    assert (str(first).split()[0], second, str(third).split()[0]) == ("BADARG", b"PONG", "BADARG")


def test_a_defect_is_an_error_and_the_connection_survives(local: Served) -> None:
    """An unexpected exception in a handler is answered as FAULT; the next request works."""
    with Client(local.address) as client:
        with pytest.raises(InternalFault, match="a defect"):
            client.execute("FAIL")
        assert client.execute("PING") == b"PONG"


def test_without_login_only_harmless_commands_work(tcp: Served) -> None:
    """Over TCP a stranger may PING; everything else needs AUTH, and a wrong token is told so."""
    with Client(tcp.address) as client:
        assert client.execute("PING") == b"PONG"
        for request in (("VIRGO_TEST",), ("INFO",), ("WITH", "{}", "PING")):
            with pytest.raises(NotAuthenticated):
                client.execute(*request)
    with pytest.raises(WrongToken), Client(tcp.address, token="guess") as client:
        client.execute("VIRGO_TEST")
    with Client(tcp.address, token=TOKEN) as client:
        assert client.execute("VIRGO_TEST", "x") == [b"x"]


def test_a_missing_role_is_denied(tmp_path: Path) -> None:
    """An identity with `read` cannot run a `write` command; the error names both."""
    reader = Identity("uid:7", frozenset({"read"}))
    with serving(tmp_path, reader) as served, Client(served.address) as client:
        assert client.execute("CONTEXT")[2] == b"uid:7"
        with pytest.raises(Denied, match=r"'write'.*uid:7"):
            client.execute("WRITE")


def test_nobody_speaks_for_others_without_being_a_node(tmp_path: Path) -> None:
    """A context that names another identity is believed from a member only."""
    forged = contexts.encode(contexts.Context(id="r1", identity=Identity("cert:boss", frozenset({"admin"}))))
    reader = Identity("uid:7", frozenset({"read"}))
    with serving(tmp_path, reader) as served, Client(served.address) as client:
        assert client.execute("WITH", forged, "CONTEXT") == [b"r1", b"", b"uid:7"]
        with pytest.raises(Denied):
            client.execute("WITH", forged, "WRITE")
    with serving(tmp_path, OWNER) as served, Client(served.address) as client:
        assert client.execute("WITH", forged, "CONTEXT") == [b"r1", b"", b"cert:boss"]


def test_the_current_context_travels_with_a_request(local: Served) -> None:
    """A request made while another is handled names it as its cause and keeps its deadline."""
    with Client(local.address) as client, contexts.using(contexts.Context(id="first")):
        request, cause, _who = client.execute("CONTEXT")
        assert (cause, request != b"first") == (b"first", True)
    late = contexts.Context(id="late", deadline=time.monotonic() + 0.15)
    with Client(local.address) as client, contexts.using(late), pytest.raises(DeadlineExceeded):
        client.execute("SLOW", "5")


def test_a_request_inherits_nothing_from_the_one_before_it(local: Served) -> None:
    """A plain request queued behind one with a context has neither its deadline nor its identity."""
    someone = Identity("cert:someone", frozenset({"read"}))
    context = contexts.encode(contexts.Context(id="x", deadline=time.monotonic() + 0.3, identity=someone))
    packed = hiredis.pack_command(("WITH", context, "SLOW", "0.1")) + b"SLOW 0.5\r\nCONTEXT\r\nWRITE\r\n"
    with raw(local) as plain:
        plain.sendall(packed)
        first, second, third, fourth = replies(plain, 4)
    assert (first, second, fourth) == (b"0.1", b"0.5", b"OK")
    assert third[1:] == [b"", b"uid:0"]


def test_a_deadline_ends_the_work_on_the_node(local: Served) -> None:
    """When the deadline of a context passes, the handler is cancelled and DEADLINE answered."""
    context = contexts.encode(contexts.Context(id="x", deadline=time.monotonic() + 0.1))
    with Client(local.address) as client, pytest.raises(DeadlineExceeded, match="SLOW"):
        client.execute("WITH", context, "SLOW", "30")
    assert local.cancelled.wait(5)


def test_a_client_that_goes_away_cancels_its_work(local: Served, tcp: Served) -> None:
    """Closing the connection cancels what was running for it, at once or after a short grace."""
    for served in (local, tcp):
        with raw(served) as plain:
            if served is tcp:
                plain.sendall(f'AUTH "{TOKEN}"\r\n'.encode())
            plain.sendall(b"CALL 60\r\n")
            assert served.started.wait(5)
        assert served.cancelled.wait(5)


def test_a_half_closed_connection_is_still_answered(tcp: Served) -> None:
    """`printf ... | nc` works: what is quick is answered after the client's last byte."""
    with raw(tcp) as plain:
        plain.sendall(f'AUTH "{TOKEN}"\r\nCALL 0.2\r\n'.encode())
        plain.shutdown(socket.SHUT_WR)
        assert replies(plain, 2) == [b"OK", b"0.2"]
        assert plain.recv(10) == b""


def test_what_was_received_before_a_half_close_is_all_answered(tcp: Served) -> None:
    """Requests queued behind an awaited one are answered although the client has sent its last byte."""
    with raw(tcp) as plain:
        plain.sendall(f'AUTH "{TOKEN}"\r\nSLOW 0.2\r\nSLOW 0.1\r\nPING\r\nCALL 0.1\r\nPING\r\n'.encode())
        plain.shutdown(socket.SHUT_WR)
        assert replies(plain, 6) == [b"OK", b"0.2", b"0.1", b"PONG", b"0.1", b"PONG"]
        assert plain.recv(10) == b""


def test_what_takes_long_after_a_half_close_is_cancelled_and_says_so(tcp: Served) -> None:
    """The client may be dead: after a short grace the work is stopped, with a typed error."""
    with raw(tcp) as plain:
        plain.sendall(f'AUTH "{TOKEN}"\r\nCALL 60\r\nPING\r\n'.encode())
        plain.shutdown(socket.SHUT_WR)
        first, second, third = replies(plain, 3)
        assert (first, str(second).split()[0], third) == (b"OK", "CANCELLED", b"PONG")
        assert plain.recv(10) == b""
    assert tcp.cancelled.wait(5)


def test_a_slow_reader_does_not_grow_the_node(local: Served) -> None:
    """Answers to a client that does not read wait in the socket; others are served meanwhile."""
    with raw(local) as plain, Client(local.address) as other:
        plain.sendall(b"BIG 1000000\r\n" * 200)
        assert other.execute("PING") == b"PONG"
        session = next(s for s in local.service.sessions if s.queue)
        assert session._transport is not None
        assert session._transport.get_write_buffer_size() < 8_000_000
        assert sum(len(reply) for reply in replies(plain, 200)) == 200_000_000


def test_hostile_bytes_get_an_error_and_the_node_goes_on(tcp: Served) -> None:
    """Bombs and garbage end their own connection with a typed error and nothing else."""
    hostile = [
        b"*1000000000\r\n",
        b"*1\r\n:5\r\n",
        b"*1\r\n*1\r\n$1\r\na\r\n",
        b"*1\r\n$99999999999999\r\n" + b"x" * 20_000,
        b"x" * 100_000,
        bytes(range(256)) * 100,
    ]
    for data in hostile:
        with raw(tcp) as plain:
            plain.sendall(data)
            plain.shutdown(socket.SHUT_WR)
            answer = b""
            while chunk := plain.recv(65536):
                answer += chunk
            refusals = (b"-BADREQ", b"-TOOBIG", b"-UNKNOWN", b"-NOAUTH")
            assert answer.startswith(refusals), (data[:20], answer[:80])
    with Client(tcp.address, token=TOKEN) as client:
        assert client.execute("PING") == b"PONG"


def test_a_thousand_idle_connections_are_borne(local: Served) -> None:
    """1,000 idle connections are accepted and do not keep others from being served."""
    idle = [raw(local) for _ in range(1000)]
    try:
        with Client(local.address) as client:
            assert client.execute("PING") == b"PONG"
            deadline = time.monotonic() + 10
            while len(local.service.sessions) < 1001 and time.monotonic() < deadline:
                client.execute("PING")
            assert len(local.service.sessions) == 1001
    finally:
        for plain in idle:
            plain.close()


def test_redis_py_speaks_both_protocols(tcp: Served) -> None:
    """redis-py logs in by RESP2 and RESP3, pipelines, and reads INFO and COMMAND."""
    for protocol in (2, 3):
        host, port = tcp.address.host, tcp.address.port
        client = redis.Redis(host, port, password=TOKEN, protocol=protocol, decode_responses=True)
        with client:
            assert client.ping()
            assert client.echo("hällo") == "hällo"
            assert client.info()["a"] == 1
            assert client.command_count() > 10
            pipe = client.pipeline(transaction=False)
            for index in range(1000):
                pipe.execute_command("VIRGO_TEST", index)
            assert pipe.execute() == [[str(index)] for index in range(1000)]
            with pytest.raises(redis.ResponseError, match="UNKNOWN"):
                client.execute_command("NO_SUCH")


def test_the_text_form_equals_the_command(local: Served) -> None:
    """`virgo_cloud_test(a, "b, c")` is VIRGO_TEST with two arguments; case does not matter."""
    with raw(local) as plain:
        plain.sendall(b'virgo_cloud_test(a, "b, (c)")\r\nvirgo_test()\nVirgo_Test x\n')
        assert replies(plain, 3) == [[b"a", b"b, (c)"], [], [b"x"]]


def test_both_clients_have_the_same_surface(local: Served) -> None:
    """run, run_many, execute, errors and stats of the asyncio client equal the blocking one's."""
    calls = [Call(("VIRGO_TEST", index), lambda reply: reply[0]) for index in range(500)]

    async def main() -> list[Any]:
        async with AsyncClient(local.address) as client:
            with pytest.raises(UnknownCommand):
                await client.execute("NO_SUCH")
            with pytest.raises(DeadlineExceeded):
                await client.execute("SLOW", "5", timeout_s=0.1)
            return [await client.run(calls[7]), await client.run_many(calls), client.stats().keys()]

    with Client(local.address) as client:
        with pytest.raises(UnknownCommand):
            client.execute("NO_SUCH")
        with pytest.raises(DeadlineExceeded):
            client.execute("SLOW", "5", timeout_s=0.1)
        assert asyncio.run(main()) == [client.run(calls[7]), client.run_many(calls), client.stats().keys()]


def test_run_many_reports_failures_in_place(local: Served) -> None:
    """A failing call in the middle takes its place; the others have their results."""
    calls = [Call((name,), lambda reply: reply) for name in ("PING", "NO_SUCH", "PING")]
    with Client(local.address) as client:
        first, second, third = client.run_many(calls)
    assert (first, type(second), third) == (b"PONG", UnknownCommand, b"PONG")


def test_a_pool_is_safe_for_threads_and_notices_closed_connections(tmp_path: Path) -> None:
    """Many threads share one client; after the server's restart it reconnects without an error."""
    failures: list[Exception] = []
    with serving(tmp_path, OWNER) as served:
        client = Client(served.address)

        def work() -> None:
            try:
                for index in range(200):
                    assert client.execute("VIRGO_TEST", index) == [b"%d" % index]
            except Exception as error:  # noqa: BLE001 - the test shows whatever it was
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
    for idle in client._idle:
        idle.used = 0.0
    with pytest.raises(NotRunning):
        client.execute("PING")
    with serving(tmp_path, OWNER):
        assert client.execute("PING") == b"PONG"
    client.close()


def test_a_lost_node_is_named(tmp_path: Path) -> None:
    """A connection that breaks while an answer is awaited is NodeLost, not a hang."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "x"))
    listening.listen()

    def drop() -> None:
        accepted, _ = listening.accept()
        accepted.recv(100)
        accepted.close()

    thread = threading.Thread(target=drop)
    thread.start()
    with Client(Address(path=str(tmp_path / "x"))) as client, pytest.raises(NodeLost):
        client.execute("PING")
    thread.join()
    listening.close()


def test_values_of_many_megabytes_pass(local: Served) -> None:
    """64 MiB go both ways unharmed, in one request and in a pipeline larger than the buffers."""
    value = bytes(range(256)) * (256 * 1024)
    with Client(local.address) as client:
        assert client.execute("VIRGO_TEST", value) == [value]
        calls = [Call(("VIRGO_TEST", value[: 4 << 20]), lambda reply: len(reply[0])) for _ in range(8)]
        assert client.run_many(calls) == [4 << 20] * 8


def test_select_and_config_as_tools_expect(local: Served) -> None:
    """SELECT 0 and CONFIG GET work; another database is refused with a reason."""
    with Client(local.address) as client:
        assert client.execute("SELECT", 0) == b"OK"
        assert client.execute("CONFIG", "GET", "save") == []
        with pytest.raises(BadArgument, match="one database"):
            client.execute("SELECT", 1)


def test_a_mistyped_line_costs_neither_connection_nor_login(tcp: Served) -> None:
    """Whoever forgets a quote in telnet is told so, in the order of the requests, and goes on."""
    with raw(tcp) as plain:
        lines = [f"AUTH {TOKEN!r}", 'VIRGO_TEST(a,"open)', "VIRGO_TEST 'a'b", "VIRGO_TEST(1, 2)", "QUIT"]
        plain.sendall("".join(f"{line}\r\n" for line in lines).encode())
        answer = plain.makefile("rb").read()
    assert answer.startswith(b"+OK\r\n-BADREQ unbalanced quotes"), answer
    assert answer.count(b"-BADREQ") == 2
    assert answer.endswith(b"*2\r\n$1\r\n1\r\n$1\r\n2\r\n+OK\r\n"), answer


def test_contexts_that_are_none_are_refused(local: Served) -> None:
    """WITH without a command, within another, or with a context nested too deep is the client's fault."""
    with Client(local.address) as client:
        for words in (("{}",), ("{}", "with", "{}", "PING")):
            with pytest.raises(BadArgument):
                client.execute("WITH", *words)
        with pytest.raises(BadRequest):
            client.execute("WITH", '{"x":' + "[" * 5000 + "]" * 5000 + "}", "PING")
        assert client.execute("PING") == b"PONG"
