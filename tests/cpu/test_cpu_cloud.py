"""Calls through real nodes: by RESP, text and Python; placement, recursion, roles, cancelling, node loss."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import redis
from tests.conftest import RunningCloud
from tests.cpu.noting import note_and_sleep, noted
from tests.waiting import alive, until

from virgo.aio import connect as aio_connect
from virgo.cloud import Cloud, connect
from virgo.errors import (
    BadArgument,
    CallFailed,
    Cancelled,
    DeadlineExceeded,
    Denied,
    NoNode,
    NotExported,
    VirgoError,
)
from virgo.wire.tokens import TokenStore

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def cloud(cloud3: RunningCloud) -> Iterator[Cloud]:
    with cloud3.connect("n1") as connected:
        yield connected


def resp(cloud3: RunningCloud, name: str = "n1", *, token: str = "") -> redis.Redis:
    return redis.Redis(port=cloud3.ports(name)["cpu"], password=token or cloud3.token)


def where(seconds: float = 0.0) -> str:
    time.sleep(seconds)
    return os.environ["VIRGO_NODE"]


# --- by name, from any language -------------------------------------------------------------------


def test_redis_clients_call_by_name(cloud3):
    """Words that are JSON are values; results have the type that RESP has for them."""
    client = resp(cloud3)
    run = lambda *words: client.execute_command("VIRGO_CLONE", *words)  # noqa: E731
    assert run("add", 2, 3) == 5
    assert run("add", '"a"', "b") == b"ab"
    assert run("echo", "null") is None
    assert float(run("echo", "1.5")) == 1.5  # RESP2 has no doubles
    assert run("echo", "plain text") == b"plain text"
    assert run("echo", b"\xff\x00") == b"\xff\x00"
    assert json.loads(run("wordcount", "a b a")) == {"a": 2, "b": 1}
    assert run("sum", "[1, 2, 3]") == 6
    assert run("node") in (b"n1", b"n2", b"n3")
    assert b"Linux" in run("uname", "-s")
    assert client.execute_command("virgo_cloud_clone", "add", 1, 1) == 2


def test_telnet_calls_in_the_reference_form(cloud3):
    """`virgo_clone(add, 2, 3)` and the bare name of the reference's test function, on a typed line."""
    with socket.create_connection(("127.0.0.1", cloud3.ports("n2")["cpu"])) as line:
        reader = line.makefile("rb")

        def ask(text: str) -> bytes:
            line.sendall(text.encode() + b"\r\n")
            return reader.readline().strip()

        assert ask(f"AUTH {cloud3.token}") == b"+OK"
        assert ask("virgo_clone(add, 2, 3)") == b":5"
        assert ask("VIRGO_CLONE add 2 3") == b":5"
        assert ask("virgo_cloud_test(1)").startswith(b"$")
        assert b"executed on node n" in reader.readline()


def test_failures_by_name_are_error_replies_with_a_cause_and_a_node(cloud3):
    """NOTEXPORTED, an exception, a failing program, an unsendable result: one line each, with where."""
    client = resp(cloud3)
    for words, pattern in (
        (("no_such_thing",), "NOTEXPORTED .*no_such_thing.* Hint: "),
        (("add", "1"), "CALLFAILED add on node n[123] raised TypeError"),
        (("uname", "--no-such-option"), "CALLFAILED uname on node n[123] ended with status 1"),
        (("",), "NOTEXPORTED"),
        (("../../etc/passwd",), "NOTEXPORTED"),
    ):
        with pytest.raises(redis.ResponseError, match=pattern):
            client.execute_command("VIRGO_CLONE", *words)
    with pytest.raises(redis.ResponseError, match="BADARG VIRGO_CLONE got 0 arguments"):
        client.execute_command("VIRGO_CLONE")
    assert client.execute_command("VIRGO_CLONE", "add", 1, 1) == 2


def test_exports_are_listed(cloud3, cloud):
    """Name, kind and summary of functions and programs."""
    found = {entry.name: entry for entry in cloud.cpu.exports()}
    assert found["wordcount"].kind == "function" and "word" in found["wordcount"].summary
    assert found["uname"].kind == "program"
    assert [b"add", b"function", b"The sum of two numbers."] in resp(cloud3).execute_command("CPU.EXPORTS")


