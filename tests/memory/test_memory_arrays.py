"""NumPy arrays in shared memory, by several processes of one machine; tests/node/test_machines.py has two."""

from __future__ import annotations

import asyncio
import io
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import pytest

from virgo import aio
from virgo.cloud import Cloud
from virgo.errors import (
    BadArgument,
    Busy,
    NotLoaded,
    PoolFull,
    TooLarge,
    UnknownId,
    VirgoError,
    WrongType,
)
from virgo.limits import MEMORY_CHUNK_BYTES
from virgo.memory.arrays import SharedArray

if TYPE_CHECKING:
    from conftest import RunningCloud

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def cloud(cloud3: RunningCloud) -> Iterator[Cloud]:
    with cloud3.connect("n1") as connected:
        yield connected


def file_of(array: Any) -> tuple[int, int]:
    """Inode of what is mapped at the array's memory in this process, and where in the file that is."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _rights, offset, _device, inode, *_name = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return int(inode), int(offset, 16) + address - first
    raise AssertionError("not mapped")


def inode(cloud: Cloud, array: SharedArray) -> int:
    descriptor = cloud.memory.region(array.region.id).descriptor()
    try:
        return os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)


# --- one process ------------------------------------------------------------------------------------


def test_it_is_an_array(cloud: Cloud) -> None:
    """Zeros at first; written in place; what is made of it is plain; its bytes are those of the region."""
    with cloud.memory.array((20, 30), "i4") as array:
        assert isinstance(array, np.ndarray) and array.shape == (20, 30) and array.dtype == np.int32
        assert array.held and not array.any()
        array[:] = np.arange(600).reshape(20, 30)
        same = array
        same += 1
        assert same is array and array.held
        for plain in (array + 1, array[2], array[2:4, ::3], np.sqrt(array), array.view(np.ndarray)):
            assert type(plain) is np.ndarray
        assert int(array.sum()) == 600 * 601 // 2 and array.max() == 600 and array.T[5, 3] == array[3, 5]
        assert np.frombuffer(array.region.get(), "i4").sum() == array.sum()
        file = io.BytesIO()
        np.save(file, array)
        file.seek(0)
        assert np.array_equal(np.load(file), array)
        array.T[0, 0] = 7
        assert array[0, 0] == 7
    for shape, dtype in (((), float), (0, "u1"), ((3, 0, 2), "c16"), (5, [("a", "<i4"), ("b", "S3", (2,))])):
        with cloud.memory.array(shape, dtype) as made:
            again = cloud.memory.attach(made.region.id)
            found = (again.shape, again.dtype)
            assert found == (made.shape, made.dtype) == (np.empty(shape).shape, np.dtype(dtype))


def test_what_it_cannot_be(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """References, shapes that are none, too much, no NumPy, regions that are no arrays: typed errors."""
    memory = cloud.memory
    for error, shape, dtype in (
        (BadArgument, 3, object),
        (BadArgument, 3, "no such type"),
        (BadArgument, (3, -1), float),
        (BadArgument, (1,) * 65, "i1"),
        (BadArgument, 3, np.dtype(("i4", (2,)))),
        (WrongType, 2.5, float),
        (WrongType, "3", float),
        (PoolFull, 2**36, float),
        (TooLarge, 2**40, float),
        (BadArgument, 2**70, float),
    ):
        with pytest.raises(error) as caught:
            memory.array(shape, dtype)
        assert caught.value.hint
    with pytest.raises(VirgoError):
        memory.array(3, node="n9")
    sides = '{"shape": [' + ",".join(["1"] * 65) + '], "dtype": "|i1"}'
    for note in ("", "x", "{}", sides, '{"shape": [9999], "dtype": "<f8"}', '{"shape": [1], "dtype": "|O"}'):
        words = ("NOTE", note) if note else ()
        identifier = cloud.client.execute("VIRGO_MALLOC", 100, "SHARED", *words)
        with pytest.raises(BadArgument, match="no array"):
            memory.attach(identifier)
    with memory.malloc(10) as plain, pytest.raises(BadArgument, match="no array"):
        memory.attach(plain.id)
    with pytest.raises(UnknownId):
        memory.attach(plain.id)
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(NotLoaded) as absent:
        memory.array(3)
    assert "virgo-os[arrays]" in absent.value.hint


def test_one_writes_at_a_time(cloud: Cloud) -> None:
    """The creator at first; another object gets the lease when it lets go, and the first is read-only."""
    with cloud.memory.array(1000) as first:
        second = cloud.memory.attach(first.region.id)
        assert first.held and not second.held
        with pytest.raises(BadArgument) as caught:
            second[0] = 1
        assert "writing" in caught.value.hint
        for change in (
            second.__iadd__,
            lambda by: np.add(by, 1, out=second),
            lambda by: np.add.at(second, 0, by),
        ):
            with pytest.raises(BadArgument, match="read-only") as caught:
                change(1)
            assert "writing" in caught.value.hint
        with pytest.raises(Busy):
            second.acquire()
        with pytest.raises(Busy):
            first.region.set(b"x")
        with pytest.raises(Busy):
            second.write([1.0, 2.0])
        with first.writing():  # it has the lease anyway, and keeps it
            first[1] = 1
        assert first.held
        first.release()
        entered = threading.Event()

        def hold() -> None:
            with first.writing():
                entered.set()
                time.sleep(0.1)

        threading.Thread(target=hold).start()
        assert entered.wait(10)
        with second.writing(timeout_s=5):
            second[0] = 7
            with pytest.raises(Busy):
                first.acquire()
        assert first[0] == 7 and not second.held
        with pytest.raises(BadArgument):
            first[0] = 8
        second.write(np.arange(3), start=10)
        assert list(first[9:14]) == [0, 0, 1, 2, 0]
        with pytest.raises(TooLarge):
            second.write([1.0], start=1000)
        first.acquire()
        first.acquire()
        first[0] = 9


def test_views_keep_the_memory_and_freeing_ends_the_lease(cloud: Cloud) -> None:
    """After `free` mapped arrays and slices are still there; attach, acquire and free say that it is gone."""
    array = cloud.memory.array(100_000)
    other = cloud.memory.attach(array.region.id)
    array[:] = 1
    part = array[10:20]
    array.free()
    assert not array.held and part.sum() == 10 and other.sum() == 100_000
    del array
    part[0] = 5
    assert other[10] == 5
    for work in (other.acquire, other.free, lambda: cloud.memory.attach(other.region.id)):
        with pytest.raises(UnknownId):
            work()
    with pytest.raises(UnknownId):
        other.write([1.0])


# --- several processes ------------------------------------------------------------------------------


def looked_at(array: SharedArray) -> tuple[str, bool, int, float]:
    return type(array).__name__, array.flags.writeable, file_of(array)[0], float(array.sum())


def test_a_clone_maps_it_without_a_copy(cloud: Cloud) -> None:
    """On every node of the machine a function that is given an array has the very file mapped."""
    with cloud.memory.array(50_000) as array:
        array[:] = 2
        wanted = ("SharedArray", False, inode(cloud, array), 100_000.0)
        assert file_of(array)[0] == wanted[2]
        for node in ("n1", "n2"):
            assert cloud.cpu.clone(looked_at, array, node=node) == wanted
        assert cloud.cpu.clone(looked_at, array[:10], node="n1")[0] == "ndarray", "a slice travels by value"
        back = cloud.cpu.clone(lambda given: given, array)
        assert back.region.id == array.region.id and back[0] == 2
        again = pickle.loads(pickle.dumps(array.copy()))
        assert type(again) is np.ndarray and again.sum() == 100_000


def watched(array: SharedArray, value: float) -> float:
    """Waits, in a worker, until its owner has written that."""
    deadline = time.monotonic() + 20
    while array[-1] != value:
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.001)
    with array.writing(timeout_s=20):
        array[0] = -value
    return float(array[-1])


def test_a_clone_sees_what_its_owner_writes_and_may_write_itself(cloud: Cloud) -> None:
    """In place, while it runs; then it gets the lease, and its owner sees what it has written."""
    with cloud.memory.array(1000) as array:
        future = cloud.cpu.submit_to(watched, (array, 42.0), node="n2")
        time.sleep(0.05)
        array[-1] = 42
        array.release()
        assert future.result(30) == 42 and array[0] == -42


WRITER = """
import sys, virgo
array = virgo.connect(embedded=False).memory.attach(int(sys.argv[1]))
array.acquire(10)
print("held", flush=True)
number = 0.0
while True:
    number += 1
    array[:] = number
