"""What a call writes, as its caller gets it: all of it, as it comes, before the result."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from tests.conftest import RunningCloud
from tests.waiting import alive, until

from virgo.aio import connect as aio_connect
from virgo.cloud import Cloud
from virgo.cpu.follow import Output
from virgo.errors import BadArgument, CallFailed, DeadlineExceeded

cloudpickle.register_pickle_by_value(sys.modules[__name__])

Clone = Callable[..., Any]


@pytest.fixture(params=["threads", "asyncio"])
def clone(request: pytest.FixtureRequest, running: RunningCloud) -> Iterator[Clone]:
    """`cloud.cpu.clone` of either client, as a plain function."""
    if request.param == "threads":
        with running.connect() as connected:
            yield connected.cpu.clone
        return

    def run(*args: Any, **options: Any) -> Any:
        async def main() -> Any:
            async with await aio_connect(f"unix:{running.socket('n1')}") as connected:
                return await connected.cpu.clone(*args, **options)

        return asyncio.run(main())

    yield run


def speak(text: str) -> str:
    print("out", text)
    print("err", text, file=sys.stderr)
    os.system(f"echo program {text}")
    return text


def wait_between(path: str) -> None:
    print("first", flush=True)
    while not Path(path).exists():
        time.sleep(0.01)
    print("last")


@pytest.mark.parametrize("binary", [False, True])
def test_all_that_a_call_writes_is_there_before_its_result(clone: Clone, binary: bool) -> None:
    """Standard output and standard error, of programs that it runs too, in a file of text or bytes."""
    for _ in range(5):
        file: Any = io.BytesIO() if binary else io.StringIO()
        assert clone(speak, "ä", output=file) == "ä"
        found = file.getvalue().decode() if binary else file.getvalue()
        assert found == "out ä\nerr ä\nprogram ä\n"


def write_much(count: int) -> int:
    part = bytes(range(256)) * 4096
    for _ in range(count):
        os.write(1, part)
    return count


def test_a_call_that_writes_faster_than_it_is_read_is_held(clone: Clone, cloud: Cloud) -> None:
    """As by a pipe: who reads slowly gets all of it in the end, though somebody else looks at the end."""
    size, total = 0, zlib.crc32(b"")

    def take(data: bytes) -> None:
        nonlocal size, total
        if not size:
            running = next(task for task in cloud.cpu.tasks() if task.label == "write_much")
            cloud.cpu.output(running.task, 1 << 40)
            time.sleep(1.5)  # meanwhile what is too old is given back, of others
        size += len(data)
        total = zlib.crc32(data, total)

    assert clone(write_much, 150, output=take) == 150
    assert size == 150 << 20
    assert total == zlib.crc32(bytes(range(256)) * 4096 * 150)


def test_it_comes_as_it_is_written(cloud: Cloud, tmp_path: Path) -> None:
    """While the call goes on; also from asyncio."""
    parts: list[bytes] = []
    future = cloud.cpu.submit_to(wait_between, (str(tmp_path / "go"),), output=parts.append)
    until(lambda: parts == [b"first\n"])
    assert not future.done()
    (tmp_path / "go").touch()
    assert future.result(20) is None and b"".join(parts) == b"first\nlast\n"


def test_asyncio_goes_on_meanwhile(running: RunningCloud, tmp_path: Path) -> None:
    """Other coroutines run, and what comes is handed on in the loop's own thread."""
    parts: list[tuple[int, bytes]] = []

    async def main() -> None:
        async with await aio_connect(f"unix:{running.socket('n1')}") as connected:
            task = connected.cpu.submit_to(
                wait_between,
                (str(tmp_path / "go"),),
                output=lambda data: parts.append((threading.get_ident(), data)),
            )
            async with asyncio.timeout(20):
                while not parts:
                    await asyncio.sleep(0.01)
            (tmp_path / "go").touch()
            assert await task is None

    asyncio.run(main())
    assert b"".join(data for _, data in parts) == b"first\nlast\n"
    assert {thread for thread, _ in parts} == {threading.get_ident()}


