"""Leases of tasks: waited for while the event loop goes on; `virgo.memory.leases` has those of threads."""

from __future__ import annotations

import asyncio
import time

from virgo.errors import Busy
from virgo.limits import MEMORY_LEASE_POLL_S
from virgo.memory.leases import Lease


async def acquire(lease: Lease, timeout_s: float, owner: object) -> None:
    """As `Lease.acquire`; of all tasks that share a lease one at a time waits in a thread."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            lease.take_turn(0.0)
        except Busy:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(MEMORY_LEASE_POLL_S)
        else:
            break
    having = asyncio.ensure_future(asyncio.to_thread(lease.have, deadline, owner))

    def drop(had: asyncio.Future[None]) -> None:
        if not had.cancelled() and had.exception() is None:
            lease.release()

    try:
        await asyncio.shield(having)
    except asyncio.CancelledError:
        having.add_done_callback(drop)  # nobody waits for it any more
        raise


def current() -> object:
    """The task that runs in this thread, None if none does."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def is_ours(owner: object) -> bool:
    """Whether what a task has acquired is ours to release: it is the one that runs, or has ended."""
    return owner is current() or (isinstance(owner, asyncio.Task) and owner.done())
