"""What is seen of calls: those that run, and what each has written, whatever becomes of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from tests.conftest import RunningCloud
from tests.waiting import until

from virgo import context as contexts
from virgo.aio import connect as aio_connect
from virgo.cloud import Cloud
from virgo.context import Context, Identity
from virgo.cpu.outputs import Outputs
from virgo.errors import BadArgument, CallFailed, Denied
from virgo.limits import OUTPUT_BYTES, OUTPUT_ENTRIES_MAX, OUTPUT_FILES_MAX

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def held_below(directory: Path) -> int:
    """Descriptors of this process that lead there."""
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(link.is_relative_to(directory) for link in links)


def own_id() -> str:
    current = contexts.current()
    assert current is not None
    return current.id


def speak(text: str) -> str:
    """By all the ways there are: Python, a program, the descriptor itself."""
    print(f"out {text}")
    print(f"err {text}", file=sys.stderr)
    subprocess.run(["echo", "program", text], check=True)
    os.write(1, f"descriptor {text}\n".encode())
    print("no end of line", end="")
    return own_id()


def all_of(cloud: Cloud, task: str) -> str:
    """What a call has written, read in parts."""
    written, found = cloud.cpu.output(task), b""
    while written.data:
        found += written.data
        written = cloud.cpu.output(task, written.offset + len(written.data))
    return found.decode()


def spoken(text: str) -> str:
    return f"out {text}\nerr {text}\nprogram {text}\ndescriptor {text}\nno end of line"


# --- what was written -----------------------------------------------------------------------------


def test_what_a_call_writes_is_kept_with_it(cloud: Cloud, options: dict[str, Any]) -> None:
    """Each has its own, in order, also when many are run by one worker; silent ones have none."""
    futures = [cloud.cpu.submit_to(speak, (str(number),), **options) for number in range(20)]
    silent = cloud.cpu.submit_to(own_id, **options).result(20)
    for number, future in enumerate(futures):
        assert all_of(cloud, future.result(20)) == spoken(str(number))
        written = cloud.cpu.output(future.result())
        assert (written.node, written.label, written.ended) == ("n1", "speak", True)
    until(lambda: all(one.task != silent or one.state == "leased" for one in cloud.cpu.tasks()))
    with pytest.raises(BadArgument, match="has written"):
        cloud.cpu.output(silent)


def test_what_a_dead_call_wrote_is_kept(cloud: Cloud, tmp_path: Path, options: dict[str, Any]) -> None:
    """Of one that was killed, after others by the same worker, and of one that raised."""

    def last_words(path: str) -> None:
        Path(path).write_text(own_id())
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def complain() -> None:
        print("complaint")
        raise ValueError(own_id())

    assert cloud.cpu.clone(speak, "before", **options)
    with pytest.raises(CallFailed):
        cloud.cpu.clone(last_words, str(tmp_path / "id"), **options)
    assert all_of(cloud, (tmp_path / "id").read_text()) == "last words\n"
    with pytest.raises(ValueError, match="-") as caught:
        cloud.cpu.clone(complain, **options)
    assert all_of(cloud, str(caught.value)) == "complaint\n"


def test_what_a_running_call_writes_is_seen(cloud: Cloud, tmp_path: Path, options: dict[str, Any]) -> None:
    """As it writes it; `ended` says when there will be no more."""

    def count(path: str) -> str:
        for number in range(3):
            print("step", number)
            while not Path(f"{path}{number}").exists():
                time.sleep(0.005)
        return own_id()

    future = cloud.cpu.submit_to(count, (str(tmp_path / "go"),), **options)
    task = until(lambda: [one for one in cloud.cpu.tasks() if one.label.endswith("count")])[0]
    assert task.state == "running" and task.pid and task.node == "n1" and task.owner.startswith("uid:")
    for number in range(3):
        steps = "".join(f"step {done}\n" for done in range(number + 1)).encode()
        written = until(
            lambda steps=steps: (found := cloud.cpu.output(task.task)).data == steps and found  # type: ignore[misc]
        )
        assert not written.ended
        (tmp_path / f"go{number}").touch()
    assert future.result(20) == task.task
    assert until(lambda: cloud.cpu.output(task.task).ended)


def test_a_flood_of_output_harms_nobody(cloud: Cloud, options: dict[str, Any]) -> None:
    """Of 300 MB the last part is kept, with where it begins; the disk gets the rest back."""

    def flood() -> str:
        line = "x" * 999 + "\n"
        for _ in range(300):
            sys.stdout.write(line * 1000)
        print("the end")
        return own_id()

    task = cloud.cpu.clone(flood, **options)
    cloud.cpu.clone(abs, -1)
    written = until(lambda: (found := cloud.cpu.output(task)).offset > 290_000_000 and found)
    assert set(written.data) <= set(b"x\n")
    last = cloud.cpu.output(task, 300_000_000)
    assert last.data == b"the end\n" and last.offset == 300_000_000
    assert cloud.cpu.output(task, 1 << 50).data == b""


def test_a_call_may_close_or_replace_its_output(cloud: Cloud) -> None:
    """The next one writes again."""

    def close() -> None:
        sys.stdout.close()
        sys.stderr = None  # type: ignore[assignment]

    for _ in range(3):
        cloud.cpu.clone(close)
    worker = cloud.cpu.clone(os.getpid)
    os.kill(worker, signal.SIGKILL)
    until(lambda: cloud.cpu.clone(os.getpid) != worker)
    assert all_of(cloud, cloud.cpu.clone(speak, "again")) == spoken("again")


def test_output_is_for_its_owner_and_admins(cloud: Cloud) -> None:
    """Others are denied; nobody is told of calls that there are not."""

    def on_behalf(name: str, *roles: str) -> Context:
        return Context(id=contexts.new_id(), identity=Identity(name, frozenset(roles)))

    with contexts.using(on_behalf("alice", "read", "write", "exec")):
        task = cloud.cpu.clone(speak, "secret")
        assert "secret" in all_of(cloud, task)
    with contexts.using(on_behalf("bob", "read", "write", "exec")), pytest.raises(Denied):
        cloud.cpu.output(task)
    assert "secret" in all_of(cloud, task)
    for unknown in ("", "nonsense", task + "0", "\n"):
        with pytest.raises(BadArgument):
            cloud.cpu.output(unknown)
    with pytest.raises(BadArgument):
        cloud.cpu.output(task, -1)


# --- what runs ------------------------------------------------------------------------------------


def test_what_all_nodes_do_is_seen_from_each(cloud3: RunningCloud) -> None:
    """Running and waiting calls, with their needs; output of another node too."""
    with cloud3.connect("n1") as first, cloud3.connect("n2") as second:
        held = [second.cpu.submit_to(time.sleep, (30,), node="n3", memory="64 MiB") for _ in range(3)]
        tasks = until(
            lambda: len(found := [one for one in first.cpu.tasks() if one.node == "n3"]) == 3 and found
        )
        assert sorted(one.state for one in tasks) == ["running", "waiting", "waiting"]
        assert {one.label for one in tasks} == {"sleep"} and {one.memory for one in tasks} == {64 << 20}
        assert [bool(one.pid) for one in tasks] == [one.state == "running" for one in tasks]
        for future in held:
            future.cancel()
        task = second.cpu.submit_to(speak, ("far",), node="n3").result(20)
        assert all_of(first, task) == spoken("far")


def test_asyncio_sees_the_same(running: RunningCloud) -> None:
    """Tasks and output."""

    async def look() -> None:
        async with await aio_connect(f"unix:{running.socket('n1')}") as cloud:
            task = await cloud.cpu.clone(speak, "async")
            assert (await cloud.cpu.output(task)).data.decode() == spoken("async")
            assert isinstance(await cloud.cpu.tasks(), list)

    asyncio.run(look())


# --- the files ------------------------------------------------------------------------------------


def test_files_and_entries_are_bounded(tmp_path: Path) -> None:
    """The oldest go first; a dead worker of which nothing is noted keeps no descriptor."""
    outputs = Outputs(tmp_path / "output")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "old").touch()
    outputs.start()
    for worker in range(OUTPUT_FILES_MAX + 10):
        given = outputs.open(worker)
        os.write(given, b"some words")
        outputs.wrote(f"task {worker}", worker, "label", "owner", 0, 10)
        outputs.gone(worker)
        os.close(given)
    assert not list((tmp_path / "output").iterdir())
    assert held_below(tmp_path) == OUTPUT_FILES_MAX
    assert outputs.find("task 9") is None
    entry = outputs.find("task 10")
    assert entry is not None and outputs.read(entry, 5, 100) == (5, b"words")
    given = outputs.open(1000)
    os.write(given, b"x" * OUTPUT_ENTRIES_MAX)
    for number in range(OUTPUT_ENTRIES_MAX):
        outputs.wrote(f"call {number}", 1000, "label", "owner", number, number + 1)
    assert outputs.find("task 10") is None and outputs.find("call 0") is not None
    os.close(given)
    outputs.close()
    assert held_below(tmp_path) == 0


def test_a_worker_that_dies_at_a_silent_call_leaves_nothing(tmp_path: Path) -> None:
    """Neither file nor entry."""
    outputs = Outputs(tmp_path / "output")
    outputs.start()
    os.close(outputs.open(1))
    outputs.began("task", 1, "label", "owner")
    outputs.gone(1)
    outputs.gone(1)
    assert outputs.find("task") is None and held_below(tmp_path) == 0


def test_of_a_long_output_the_end_is_kept(tmp_path: Path) -> None:
    """What lies before is given back to the file system; positions stay what they were."""
    outputs = Outputs(tmp_path / "output")
    outputs.start()
    given = outputs.open(1)
    outputs.began("task", 1, "label", "owner")
    for number in range(30):
        os.write(given, b"%9d\n" % number * (OUTPUT_BYTES // 100))
        outputs.trim()
    assert os.fstat(given).st_blocks * 512 < 2 * OUTPUT_BYTES
    outputs.ended("task")
    entry = outputs.find("task")
    assert entry is not None and entry.ended
    offset, data = outputs.read(entry, 0, OUTPUT_BYTES)
    assert offset > OUTPUT_BYTES and b"\0" not in data
    assert outputs.read(entry, outputs.size(1) - 10, 100)[1] == b"%9d\n" % 29
    os.close(given)
    outputs.close()