# --- from Python ----------------------------------------------------------------------------------


def test_python_calls_return_results_and_raise_what_was_raised(cloud):
    """Callables by value and by reference, names, keyword arguments; exceptions as themselves."""
    factor = 6
    assert cloud.cpu.clone(pow, 2, 10) == 1024
    assert cloud.cpu.clone(lambda value, *, plus: value * factor + plus, 7, plus=1) == 43
    assert cloud.cpu.clone("wordcount", "x y x") == {"x": 2, "y": 1}
    assert cloud.cpu.clone("echo", b"\x00\xff", [1, None, 2.5]) == [b"\x00\xff", [1, None, 2.5]]
    with pytest.raises(ZeroDivisionError) as caught:
        cloud.cpu.clone(lambda: 1 // 0)
    assert isinstance(caught.value.__cause__, CallFailed)
    assert "ZeroDivisionError" in caught.value.__cause__.remote_traceback
    with pytest.raises(CallFailed, match="raised TypeError"):
        cloud.cpu.clone("add", 1)
    with pytest.raises(NotExported):
        cloud.cpu.clone("no_such_thing")
    with pytest.raises(BadArgument):
        cloud.cpu.clone("echo", object())


def test_failures_keep_their_cause_over_the_wire(cloud):
    """Signal, exit and result are told apart, also when the call ran on another node."""
    for node in ("n1", "n2"):
        for function, cause in (
            (lambda: os.kill(os.getpid(), signal.SIGSEGV), "signal"),
            (lambda: os._exit(4), "exit"),
            (threading.Lock, "result"),
        ):
            with pytest.raises(CallFailed) as caught:
                cloud.cpu.clone(function, node=node)
            assert (caught.value.cause, caught.value.node) == (cause, node)


def test_a_call_can_be_pinned_to_a_node(cloud):
    """`node=` is obeyed; a name that is no node's is NoNode."""
    for name in ("n1", "n2", "n3"):
        assert cloud.cpu.clone("node", node=name) == name
        assert cloud.cpu.clone(where, node=name) == name
    with pytest.raises(NoNode, match="n9"):
        cloud.cpu.clone("node", node="n9")


def test_calls_spread_over_the_nodes(cloud):
    """A burst of calls that take a while is shared by all three nodes."""
    until(
        lambda: not cloud.cpu.tasks()
    )  # workers that a client had who has just gone are free a moment later
    counts = dict.fromkeys(("n1", "n2", "n3"), 0)
    for name in cloud.cpu.map(where, [0.05] * 24):
        counts[name] += 1
    assert min(counts.values()) >= 4


def test_the_executor_contract(cloud):
    """submit, map with chunks and buffers, as_completed, wait, timeouts, callbacks."""
    pool = cloud.cpu
    futures = [pool.submit(lambda value: value * value, value) for value in range(50)]
    assert sum(future.result(30) for future in cf.as_completed(futures, 30)) == sum(v * v for v in range(50))
    assert list(pool.map(pow, range(10), range(10))) == [v**v for v in range(10)]
    assert list(pool.map(pow, range(25), [2] * 25, chunksize=10)) == [v * v for v in range(25)]
    assert list(pool.map(abs, range(-20, 0), buffersize=3)) == list(range(20, 0, -1))
    assert list(pool.map("add", [1, 2], [3, 4])) == [4, 6]
    with pytest.raises(TimeoutError):
        list(pool.map(time.sleep, [30], timeout=0.2))
    called = threading.Event()
    pool.submit(abs, -1).add_done_callback(lambda _: called.set())
    assert called.wait(10)
    failed = pool.submit(lambda: {}["key"])
    assert isinstance(failed.exception(10), KeyError)
    with pytest.raises(NotExported):
        pool.submit("no_such_thing").result(10)


def test_a_slow_call_does_not_hold_up_those_behind_it(cloud):
    """Outcomes are collected as they come, not in the order of the calls."""
    slow = cloud.cpu.submit(time.sleep, 30)
    quick = [cloud.cpu.submit(abs, -value) for value in range(20)]
    assert [future.result(20) for future in quick] == list(range(20))
    assert not slow.done() and slow.cancel()


def test_an_executor_that_is_shut_down_takes_no_more_calls(cloud3):
    """RuntimeError as in the standard library; what was outstanding is finished or cancelled."""
    with cloud3.connect("n1") as cloud:
        with cloud.cpu as pool:
            future = pool.submit(time.sleep, 0.2)
        assert future.done()
        with pytest.raises(RuntimeError, match="shutdown"):
            pool.submit(abs, 1)
    with cloud3.connect("n1") as cloud:
        futures = [cloud.cpu.submit(time.sleep, 30) for _ in range(5)]
        cloud.cpu.shutdown(cancel_futures=True)
        assert all(future.cancelled() for future in futures)


def test_two_thousand_calls_are_all_answered(cloud):
    """Nothing is lost or mixed up among many calls at once."""
    futures = [cloud.cpu.submit(abs, -value) for value in range(2000)]
    assert [future.result(60) for future in futures] == list(range(2000))
    assert cloud.cpu.stats()["outstanding"] == 0


# --- ending calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("node", ["n1", "n3"])
def test_cancelling_a_running_future_kills_its_process(cloud, tmp_path, node):
    """When cancel() returns the process is dead, on this node as on another."""
    future = cloud.cpu.submit_to(note_and_sleep, (str(tmp_path / "pid"),), node=node)
    pid = noted(tmp_path / "pid")
    assert future.running()
    assert future.cancel() and future.cancelled()
    assert not alive(pid)
    with pytest.raises(cf.CancelledError):
        future.result()


def test_a_timeout_stops_the_call_wherever_it_runs(cloud, tmp_path):
    """DeadlineExceeded says where it ran, after it is dead; what waits is never begun."""
    for node in ("n1", "n2"):
        path = tmp_path / node
        with pytest.raises(DeadlineExceeded, match=f"on node {node}"):
            cloud.cpu.clone(note_and_sleep, str(path), node=node, timeout=0.8)
        assert not alive(noted(path))


def test_a_client_that_goes_away_ends_its_calls(cloud3, tmp_path):
    """Closing the connection of a call, or dying with submitted ones, kills what they ran."""
    with cloud3.connect("n1") as cloud:
        connection = cloud.client.take()
        from virgo.cpu.apart import Hand
        from virgo.cpu.client import by_node
        from virgo.cpu.shipping import ship_arguments
        from virgo.cpu.tasks import task_of
        from virgo.wire.client import pack

        arguments = ship_arguments((str(tmp_path / "one"),), {})
        call = by_node(task_of(note_and_sleep, node="n2"), arguments, Hand(""))
        connection.send(pack(call.request), None)
        pid = noted(tmp_path / "one")
        connection.close()
        until(lambda: not alive(pid))
    child = os.fork()
    if child == 0:
        try:
            ours = connect(f"unix:{cloud3.socket('n1')}", home=cloud3.home)
            ours.cpu.submit_to(note_and_sleep, (str(tmp_path / "two"),), node="n1")
            ours.cpu.submit_to(note_and_sleep, (str(tmp_path / "three"),), node="n3")
            time.sleep(60)
        finally:
            os._exit(1)
    pids = [noted(tmp_path / "two"), noted(tmp_path / "three")]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until(lambda: not any(map(alive, pids)))


# --- calls that make calls ------------------------------------------------------------------------


def fibonacci(number: int) -> int:
    from virgo.syscalls import cloud

    if number < 2:
        return number
    left, right = (cloud().cpu.submit(fibonacci, number - less) for less in (1, 2))
    return left.result() + right.result()


def test_a_clone_that_clones_does_not_deadlock(cloud):
    """More calls wait for calls of their own than there are workers, and all come to an end."""
    assert cloud.cpu.submit(fibonacci, 6).result(60) == 8


def descend(depth: int) -> int:
    from virgo.syscalls import virgo_clone

    return 1 + virgo_clone(descend, depth - 1) if depth else 0


def test_a_deadline_reaches_the_calls_of_a_call(cloud, tmp_path):
    """The nested call ends with the one that made it."""

    def outer(path: str) -> None:
        from virgo.syscalls import cloud as local

        local().cpu.clone(note_and_sleep, path, node="n3")

    with pytest.raises(DeadlineExceeded):
        cloud.cpu.clone(outer, str(tmp_path / "pid"), node="n2", timeout=2)
    pid = noted(tmp_path / "pid")
    until(lambda: not alive(pid))
    assert cloud.cpu.clone(descend, 5) == 5


# --- roles ----------------------------------------------------------------------------------------


def test_roles_decide_what_may_be_called(cloud3, tmp_path):
    """`read` lists, `write` calls by name, `exec` ships code; nobody else unpickles anything."""
    store = TokenStore(cloud3.home)
    reader, writer = store.create("cpu-reader", ["read"]), store.create("cpu-writer", ["read", "write"])
    with pytest.raises(redis.ResponseError, match="needs the role 'write'"):
        resp(cloud3, token=reader).execute_command("VIRGO_CLONE", "add", 1, 2)
    assert resp(cloud3, token=writer).execute_command("VIRGO_CLONE", "add", 1, 2) == 3
    port = cloud3.ports("n1")["cpu"]
    with connect(f"127.0.0.1:{port}", token=writer, home=cloud3.home) as cloud:
        assert cloud.cpu.clone("add", 1, 2) == 3
        assert cloud.cpu.submit("add", 1, 2).result(10) == 3
        for attempt in (
            lambda: cloud.cpu.clone(abs, -1),
            lambda: cloud.cpu.submit(abs, -1).result(10),
            lambda: cloud.cpu.publish(where),
        ):
            with pytest.raises(Denied, match="exec"):
                attempt()
        # A pickle in the place of a name is never opened.
        bomb = tmp_path / "exploded"
        payload = cloudpickle.dumps(os.system)
        for verb in ("CPU.INVOKE", "CPU.INVOKE.HERE"):
            with pytest.raises(VirgoError):
                cloud.client.execute(verb, b"\x80", payload, cloudpickle.dumps((f"touch {bomb}",)))
        assert not bomb.exists()
    store.remove("cpu-reader")
    store.remove("cpu-writer")


def test_malformed_requests_are_refused_and_the_connection_goes_on(cloud):
    """Garbage in options, payloads and keys gets a typed error."""
    execute = cloud.client.execute
    with pytest.raises(VirgoError, match="options"):
        execute("CPU.CALL", b"garbage", b"x", b"y")
    with pytest.raises(BadArgument):
        execute("CPU.CALL", b"\x81\xa4form\xa4data", b"x", b"y")
    with pytest.raises(CallFailed, match="cannot be loaded"):
        cloud.client.run(_raw(b"not a pickle"))
    with pytest.raises(BadArgument, match="key"):
        execute("CPU.CALL.SUBMIT", b"mailbox", b"\x80", b"x", b"y")
    with pytest.raises(Cancelled):
        execute("CPU.COLLECT", b"no such mailbox")
    assert execute("CPU.CANCEL", b"no such key") == 0
    assert cloud.cpu.clone(abs, -1) == 1


def _raw(function: bytes) -> Any:
    from virgo.cpu import messages
    from virgo.wire.call import Call

    return Call(
        ("CPU.CALL", b"\x80", function, cloudpickle.dumps(((), {}))),
        lambda outcome: messages.as_result(outcome, trusted=True),
    )


# --- published functions --------------------------------------------------------------------------


def test_a_published_function_is_callable_on_every_node_until_it_is_taken_back(cloud):
    """publish, publish again, unpublish: each takes effect on all nodes."""
    assert cloud.cpu.publish(lambda value: value + 1, name="step") > 0
    assert [cloud.cpu.clone("step", 1, node=name) for name in ("n1", "n2", "n3")] == [2, 2, 2]
    cloud.cpu.publish(lambda value: value + 10, name="step")
    assert cloud.cpu.clone("step", 1, node="n1") == 11
    until(lambda: [cloud.cpu.clone("step", 1, node=name) for name in ("n2", "n3")] == [11, 11])
    assert "step" in {entry.name for entry in cloud.cpu.exports()}
    cloud.cpu.unpublish("step")
    with pytest.raises(NotExported):
        cloud.cpu.clone("step", 1, node="n1")
    with pytest.raises(NotExported):
        cloud.cpu.unpublish("step")
    with pytest.raises(BadArgument, match="echo"):
        cloud.cpu.publish(abs, name="echo")


# --- asyncio --------------------------------------------------------------------------------------


def test_the_asyncio_client_does_the_same(cloud3, tmp_path):
    """clone, map, submit; cancelling the task, or closing the cloud, kills the process."""

    async def main() -> None:
        async with await aio_connect(f"unix:{cloud3.socket('n1')}") as cloud:
            assert await cloud.cpu.clone(pow, 2, 5) == 32
            doubled = cloud.cpu.map(lambda value: value * 2, range(200), chunksize=7, buffersize=4)
            assert [value async for value in doubled] == [v * 2 for v in range(200)]
            assert [value async for value in cloud.cpu.map("add", [1, 2], [3, 4])] == [4, 6]
            assert await cloud.cpu.submit_to(where, node="n3") == "n3"
            with pytest.raises(ZeroDivisionError):
                await cloud.cpu.clone(lambda: 1 / 0)
            task = cloud.cpu.submit(note_and_sleep, str(tmp_path / "pid"))
            pid = await asyncio.to_thread(noted, tmp_path / "pid")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(until, lambda: not alive(pid))
            left = cloud.cpu.submit(note_and_sleep, str(tmp_path / "left"))
            pid = await asyncio.to_thread(noted, tmp_path / "left")
        assert left.cancelled()  # by the end of the connection
        await asyncio.to_thread(until, lambda: not alive(pid))

    asyncio.run(main())


# --- modules ---------------------------------------------------------------------------------------


def test_a_module_beside_the_program_is_shipped_with_it(cloud3: RunningCloud, tmp_path: Path) -> None:
    """A function of a module that only the program's directory has runs on nodes, helpers included."""
    (tmp_path / "helpers.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "work.py").write_text("import helpers\n\ndef run(x):\n    return helpers.double(x) + 1\n")
    program = tmp_path / "main.py"
    program.write_text(
        "import virgo, work\nwith virgo.connect() as c: print(c.cpu.submit(work.run, 4).result())\n"
    )
    result = subprocess.run(
        [sys.executable, program], env=cloud3.environment, capture_output=True, text=True, timeout=60
    )
    assert (result.stdout, result.stderr) == ("9\n", "")


def test_an_exception_shows_where_it_arose(cloud3: RunningCloud) -> None:
    """The traceback that Python prints names the function on the node in which the exception arose."""
    with cloud3.connect("n1") as cloud, pytest.raises(ZeroDivisionError) as caught:
        cloud.cpu.clone(_outer, 0)
    shown = "".join(traceback.format_exception(caught.value))
    assert "On node n" in shown
    assert "_inner" in shown


def _outer(x: int) -> float:
    return _inner(x)


def _inner(x: int) -> float:
    return 1 / x


# --- forks ------------------------------------------------------------------------------------------


def fork_and_return(seconds: float) -> str:
    if os.fork() == 0:
        time.sleep(seconds)
        return "for nobody"
    return "right"


def test_what_a_call_forks_answers_nobody(cloud):
    """A process that a call forked, and that returns from it too, does not answer in a later call's place."""
    forking = cloud.cpu.submit_to(fork_and_return, (0.2,), node="n1")
    others = [cloud.cpu.submit_to(echo_later, (number,), node="n1") for number in range(6)]
    assert forking.result(30) == "right"
    assert [one.result(30) for one in others] == list(range(6))


def echo_later(number: int) -> int:
    time.sleep(0.3)
    return number


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_leaves_its_parents_calls_alone(cloud3):
    """Closing the cloud, or cancelling, in a child returns at once, and the parent gets its results."""
    with cloud3.connect() as parent:
        future = parent.cpu.submit(where, 1.0)
        until(future.running)
        child = os.fork()
        if child == 0:
            began = time.monotonic()
            left = not future.cancel()
            parent.close()
            os._exit(0 if left and time.monotonic() - began < 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert future.result(30) in cloud3.names
