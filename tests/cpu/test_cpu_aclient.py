"""The asyncio client of processors beside a runner whose calls end when the test says so."""

from __future__ import annotations

import asyncio
import itertools
import pickle
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from virgo.cpu.aclient import AsyncCpuClient
from virgo.cpu.arguments import load_arguments
from virgo.errors import BadArgument
from virgo.limits import ASYNC_CALLS_MAX
from virgo.wire.call import Call

_WAIT_S = 60


class Hand:
    """An `AsyncRunner` that keeps calls until `end` lets some go on; then it runs what was shipped."""

    def __init__(self, *, free: bool = False) -> None:
        self.free = free
        self.flying: dict[int, asyncio.Event] = {}
        self.begun = self.cancelled = self.flying_max = 0

    async def run(self, call: Call[Any]) -> Any:
        number, self.begun = self.begun, self.begun + 1
        self.flying[number] = asyncio.Event()
        self.flying_max = max(self.flying_max, len(self.flying))
        try:
            if self.free:
                await asyncio.sleep(0)
            else:
                await self.flying[number].wait()
            args, kwargs = load_arguments(call.request[3])
            return pickle.loads(call.request[2])(*args, **kwargs)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            del self.flying[number]

    async def run_many(self, calls: list[Call[Any]]) -> list[Any]:
        raise AssertionError

    def end(self, *numbers: int) -> None:
        for number in numbers:
            self.flying[number].set()


def on(hand: Hand, work: Callable[[AsyncCpuClient], Awaitable[None]]) -> None:
    """Run work on a client; at the end nothing of it is left."""

    async def main() -> None:
        async with asyncio.timeout(_WAIT_S):
            client = AsyncCpuClient(hand)
            await work(client)
            assert not hand.flying
            assert client.stats()["outstanding"] == 0

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_map_yields_in_order_as_results_come() -> None:
    """The first result comes while later calls run; a later one that has ended waits its turn."""
    hand = Hand()

    async def work(cpu: AsyncCpuClient) -> None:
        results = cpu.map(pow, [2, 3, 4], [5, 5, 5])
        await until(lambda: hand.begun == 3)  # before anything is asked for
        hand.end(2, 0)
        assert await anext(results) == 32
        following = asyncio.ensure_future(anext(results))
        await until(lambda: 2 not in hand.flying)
        assert not following.done()
        hand.end(1)
        assert await following == 243
        assert [value async for value in results] == [1024]

    on(hand, work)


@pytest.mark.parametrize(("buffersize", "bound"), [(1, 1), (3, 3), (None, ASYNC_CALLS_MAX)])
def test_map_takes_endless_arguments_a_few_at_a_time(buffersize: int | None, bound: int) -> None:
    """At most `buffersize` calls are outstanding, and no argument is taken before it has room."""
    hand, taken = Hand(free=True), 0

    def endless() -> Iterator[int]:
        nonlocal taken
        for value in itertools.count():
            taken += 1
            yield value

    async def work(cpu: AsyncCpuClient) -> None:
        results = cpu.map(abs, endless(), buffersize=buffersize)
        for wanted in range(300):
            assert await anext(results) == wanted
            assert taken <= wanted + 1 + bound
        await results.aclose()
        assert hand.flying_max == bound

    on(hand, work)


@pytest.mark.parametrize("chunksize", [1, 3, 100])
def test_chunks_change_nothing_but_the_count_of_calls(chunksize: int) -> None:
    """Results are the same whatever travels together; a name is never chunked."""
    hand = Hand(free=True)

    async def work(cpu: AsyncCpuClient) -> None:
        results = [value async for value in cpu.map(pow, range(10), range(99), chunksize=chunksize)]
        assert results == [value**value for value in range(10)]
        assert hand.begun == -(-10 // chunksize)
        assert [value async for value in cpu.map(pow, [], [], chunksize=chunksize)] == []

    on(hand, work)


def test_a_failure_comes_in_its_turn_and_ends_the_rest() -> None:
    """What was before it is still yielded; what is after it is cancelled."""
    hand = Hand()

    async def work(cpu: AsyncCpuClient) -> None:
        results = cpu.map(divmod, [1, 1, 1, 1], [1, 0, 1, 1])
        await until(lambda: hand.begun == 4)
        hand.end(0, 1)
        assert await anext(results) == (1, 0)
        with pytest.raises(ZeroDivisionError):
            await anext(results)
        assert hand.cancelled == 2

    on(hand, work)


def test_leaving_a_map_cancels_what_it_had_begun() -> None:
    """A timeout, a closed stream and a cancelled consumer each end the calls outstanding."""
    hand = Hand()

    async def work(cpu: AsyncCpuClient) -> None:
        with pytest.raises(TimeoutError):
            await anext(cpu.map(abs, range(5), timeout=0.01))
        assert hand.cancelled == hand.begun == 5
        results = cpu.map(abs, range(5))
        hand.free = True
        assert await anext(results) == 0
        hand.free = False
        await results.aclose()
        results = cpu.map(abs, range(5))
        consumer = asyncio.ensure_future(anext(results))
        await until(lambda: len(hand.flying) == 5)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer

    on(hand, work)


def test_arguments_that_mean_nothing_begin_nothing() -> None:
    """Sizes below 1, options out of their range and what is no callable are refused at once."""
    hand = Hand()

    async def work(cpu: AsyncCpuClient) -> None:
        for sizes in ({"chunksize": 0}, {"buffersize": 0}):
            with pytest.raises(ValueError):
                cpu.map(abs, [1], **sizes)
        with pytest.raises(BadArgument):
            cpu.submit_to(abs, (1,), retries=-1)
        with pytest.raises(BadArgument):
            cpu.submit(3)  # type: ignore[arg-type]
        assert hand.begun == 0

    on(hand, work)


def test_what_is_submitted_is_what_it_was_then() -> None:
    """Arguments that change after submit, before the call has a connection, travel as they were."""
    hand = Hand(free=True)

    async def work(cpu: AsyncCpuClient) -> None:
        values = [1, 2]
        task = cpu.submit(sum, values)
        values.append(100)
        assert await task == 3

    on(hand, work)


def test_shutdown_waits_or_cancels_and_takes_no_more() -> None:
    """As an executor: `async with` waits, close cancels, and neither takes calls afterwards."""
    hand = Hand()

    async def waits(cpu: AsyncCpuClient) -> None:
        async with cpu:
            task = cpu.submit(abs, -1)
            await until(lambda: hand.begun == 1)
            assert repr(cpu) == "<AsyncCpuClient 1 outstanding>"
            hand.end(0)
        assert task.done() and task.result() == 1
        assert cpu.stats()["shut"]
        for refused in (lambda: cpu.submit(abs, 1), lambda: cpu.map(abs, [1])):
            with pytest.raises(RuntimeError, match="shutdown"):
                refused()

    async def cancels(cpu: AsyncCpuClient) -> None:
        tasks = [cpu.submit_to(abs, (-1,)) for _ in range(3)]
        await until(lambda: len(hand.flying) == 3)
        await cpu.close()
        assert all(task.cancelled() for task in tasks)

    on(hand, waits)
    on(hand, cancels)
