"""Work on shared regions in threads of their own: who waits for one region keeps nobody from another.

Each piece of work is tried without waiting first. Who finds the region taken waits for his turn in asyncio,
and only one for each region waits in a thread. Nobody waits longer than `MEMORY_SEGMENT_WAIT_S` in all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

from virgo.limits import MEMORY_SEGMENT_THREADS_MAX, MEMORY_SEGMENT_WAIT_S
from virgo.memory.segments import Taken

T = TypeVar("T")


class Turns:
    """The threads, and whose turn it is for each region."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MEMORY_SEGMENT_THREADS_MAX, thread_name_prefix="virgo-shared")
        self._turns: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    def __repr__(self) -> str:
        return f"<Turns at {len(self._turns)} regions>"

    async def do(self, identifier: int, work: Callable[[float], T]) -> T:
        """The result of work on a region; it is given the seconds that it may wait. Raises Busy."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + MEMORY_SEGMENT_WAIT_S
        try:
            return await loop.run_in_executor(self._threads, work, 0.0)
        except Taken as error:
            taken = error
        turn = self._turns.setdefault(identifier, asyncio.Lock())
        try:
            async with asyncio.timeout_at(deadline):
                await turn.acquire()
        except TimeoutError:
            raise taken from None
        done = loop.run_in_executor(self._threads, work, max(0.0, deadline - loop.time()))

        def over(done: asyncio.Future[T]) -> None:
            turn.release()
            done.exception()  # looked at, also if nobody waits for it any more

        done.add_done_callback(over)
        return await asyncio.shield(done)

    def close(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False)
