"""Calls of a client that wait for a worker, while threads add some."""

from __future__ import annotations

import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.conftest import RunningCloud

from virgo.cpu.bench import Bench, batch, first
from virgo.cpu.calls import Book, Direct, Item, Task
from virgo.cpu.contact import Hire, NotHired
from virgo.cpu.hires import Hires
from virgo.wire.address import Address
from virgo.wire.client import Client

THREADS, CALLS = 3, 20_000


def sift(bench: Bench, _item: Item) -> None:
    bench.cancelled = 1 << 30
    bench.sift()


def rank(bench: Bench, item: Item) -> None:
    bench.rank([item])


@pytest.mark.parametrize("change", [sift, rank])
def test_no_call_is_lost_however_threads_add_them(change: Callable[[Bench, Item], Any]) -> None:
    """While cancelled ones are taken out, or all are put in order; each thread's own stay in their order."""
    book = Book()
    bench = Bench(book, lambda _items: None, lambda _thing: None)
    task = Task("pickle", "label", "", b"", b"digest")
    queue = bench.queues[""]
    batches = [[Item(task, b"", Direct(), number, book) for number in range(CALLS)] for _ in range(THREADS)]
    for calls in batches:
        book.add(calls)

    def add(batch: list[Item]) -> None:
        for at in range(0, CALLS, 4):
            queue.extend(batch[at : at + 4])

    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=add, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for number in range(1 << 30):
        busy = any(thread.is_alive() for thread in threads)
        change(bench, Item(task, b"", Direct(), number, book))
        if not busy:
            break
    sys.setswitchinterval(often)
    found = list(queue)
    for calls in batches:
        own = set(calls)
        assert [item.index for item in found if item in own] == list(range(CALLS))


@pytest.mark.parametrize(
    ("extra", "lanes", "stays"), [(False, False, False), (False, True, True), (True, False, True)]
)
def test_a_client_whose_last_worker_is_recalled_asks_anew(extra: bool, lanes: bool, stays: bool) -> None:
    """It may be a call that all others wait for: what it asked for as one worker more must not wait."""
    book = Book()
    bench = Bench(book, lambda _items: None, lambda _thing: None)
    hires = Hires(bench, Client(Address(path="/no/such/socket")), None)
    ours, theirs = socket.socketpair()
    with theirs:
        hire = Hire(hires._home, ours, extra=extra)
        hires._open[""] = hire
        bench.epoll.register(hire.fileno(), select.EPOLLIN)
        bench.queues[""].append(Item(Task("pickle", "label", "", b"", b"digest"), b"", Direct(), 0, book))
        if lanes:
            bench.lanes[object()] = hires._home  # type: ignore[index]
        hires.look(time.monotonic())
        assert bool(hires) is stays
        hires.close()


def test_cancelled_calls_are_sifted_out_when_they_are_many() -> None:
    """Each by itself would take as long as all that wait; until then they are passed by."""
    book = Book()
    bench = Bench(book, lambda _items: None, lambda _thing: None)
    task = Task("pickle", "label", "", b"", b"digest")
    items = [Item(task, b"", Direct(), number, book) for number in range(100)]
    book.add(items)
    queue = bench.queues[""]
    queue.extend(items)
    for item in items[:50]:
        item.settle(b"Mx")
        bench.cancelled += 1
        bench.sift()
        assert len(queue) == 100
    assert batch(queue, task.key, 10, 0)[1:] == items[50:59]
    items[99].settle(b"Mx")
    bench.cancelled += 1
    bench.sift()
    assert list(queue) == items[59:99]
    assert first(queue) is items[59]
    for item in items[59:]:
        item.settle(b"Mx")
    assert first(queue) is None and not queue


def test_a_worker_that_dies_while_it_is_handed_over_is_asked_for_again(
    running: RunningCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls that wait for it have not begun, and no node was lost."""
    answer, deaths = Hire.answer, iter(range(3))

    def dies(hire: Hire) -> Any:
        found = answer(hire)
        if found is not None and next(deaths, None) is not None:
            raise NotHired("the connection was closed")
        return found

    monkeypatch.setattr(Hire, "answer", dies)
    with running.connect() as cloud:
        assert list(cloud.cpu.map(abs, range(-100, 0))) == list(range(100, 0, -1))
    assert next(deaths, None) is None
