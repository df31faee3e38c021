"""The workers of a node, with real processes: outcomes, faults, cancelling, and that nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
import uvloop
from tests.waiting import alive, until

from virgo import context as contexts
from virgo.cpu import messages
from virgo.cpu.messages import Work
from virgo.cpu.pool import WorkerPool
from virgo.errors import BadConfig, CallFailed, DeadlineExceeded, NodeLost

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def shipped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Work:
    return Work(
        "pickle",
        function.__name__,
        "",
        cloudpickle.dumps(function),
        [cloudpickle.dumps((args, kwargs))],
    )


def named(name: str, *words: bytes, program: list[str] | None = None) -> Work:
    return Work("text", name, name, b"", list(words), program)


@contextlib.asynccontextmanager
async def pool_of(directory: Path, target: int = 1, **options: Any) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(node="n7", directory=directory, target=target, **options)
    await pool.start()
    try:
        yield pool
    finally:
        pids = pool.pids()
        await pool.stop()
        until(lambda: not any(map(alive, pids)), within_s=1.0)


def in_pool(directory: Path, work: Callable[[WorkerPool], Any], **options: Any) -> Any:
    async def main() -> Any:
        async with pool_of(directory, **options) as pool:
            return await work(pool)

    return uvloop.run(main())  # the node's event loop


def outcome_of(directory: Path, *works: Work, **options: Any) -> list[Any]:
    """The results of calls, one after the other in one pool; an exception in place of a result."""

    async def work(pool: WorkerPool) -> list[Any]:
        results: list[Any] = []
        for call in works:
            try:
                outcome = await pool.run(call)
                if call.form == "text":
                    results.append(messages.as_reply(outcome))
                else:
                    results.append(messages.as_result(outcome, trusted=True))
            except Exception as error:  # noqa: BLE001 - the test looks at it
                results.append(error)
        return results

    return in_pool(directory, work, **options)


# --- what is shipped ------------------------------------------------------------------------


class Odd(Exception):
    """Does not unpickle: its constructor wants two arguments."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"odd {first} {second}")


def double(value: Any) -> Any:
    return value * 2


def fail(message: str) -> None:
    raise ValueError(message)


def fail_oddly() -> None:
    raise Odd(1, 2)


def exit_hard(status: int) -> None:
    os._exit(status)


def exit_softly() -> None:
    sys.exit("enough")


def kill_self(number: int) -> None:
    os.kill(os.getpid(), number)


def unpicklable() -> Any:
    return (value for value in range(3))


def size(data: bytes) -> int:
    return len(data)


def test_a_call_gives_its_result(tmp_path):
    """Shipped functions, closures and names with words give their results."""
    factor = 21
    results = outcome_of(
        tmp_path,
        shipped(double, factor),
        shipped(lambda: factor + 1),
        named("add", b"2", b"3"),
        named("echo", b'{"a": [1, 2.5]}'),
        named("echo", b"\xff\xfe"),
        named("echo", b"two words"),
        named("echo", b"null"),
        named("node"),
    )
    assert results == [42, 22, 5, b'{"a": [1, 2.5]}', b"\xff\xfe", b"two words", None, b"n7"]


def test_an_exception_arrives_as_itself_with_its_remote_traceback(tmp_path):
    """ValueError comes back as ValueError, caused by a CallFailed that holds the worker's traceback."""
    [error] = outcome_of(tmp_path, shipped(fail, "no good"))
    assert type(error) is ValueError and error.args == ("no good",)
    cause = error.__cause__
    assert isinstance(cause, CallFailed) and cause.node == "n7" and cause.cause == "exception"
    assert "in fail" in cause.remote_traceback and "worker.py" not in cause.remote_traceback


def test_an_exception_that_does_not_unpickle_arrives_as_text(tmp_path):
    """Its type, message, node and traceback are in a CallFailed."""
    [error] = outcome_of(tmp_path, shipped(fail_oddly))
    assert type(error) is CallFailed
    assert "Odd" in str(error) and "odd 1 2" in str(error) and "n7" in str(error)
    assert "fail_oddly" in error.remote_traceback


