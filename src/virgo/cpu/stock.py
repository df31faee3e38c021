"""What a node has for calls beside processors: GPUs and memory."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path

from virgo.cpu.needs import Grant, Needs
from virgo.errors import NoNode


def gpus_here() -> int:
    """How many GPUs this machine has that programs can name."""
    return sum(1 for path in Path("/dev").glob("nvidia[0-9]*"))


class Stock:
    """GPUs and memory of a node, given to calls in the order in which they ask. Use from one event loop.

    Args:
        gpus: how many there are.
        memory: bytes.
    """

    def __init__(self, *, gpus: int, memory: int) -> None:
        self.gpus, self.memory = gpus, memory
        self._free = list(range(gpus))
        self._memory_left = memory
        self._asking: deque[tuple[Needs, asyncio.Future[Grant]]] = deque()

    def __repr__(self) -> str:
        return f"<Stock {len(self._free)} of {self.gpus} GPUs, {self._memory_left} of {self.memory} bytes>"

    @property
    def gpus_free(self) -> int:
        """GPUs that no call has."""
        return len(self._free)

    @property
    def memory_left(self) -> int:
        """Bytes that no call has asked for."""
        return self._memory_left

    async def take(self, needs: Needs) -> Grant:
        """What a call needs, as soon as it is there and all who asked before have theirs.

        Raises:
            NoNode: it is never there.
        """
        if not needs.gpus and not needs.memory:
            return Grant(needs.cpus)
        if needs.gpus > self.gpus or needs.memory > self.memory:
            have = f"This node has {self.gpus} GPUs and {self.memory} bytes of memory."
            raise NoNode(f"the call needs {needs}", hint=have)
        asked: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self._asking.append((needs, asked))
        self._serve()
        try:
            return await asked
        except asyncio.CancelledError:
            if asked.done() and not asked.cancelled():  # it came at the same time
                self.give(asked.result())
            self._serve()
            raise

    def give(self, grant: Grant) -> None:
        """Take back what a call had."""
        self._free = sorted(self._free + grant.gpus)
        self._memory_left += grant.memory
        self._serve()

    def _serve(self) -> None:
        while self._asking:
            needs, asked = self._asking[0]
            if asked.done():  # nobody waits for it any more
                self._asking.popleft()
                continue
            if needs.gpus > len(self._free) or needs.memory > self._memory_left:
                return
            self._asking.popleft()
            given, self._free = self._free[: needs.gpus], self._free[needs.gpus :]
            self._memory_left -= needs.memory
            asked.set_result(Grant(needs.cpus, given, needs.memory))