"""


def test_kill_9_of_a_writer_frees_the_lease_at_once(cloud: Cloud, cloud3: RunningCloud) -> None:
    """Killed in the middle of writing: the next one has it at once, and goes on from what was written."""
    with cloud.memory.array(200_000) as array:
        for _ in range(3):
            array.release()
            writer = subprocess.Popen(
                [sys.executable, "-c", WRITER, str(array.region.id)],
                env=cloud3.environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert writer.stdout is not None and writer.stdout.readline() == "held\n"
            with pytest.raises(Busy, match=str(writer.pid)):
                array.acquire()
            time.sleep(0.02)
            writer.kill()
            writer.wait()
            writer.stdout.close()
            began = time.monotonic()
            array.acquire()
            assert time.monotonic() - began < 0.1
            assert len(np.unique(array)) <= 2, "the last value and the one before"
            array[:] = 0


def test_a_forked_child_reads_and_does_not_write(cloud: Cloud) -> None:
    """Its copy of the object has no lease and is read-only, until the parent lets go and it asks for it."""
    with cloud.memory.array(1000) as array:
        array[0] = 1
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            verdict = [array.held, array.flags.writeable, float(array[0])]
            try:
                array.acquire()
            except Busy:
                verdict.append("busy")
            os.write(write, repr(verdict).encode())
            with array.writing(timeout_s=20):
                array[1] = 2
            os._exit(0)
        try:
            assert os.read(read, 100) == b"[False, False, 1.0, 'busy']"
            array[0] = 3
            array.release()
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert list(array[:2]) == [3, 2]
        finally:
            os.close(read)
            os.close(write)


def test_a_node_that_is_killed_is_not_in_the_way(make_cloud: Any) -> None:
    """Writing goes on while the node is dead, and the array is the same one when it is back."""
    own = make_cloud(1)
    with own.connect() as cloud:
        array = cloud.memory.array(1000)
        array[0] = 1
        pid = own.node("n1")["pid"]
        os.kill(pid, signal.SIGKILL)
        array[1] = 2
        array.release()
        with array.writing():
            array[2] = 3
        deadline = time.monotonic() + 30
        while own.node("n1")["state"] != "up" or own.node("n1")["pid"] == pid:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert list(cloud.memory.attach(array.region.id)[:3]) == [1, 2, 3]
        with array.writing():
            array[3] = 4
        assert np.frombuffer(cloud.client.execute("VIRGO_GET", array.region.id))[3] == 4


# --- regions as buffers -----------------------------------------------------------------------------


def test_views_of_regions(cloud: Cloud) -> None:
    """Read-only of any region; of a shared one without a copy, and to write with the lease."""
    memory = cloud.memory
    for options in ({}, {"node": "n2"}, {"shared": True}, {"shared": True, "node": "n3"}):
        with memory.malloc(5000, **options) as region:
            region.set(b"hello")
            with region.view() as view:
                assert view.readonly and bytes(view) == b"hello"
            assert bytes(np.asarray(region)) == b"hello" and not np.asarray(region).flags.writeable
            if sys.version_info >= (3, 12):
                assert bytes(memoryview(region)) == b"hello" and memoryview(region).readonly
            if not region.stats().shared:
                for work in (region.view, region.descriptor):
                    with pytest.raises(BadArgument, match="shared"):
                        work(write=True)
                continue
            live = np.asarray(region)
            with region.view(write=True) as view:
                assert len(view) == 5000
                view[:5] = b"HELLO"
                with pytest.raises(Busy), region.view(write=True):
                    pass
            assert region.read(0, 5) == bytes(live) == b"HELLO"
            with pytest.raises(BufferError), region.view(write=True) as view:
                kept = view[:2]
            with pytest.raises(BufferError), region.view(write=True) as view:
                array = np.frombuffer(view, "u1")
            assert array[0] == kept[0] == ord("H")  # they are not left dangling
            region.set(b"the lease is free all the same")
    with memory.malloc(5000) as plain:
        plain.set(b"hello")
        with plain.view() as view:
            plain.set(b"other")
            assert bytes(view) == b"hello" and plain.get() == b"other"
        with pytest.raises(ValueError, match="released"):
            bytes(view)
    with memory.malloc(MEMORY_CHUNK_BYTES + 1) as spread:
        spread.write(b"x", MEMORY_CHUNK_BYTES)
        with spread.view() as view:
            assert len(view) == MEMORY_CHUNK_BYTES + 1 and view[-1] == ord("x")


def test_one_descriptor_is_the_region(cloud: Cloud) -> None:
    """Passed on to another process it can be mapped there, by whoever knows nothing of us."""
    with cloud.memory.malloc(5000, shared=True) as region:
        region.set(b"hello")
        ours, theirs = socket.socketpair()
        descriptor = region.descriptor(write=True)
        child = os.fork()
        if child == 0:
            _data, (received,), _flags, _address = socket.recv_fds(theirs, 1, 1)
            memory = mmap.mmap(received, 5000)
            memory[:5] = memory[:5].upper()
            os._exit(0)
        socket.send_fds(ours, [b"x"], [descriptor])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert region.get() == b"HELLO"
        for end in (ours, theirs):
            end.close()
        os.close(descriptor)


def test_the_same_awaited(cloud3: RunningCloud) -> None:
    """The asyncio face: arrays, views, descriptors, parts."""

    async def main() -> None:
        async with await aio.connect(f"unix:{cloud3.socket('n1')}", home=cloud3.home) as cloud:
            async with await cloud.memory.array((2, 3)) as array:
                array[:] = 5
                other = await cloud.memory.attach(array.region.id)
                assert other.sum() == 30
                await other.refresh()
                array.release()
                await other.write([1.0], start=5)
                assert array[1, 2] == 1
                with pytest.raises(BadArgument):
                    array.__enter__()
            with pytest.raises(UnknownId):
                await cloud.memory.attach(array.region.id)
            async with await cloud.memory.malloc(100, shared=True) as region:
                await region.set(b"hello")
                await region.write(b"J")
                assert await region.get() == b"Jello" and await region.read(1, 2) == b"el"
                async with region.view(write=True) as view:
                    view[4] = ord("y")
                async with region.view() as view:
                    assert bytes(view[:5]) == b"Jelly"
                os.close(await region.descriptor())
            async with await cloud.memory.malloc(100) as region:
                with pytest.raises(BadArgument):
                    await region.descriptor()

    asyncio.run(main())


def test_without_numpy_all_else_works(cloud3: RunningCloud) -> None:
    """NumPy is imported by those who use arrays only, and its absence is a typed error."""
    program = (
        "import sys; sys.modules['numpy'] = None\n"
        "import virgo\n"
        "with virgo.connect(embedded=False) as cloud, cloud.memory.malloc(100, shared=True) as region:\n"
        "    region.set(b'x')\n"
        "    with region.view() as view: assert bytes(view) == b'x'\n"
        "    try: cloud.memory.array(3)\n"
        "    except virgo.errors.NotLoaded: print('fine')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=cloud3.environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "fine\n"