@pytest.mark.parametrize(
    ("call", "cause", "text"),
    [
        (shipped(exit_hard, 3), "exit", "status 3"),
        (shipped(exit_softly), "exit", "sys.exit(enough)"),
        (shipped(kill_self, signal.SIGKILL), "signal", "SIGKILL"),
        (shipped(kill_self, signal.SIGSEGV), "signal", "SIGSEGV"),
        (shipped(unpicklable), "result", "generator"),
        (named("add", b"1", b'"x"'), "exception", "TypeError"),
        (named("boom", program=["/bin/sh", "-c", "echo nothing here >&2; exit 7"]), "program", "status 7"),
    ],
)
def test_a_failure_says_its_cause_and_the_next_call_runs(tmp_path, call, cause, text):
    """Exit, signals, unpicklable results, exceptions and programs; the pool goes on."""
    error, after = outcome_of(tmp_path, call, named("add", b"1", b"1"))
    assert isinstance(error, CallFailed)
    assert (error.cause, error.node) == (cause, "n7")
    assert text in str(error) and call.label in str(error) and "n7" in str(error)
    assert after == 2


def test_arguments_that_do_not_unpickle_are_a_failure_with_a_hint(tmp_path):
    """A function of a module that the node lacks names the module and what to do."""
    missing = Work("pickle", "f", "", b"cno_such_module\nf\n.", [pickle.dumps(((), {}))])
    error, after = outcome_of(tmp_path, missing, shipped(double, 1))
    assert isinstance(error, CallFailed) and "no_such_module" in str(error) and "by_value" in error.hint
    assert after == 2


def test_huge_arguments_and_results_pass(tmp_path):
    """64 MiB there, 32 MiB back."""
    data = os.urandom(1 << 20) * 64
    there, back = outcome_of(tmp_path, shipped(size, data), shipped(double, bytes(16 << 20)))
    assert there == len(data) and len(back) == 32 << 20


def test_a_function_is_sent_to_a_worker_once(tmp_path):
    """A worker that has the function gets its digest only; one that lost it is sent it again."""

    async def work(pool: WorkerPool) -> list[Any]:
        call = shipped(lambda blob=bytes(1 << 16): len(blob))
        results = [await pool.run(call)]
        worker = next(iter(pool._workers.values()))
        sent = []
        original = worker.send
        worker.send = lambda *parts: (sent.append(len(parts[1])), original(*parts))
        results.append(await pool.run(call))
        worker.known[next(iter(worker.known))] = None
        other = shipped(double, 1)
        worker.known[__import__("hashlib").sha256(other.function).digest()] = None  # a false belief
        results.append(await pool.run(other))
        assert sent == [0, 0, len(other.function)]
        return [messages.as_result(result, trusted=True) for result in results]

    assert in_pool(tmp_path, work) == [1 << 16, 1 << 16, 2]


def test_the_context_of_the_request_is_current_in_the_call(tmp_path):
    """Cause and deadline travel into the worker."""

    def seen() -> tuple[str, float | None]:
        context = contexts.current()
        return context.id, context.remaining_s()

    context = contexts.Context(id="req-1", deadline=time.monotonic() + 60)
    call = shipped(seen)
    call = Work(call.form, call.label, "", call.function, call.arguments, None, contexts.encode(context))
    [(identifier, left_s)] = outcome_of(tmp_path, call)
    assert identifier == "req-1" and 50 < left_s <= 60


def test_a_deadline_stops_the_call_and_what_it_started(tmp_path):
    """DeadlineExceeded comes after the worker and its children are dead, and another worker takes over."""
    note = tmp_path / "pids"

    def linger(path: str) -> None:
        child = subprocess.Popen(["sleep", "100"])
        Path(path).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(100)

    async def work(pool: WorkerPool) -> bytes:
        with pytest.raises(DeadlineExceeded, match="linger on node n7"):
            await pool.run(shipped(linger, str(note)), deadline=time.monotonic() + 0.7)
        pids = [int(word) for word in note.read_text().split()]
        assert len(pids) == 2
        assert not alive(pids[0])
        until(lambda: not alive(pids[1]), within_s=1.0)
        return messages.as_reply(await pool.run(named("add", b"1", b"2")))

    assert in_pool(tmp_path, work) == 3


