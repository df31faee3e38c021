"""Leases of arrays: by threads and tasks of one process that share one object, and by several objects."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from virgo import aio
from virgo.cloud import Cloud
from virgo.errors import BadArgument, Busy, WrongType

if TYPE_CHECKING:
    from conftest import RunningCloud


@pytest.fixture
def cloud(cloud3: RunningCloud) -> Iterator[Cloud]:
    with cloud3.connect("n1") as connected:
        yield connected


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_thread(work: Callable[[], Any]) -> Any:
    """In a thread that ends with it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.usefixtures("hasty")
def test_many_threads_on_one_array(cloud: Cloud) -> None:
    """Each adds in turn, none is lost, and afterwards the lease is free."""
    with cloud.memory.array(4, "i8") as array:
        array.release()

        def add() -> None:
            for _ in range(150):
                with array.writing(timeout_s=20):
                    before = int(array[0])
                    time.sleep(0)
                    array[0] = before + 1

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(add) for _ in range(8)]:
                done.result()
        assert array[0] == 8 * 150 and not array.held
        cloud.memory.attach(array.region.id).acquire(1)


def test_a_lease_is_the_threads_that_acquired_it(cloud: Cloud) -> None:
    """Another thread neither has nor drops it; what an ended one left anybody releases."""
    with cloud.memory.array(4) as array:
        with pytest.raises(BadArgument) as caught:
            in_thread(array.release)
        assert caught.value.hint and array.held
        array.release()
        in_thread(array.acquire)
        for _ in range(5):
            with pytest.raises(Busy):
                in_thread(array.acquire)
        assert array.held
        array.release()
        in_thread(array.acquire)
        in_thread(array.free)  # whoever has it
        assert not array.held
        array.region = cloud.memory.malloc(1)  # for the block to free


def test_a_timeout_is_a_number(cloud: Cloud) -> None:
    """Text, None and no number at all are WrongType; without end is a number."""
    with cloud.memory.array(4) as array:
        for wrong in ("x", None, True, float("nan")):
            with pytest.raises(WrongType):
                array.acquire(wrong)  # type: ignore[arg-type]
        array.release()
        with array.writing(timeout_s=float("inf")):
            array[0] = 1


def test_tasks_exclude_each_other_and_the_loop_goes_on(cloud3: RunningCloud) -> None:
    """With `writing_async`: of three tasks one is inside at a time; who gives up waiting has nothing."""

    async def main() -> None:
        async with await aio.connect(f"unix:{cloud3.socket('n1')}", home=cloud3.home) as cloud:
            array = await cloud.memory.array(4, "i8")
            ticks = inside = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    await asyncio.sleep(0.005)
                    ticks += 1

            async def add() -> None:
                nonlocal inside
                async with array.writing_async(timeout_s=5):
                    inside += 1
                    assert inside == 1
                    async with array.writing_async():  # its own anyway
                        await asyncio.sleep(0.05)
                    array[0] += 1
                    inside -= 1

            other = await cloud.memory.attach(array.region.id)
            ticking = asyncio.create_task(tick())
            with pytest.raises(Busy):  # the creator has it
                async with other.writing_async(timeout_s=0.2):
                    pass
            assert ticks > 5
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(other.writing_async(timeout_s=1).__aenter__(), 0.1)
            array.release()
            await asyncio.gather(add(), add(), add())
            assert array[0] == 3 and not array.held
            await asyncio.sleep(1)
            assert not other.held
            ticking.cancel()
            await array.free()

    asyncio.run(main())


def test_a_task_keeps_threads_out(cloud: Cloud) -> None:
    """What a task has acquired no thread has, and no thread drops."""
    with cloud.memory.array(4) as array:
        array.release()
        entered, over = threading.Event(), threading.Event()

        async def hold() -> None:
            async with array.writing_async():
                entered.set()
                await asyncio.to_thread(over.wait)

        thread = threading.Thread(target=lambda: asyncio.run(hold()))
        thread.start()
        assert entered.wait(10)
        with pytest.raises(Busy):
            array.acquire()
        with pytest.raises(BadArgument):
            array.release()
        over.set()
        thread.join()
        array.acquire(1)