def test_each_of_many_has_its_own(cloud: Cloud) -> None:
    """More than there are workers, at the same time."""
    files = [io.StringIO() for _ in range(12)]
    futures = [cloud.cpu.submit_to(speak, (str(number),), output=file) for number, file in enumerate(files)]
    assert [future.result(20) for future in futures] == [str(number) for number in range(12)]
    assert [file.getvalue().splitlines()[0] for file in files] == [f"out {number}" for number in range(12)]


def test_of_calls_on_other_nodes_too(cloud3: RunningCloud) -> None:
    """Wherever they run; and those that write nothing end as any."""
    with cloud3.connect("n1") as cloud:
        for node in ("n1", "n2", "n3"):
            file = io.StringIO()
            assert cloud.cpu.clone(speak, node, node=node, output=file) == node
            assert file.getvalue().startswith(f"out {node}\n")
        assert cloud.cpu.clone(abs, -3, output=file) == 3


def test_last_words_come_before_the_failure(clone: Clone) -> None:
    """Of a call that dies, and of one that raises."""

    def die() -> None:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def complain() -> None:
        print("complaint")
        raise LookupError("no")

    for function, kind, words in ((die, CallFailed, "last words\n"), (complain, LookupError, "complaint\n")):
        file = io.StringIO()
        with pytest.raises(kind):
            clone(function, output=file)
        assert file.getvalue() == words


class Full(Exception):
    """Of a writer."""


@pytest.mark.parametrize("error", [Full, BadArgument])
def test_a_call_whose_output_cannot_be_handed_on_is_stopped(
    clone: Clone, tmp_path: Path, error: type[Exception]
) -> None:
    """As a program whose pipe is closed is; the error is what the caller gets."""
    path = tmp_path / "pid"

    def go_on() -> None:
        path.write_text(str(os.getpid()))
        print("first", flush=True)
        time.sleep(100)

    def refuse(_data: bytes) -> None:
        raise error("mine")

    began = time.monotonic()
    with pytest.raises(error, match="mine"):
        clone(go_on, output=refuse)
    until(lambda: not alive(int(path.read_text())))
    assert time.monotonic() - began < 20


def test_a_cancelled_one_is_cancelled(cloud: Cloud) -> None:
    """`cancel` says so, at once, and nothing is left of it."""
    parts: list[bytes] = []

    def go_on() -> None:
        print(os.getpid(), flush=True)
        time.sleep(100)

    future = cloud.cpu.submit_to(go_on, output=parts.append)
    until(lambda: parts)
    assert future.cancel() and future.cancelled()
    assert not alive(int(parts[0]))
    assert cloud.cpu.stats()["outstanding"] == 0
    assert cloud.cpu.clone(speak, "later", output=io.StringIO()) == "later"


def test_a_call_goes_on_while_nobody_says_what_it_writes(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes that do not answer are no reason to stop it; what it wrote is there once they do."""
    look, failures = cloud.cpu._follower._look, []

    def sometimes(task: str, offset: int) -> Any:
        if len(failures) < 3:
            failures.append(task)
            raise DeadlineExceeded("no answer")
        return look(task, offset)

    monkeypatch.setattr(cloud.cpu._follower, "_look", sometimes)
    file = io.StringIO()

    def linger() -> str:
        print("words", flush=True)
        time.sleep(2)
        return "done"

    assert cloud.cpu.clone(linger, output=file) == "done"
    assert len(failures) == 3 and file.getvalue() == "words\n"


@pytest.mark.parametrize("output", [3, "text", b"bytes"])
def test_what_nothing_can_be_written_to_is_refused(cloud: Cloud, output: Output) -> None:
    """Before anything runs, with what can."""
    with pytest.raises(BadArgument, match="written to") as caught:
        cloud.cpu.clone(speak, "x", output=output)
    assert "sys.stderr" in caught.value.hint