def test_cancelling_kills_a_call_that_ignores_sigterm_and_returns_when_it_is_dead(tmp_path, monkeypatch):
    """SIGTERM first, SIGKILL after the grace; the awaiting task ends only then."""
    monkeypatch.setattr("virgo.cpu.processes.CALL_TERMINATE_S", 0.3)
    note = tmp_path / "pid"

    def stubborn(path: str) -> None:
        signal.signal(signal.SIGTERM, lambda *_: Path(path + ".term").touch())
        Path(path).write_text(str(os.getpid()))
        while True:
            time.sleep(100)

    async def work(pool: WorkerPool) -> None:
        task = asyncio.create_task(pool.run(shipped(stubborn, str(note))))
        other = asyncio.create_task(pool.run(named("sleep", b"0.5")))
        while not note.exists() or not note.read_text():
            await asyncio.sleep(0.01)
        pid = int(note.read_text())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not alive(pid) and (tmp_path / "pid.term").exists()
        assert messages.as_reply(await other) == 0.5
        assert pool.outstanding == 0

    in_pool(tmp_path, work, target=2)


def test_a_waiting_call_is_withdrawn(tmp_path):
    """A call whose deadline passes before a worker is free was never begun, and says so."""

    async def work(pool: WorkerPool) -> None:
        first = asyncio.create_task(pool.run(named("sleep", b"0.4")))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded, match="not begun"):
            await pool.run(shipped(exit_hard, 1), deadline=time.monotonic() + 0.1)
        assert messages.as_reply(await first) == 0.4

    in_pool(tmp_path, work)


def test_the_death_of_one_worker_breaks_no_other_call(tmp_path):
    """Of many calls on two workers, those that kill their worker fail, and only those."""

    def sometimes(number: int) -> int:
        if number % 5 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    async def work(pool: WorkerPool) -> None:
        outcomes = await asyncio.gather(*(pool.run(shipped(sometimes, number)) for number in range(40)))
        for number, outcome in enumerate(outcomes):
            if number % 5 == 0:
                assert messages.as_error(outcome).cause == "signal"
            else:
                assert messages.as_result(outcome, trusted=True) == number
        assert pool.stats()["failed"] == 8 and pool.stats()["done"] == 32

    in_pool(tmp_path, work, target=2)


def test_the_death_of_the_template_is_mended_and_running_calls_go_on(tmp_path):
    """A killed template is started again; the call that ran meanwhile gives its result."""

    async def work(pool: WorkerPool) -> None:
        running = asyncio.create_task(pool.run(named("sleep", b"0.5")))
        while not pool.stats()["busy"]:
            await asyncio.sleep(0.01)
        os.kill(pool.pids()[0], signal.SIGKILL)
        assert messages.as_reply(await running) == 0.5
        calls = [pool.run(named("sleep", b"0.01")) for _ in range(6)]
        assert [messages.as_reply(outcome) for outcome in await asyncio.gather(*calls)] == [0.01] * 6
        while not pool.stats()["template_restarts"]:
            await asyncio.sleep(0.01)
        dead = await pool.run(shipped(kill_self, signal.SIGKILL))
        assert messages.as_error(dead).cause == "signal"

    in_pool(tmp_path, work, target=3)


def test_daemons_of_a_call_do_not_outlive_their_worker(tmp_path):
    """What left the worker's process group and session is killed when the worker ends."""
    note = tmp_path / "daemon"

    def daemonize(path: str) -> None:
        child = subprocess.Popen(["setsid", "sh", "-c", f"sleep 100 & echo $! > {path}; exit"])
        child.wait()
        os._exit(0)

    async def work(pool: WorkerPool) -> None:
        await pool.run(shipped(daemonize, str(note)))
        pid = int(note.read_text())
        while alive(pid):
            await asyncio.sleep(0.01)

    in_pool(tmp_path, work)


def test_a_program_that_leaves_processes_behind_does_not_keep_them(tmp_path):
    """Its result comes, then what it left in the background is killed with its worker."""
    script = "sleep 100 >/dev/null 2>&1 & echo $!"

    async def work(pool: WorkerPool) -> None:
        outcome = await pool.run(named("bg", program=["/bin/sh", "-c", script]))
        pid = int(messages.as_reply(outcome))
        while alive(pid):
            await asyncio.sleep(0.01)
        assert messages.as_reply(await pool.run(named("add", b"1", b"1"))) == 2

    in_pool(tmp_path, work)


def test_a_program_gets_its_words_unchanged_and_no_shell(tmp_path):
    """Blanks, stars and semicolons are only text; bytes that are not UTF-8 pass."""
    words = (b"a b", b"*; rm -rf x", b"\xff", b"42")
    [output] = outcome_of(tmp_path, named("show", *words, program=["/usr/bin/printf", "%s|"]))
    assert output == b"a b|*; rm -rf x|\xff|42|"


