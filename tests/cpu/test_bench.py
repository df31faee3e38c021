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

from virgo.cpu.bench import Bench
from virgo.cpu.calls import Book, Direct, Item, Task
from virgo.cpu.contact import Hire
from virgo.cpu.hires import Hires
from virgo.wire.address import Address
from virgo.wire.client import Client

THREADS, CALLS = 3, 20_000


def sift(bench: Bench, _item: Item) -> None:
    bench.cancelled = True
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
    for batch in batches:
        book.add(batch)

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
    for batch in batches:
        own = set(batch)
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
