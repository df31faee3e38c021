"""Several pieces of work at once, as one: all results, or the first failure and no work left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def gather(work: Iterable[Coroutine[Any, Any, T]], *, at_once: int = 0) -> list[T]:
    """The results in order; a failure cancels the rest, and is raised as it is.

    Args:
        work: coroutines.
        at_once: how many may run at the same time; 0 for all.
    """
    gate = asyncio.Semaphore(at_once) if at_once else None

    async def gated(each: Coroutine[Any, Any, T]) -> T:
        if gate is None:
            return await each
        try:
            await gate.acquire()
        except BaseException:
            each.close()
            raise
        try:
            return await each
        finally:
            gate.release()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(gated(each)) for each in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def settle(work: Iterable[Coroutine[Any, Any, T]], *, at_once: int = 0) -> list[T | Exception]:
    """As `gather`, but each failure takes its place among the results."""

    async def caught(each: Coroutine[Any, Any, T]) -> T | Exception:
        try:
            return await each
        except Exception as error:  # noqa: BLE001 - it is returned, and the caller decides
            return error

    return await gather((caught(each) for each in work), at_once=at_once)