def test_a_program_that_writes_without_end_is_stopped(tmp_path):
    """Past the bound on output it fails, and the error says so."""
    [error] = outcome_of(tmp_path, named("flood", program=["/usr/bin/yes"]))
    assert (
        isinstance(error, CallFailed) and error.cause == "program" and "bytes and was stopped" in str(error)
    )


def test_a_call_that_writes_to_its_own_connection_harms_only_itself(tmp_path):
    """Garbage on every descriptor it can find ends the worker, not the pool."""

    def vandal() -> None:
        for descriptor in range(3, 64):
            with contextlib.suppress(OSError):
                os.write(descriptor, b"?!garbage\r\n")
        time.sleep(100)

    error, after = outcome_of(tmp_path, shipped(vandal), named("add", b"1", b"1"))
    assert isinstance(error, CallFailed) and after == 2


def test_a_call_that_closes_every_descriptor_harms_only_itself(tmp_path):
    """Even the lifeline may be gone: the worker is killed all the same."""

    def closer() -> None:
        os.closerange(3, 1024)
        time.sleep(100)

    error, after = outcome_of(tmp_path, shipped(closer), named("add", b"1", b"1"))
    assert isinstance(error, CallFailed) and after == 2


def test_modules_of_the_configuration_export_functions(tmp_path, monkeypatch):
    """cpu.imports are imported once, before the workers are forked."""
    (tmp_path / "wares.py").write_text(
        "import virgo.cpu.exports as e\n"
        "@e.export(name='shop.price')\ndef price(n):\n    'The price.'\n    return 3 * n\n"
    )
    environment = {"PYTHONPATH": str(tmp_path)}

    async def work(pool: WorkerPool) -> Any:
        assert pool.exports["shop.price"] == "The price."
        return messages.as_reply(await pool.run(named("shop.price", b"5")))

    assert in_pool(tmp_path, work, imports=["wares"], environment=environment) == 15


def test_a_module_that_cannot_be_imported_is_a_configuration_error(tmp_path):
    """start() names it instead of coming up without it."""
    with pytest.raises(BadConfig, match="no_such_wares"):
        in_pool(tmp_path, lambda pool: None, imports=["no_such_wares"])


def test_stop_fails_what_is_outstanding(tmp_path):
    """Calls of a pool that stops end with NodeLost, and their processes with it."""

    async def main() -> None:
        pool = WorkerPool(node="n7", directory=tmp_path, target=1)
        await pool.start()
        calls = [asyncio.create_task(pool.run(named("sleep", b"100"))) for _ in range(3)]
        while not pool.stats()["busy"]:
            await asyncio.sleep(0.01)
        pids = pool.pids()
        await pool.stop()
        for call in calls:
            with pytest.raises(NodeLost):
                await call
        assert not any(map(alive, pids))

    asyncio.run(main())


def test_no_worker_outlives_a_node_that_is_killed(tmp_path):
    """After kill -9 of the process that holds the pool, template, workers and their children are gone."""
    script = tmp_path / "node.py"
    script.write_text(
        textwrap.dedent("""
        import asyncio, sys
        from pathlib import Path
        from virgo.cpu.messages import Work
        from virgo.cpu.pool import WorkerPool

        async def main():
            pool = WorkerPool(node="n7", directory=Path(sys.argv[1]), target=2)
            await pool.start()
            busy = ["/bin/sh", "-c", "sleep 100 & sleep 100"]
            loop = asyncio.gather(
                pool.run(Work("text", "loop", "sleep", b"", [b"100"])),
                pool.run(Work("text", "busy", "busy", b"", [], busy)),
            )
            while pool.stats()["busy"] < 2 or len(pool.pids()) < 3:
                await asyncio.sleep(0.01)
            print(*pool.pids(), flush=True)
            await loop

        asyncio.run(main())
        """)
    )
    with subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE) as node:
        assert node.stdout is not None
        pids = [int(word) for word in node.stdout.readline().split()]
        assert len(pids) == 3
        groups = set(pids[1:])

        def members() -> list[int]:
            return [pid for pid in psutil.pids() if in_groups(pid)]

        def in_groups(pid: int) -> bool:
            with contextlib.suppress(ProcessLookupError):
                return os.getpgid(pid) in groups and alive(pid)
            return False

        until(lambda: len(members()) >= 4)  # two workers, a shell and a sleep at least
        node.kill()
    until(lambda: not members() and not any(map(alive, pids)))
