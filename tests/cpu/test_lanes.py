"""One leased worker and its client, without a node: order, taking back, outcomes that outlive it."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy
import pytest
from tests.waiting import until

from virgo.context import Identity
from virgo.cpu import messages, slate
from virgo.cpu.apart import Apart, Received
from virgo.cpu.calls import Book, Item, Task
from virgo.cpu.client import arguments_of, task_of
from virgo.cpu.lane import Lane, LaneOver
from virgo.cpu.messages import Outcome, Terms
from virgo.cpu.segments import Mapping, Segment, _mapped, take_spare
from virgo.cpu.slate import WANTED, Slate
from virgo.cpu.worker import Worker
from virgo.errors import CallFailed, Denied, VirgoError
from virgo.limits import APART_SPARE_MAX


class Basket:
    """A sink that keeps what comes."""

    def __init__(self) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.book = Book()

    def settle(self, index: int, outcome: Outcome) -> None:
        assert index not in self.outcomes
        self.outcomes[index] = outcome

    def fail(self, index: int, error: VirgoError) -> None:
        raise AssertionError(f"{index} failed: {error}")

    def items(self, function: Callable[..., Any], rows: list[tuple[Any, ...]], first: int = 0) -> list[Item]:
        task: Task = task_of(function)
        made = [
            Item(task, arguments_of(task, row, {}), self, first + place, self.book)
            for place, row in enumerate(rows)
        ]
        self.book.add(made)
        return made

    def results(self) -> dict[int, Any]:
        return {key: messages.as_result(one, trusted=True) for key, one in self.outcomes.items()}


class Hired:
    """A worker in a process of its own, leased for the test."""

    def __init__(self, *, trusted: bool = True) -> None:
        ours, theirs = socket.socketpair()
        self.orders, node_end = socket.socketpair()
        page = slate.create()
        self.slate = Slate(page)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ours.close()
                self.orders.close()
                worker = Worker(node="n1")
                worker._handed = [theirs.detach(), page]
                worker._connections.append(node_end)
                worker._serve_lease(Terms(7, "n1", "c", trusted, Identity("tester", frozenset({"exec"}))))
            finally:
                os._exit(0)
        theirs.close()
        node_end.close()
        os.close(page)
        data, descriptors, _, _ = socket.recv_fds(ours, 4096, 1)
        lease, node, pid = msgspec.msgpack.decode(data.split(b"\r\n", 1)[1][:-2])
        assert (lease, node, pid) == (7, "n1", self.pid)
        self.lane = Lane(ours, Slate(descriptors[0]), lease, node)
        os.close(descriptors[0])

    def want_back(self) -> None:
        """What the node does."""
        self.slate.words[WANTED] = 1
        self.orders.sendall(b"*1\r\n$6\r\nwanted\r\n")

    def receive(self, until: Callable[[], bool] = lambda: True) -> list[tuple[Item, Outcome]]:
        """Settle what comes until the condition holds; also what was not settled as usual."""
        odd, deadline = [], time.monotonic() + 20
        while True:
            for item, outcome in self.lane.receive():
                if outcome in (messages.TAKEN, messages.UNKNOWN, messages.NOT_EXPORTED):
                    odd.append((item, outcome))
                else:
                    item.settle(outcome)
            if until():
                return odd
            assert time.monotonic() < deadline
            time.sleep(0.0002)


@contextmanager
def hired(**options: Any) -> Iterator[Hired]:
    worker = Hired(**options)
    try:
        yield worker
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        os.waitpid(worker.pid, 0)
        worker.lane.close()
        worker.orders.close()


def double(number: int) -> int:
    return 2 * number


def note(path: str, number: int) -> int:
    with Path(path).open("a") as file:
        file.write(f"{number}\n")
    return number


def note_or_wait(path: str, number: int, gate: str) -> int:
    note(path, number)
    while gate and not Path(gate).exists():
        time.sleep(0.001)
    return number


def noted(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def test_outcomes_come_in_the_order_of_the_calls() -> None:
    """A thousand at once, of two functions in turn, each once."""
    basket = Basket()
    with hired() as worker:
        for start in range(0, 1000, 100):
            rows = [(number,) for number in range(start, start + 100)]
            worker.lane.push(basket.items(double if start % 200 else abs, rows, start))
        worker.receive(lambda: not worker.lane.flying)
    expected = {number: 2 * number if number // 100 % 2 else number for number in range(1000)}
    assert basket.results() == expected
    assert list(basket.outcomes) == list(range(1000))


def test_what_is_taken_back_is_not_run_and_the_rest_is_run_once(tmp_path: Path) -> None:
    """While the worker is at a slow call, those behind it are taken back, then sent again."""
    path, gate, basket = tmp_path / "noted", tmp_path / "gate", Basket()
    rows = [(str(path), number, str(gate) if number == 10 else "") for number in range(50)]
    with hired() as worker:
        worker.lane.push(basket.items(note_or_wait, rows))
        until(lambda: len(noted(path)) == 11)
        taken = worker.lane.take_back()
        assert [item.index for item in taken] == list(range(11, 50))
        assert worker.lane.take_back() == []
        gate.touch()
        worker.receive(lambda: not worker.lane.flying)
        assert noted(path) == list(range(11))
        worker.lane.push(taken)
        worker.receive(lambda: not worker.lane.flying)
    assert noted(path) == list(range(50)) and sorted(basket.results()) == list(range(50))


def test_taking_back_at_any_moment_loses_no_call_and_runs_none_twice(tmp_path: Path) -> None:
    """Calls are taken back and sent again hundreds of times while the worker runs them."""
    path, basket, chance = tmp_path / "noted", Basket(), random.Random(5)
    waiting = basket.items(note, [(str(path), number) for number in range(3000)])
    rounds = 0
    with hired() as worker:
        while basket.book.open:
            rounds += 1
            count = chance.randrange(1, 60)
            batch, waiting = waiting[:count], waiting[count:]
            if batch:
                worker.lane.push(batch)
            time.sleep(chance.random() / 2000)
            again = [item for item, _ in worker.receive()]
            waiting = again + worker.lane.take_back() + waiting
            if not waiting:
                waiting = [item for item, _ in worker.receive(lambda: not worker.lane.flying)]
    assert rounds > 50
    assert Counter(noted(path)) == Counter(range(3000))
    assert sorted(basket.results().values()) == list(range(3000))


def test_what_is_finished_is_seen_while_a_slow_call_keeps_it_back(tmp_path: Path) -> None:
    """Outcomes that the worker had no time to send are read from the slate, and are not taken twice."""
    path, gate, basket = tmp_path / "noted", tmp_path / "gate", Basket()
    rows = [(str(path), number, str(gate) if number == 3 else "") for number in range(4)]
    with hired() as worker:
        for _ in range(20):  # until they are laid down within one turn: the first calls are slow
            basket = Basket()
            path.unlink(missing_ok=True)
            gate.unlink(missing_ok=True)
            worker.lane.push(basket.items(note_or_wait, rows))
            until(lambda: len(noted(path)) == 4)
            worker.receive()
            sent = len(basket.outcomes)
            for item, outcome in worker.lane.finished():
                item.settle(outcome)
            assert set(basket.results()) == {0, 1, 2}
            gate.touch()
            worker.receive(lambda: not worker.lane.flying)
            assert basket.results() == {number: number for number in range(4)}
            if sent < 3:
                break
        else:
            raise AssertionError("nothing was ever kept back")


@pytest.mark.parametrize("at", [0, 1, 77, 199])
def test_the_death_of_a_worker_costs_the_call_that_it_was_at(tmp_path: Path, at: int) -> None:
    """All before it have their outcomes, all behind it have not begun."""
    path, basket = tmp_path / "noted", Basket()

    def note_or_die(number: int) -> int:
        note(str(path), number)
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with hired() as worker:
        worker.lane.push(basket.items(note_or_die, [(number,) for number in range(200)]))
        with pytest.raises(LaneOver):
            worker.receive(lambda: False)
        rest = worker.lane.rest()
        for item, outcome in rest.ended:
            item.settle(outcome)
    assert not rest.let_go
    assert [item.index for item in rest.begun] == [at]
    assert [item.index for item in rest.fresh] == list(range(at + 1, 200))
    assert basket.results() == {number: number for number in range(at)}
    assert noted(path) == list(range(at + 1))


def test_a_lease_that_is_wanted_back_ends_after_the_call_that_runs(tmp_path: Path) -> None:
    """The worker finishes it, says that it lets go, and what is behind it has not begun."""
    path, gate, basket = tmp_path / "noted", tmp_path / "gate", Basket()
    rows = [(str(path), number, str(gate) if number == 5 else "") for number in range(20)]
    with hired() as worker:
        worker.lane.push(basket.items(note_or_wait, rows))
        until(lambda: len(noted(path)) == 6)
        worker.want_back()
        gate.touch()
        with pytest.raises(LaneOver):
            worker.receive(lambda: False)
        rest = worker.lane.rest()
        for item, outcome in rest.ended:
            item.settle(outcome)
    assert rest.let_go and not rest.begun
    done = sorted(basket.results())
    assert done == noted(path) and done[:6] == list(range(6))
    assert [item.index for item in rest.fresh] == list(range(len(done), 20))


def test_an_idle_lease_that_is_wanted_back_ends_at_once() -> None:
    """Also if a call comes at the same moment: that has not begun."""
    basket = Basket()
    with hired() as worker:
        worker.lane.push(basket.items(double, [(1,)]))
        worker.receive(lambda: not worker.lane.flying)
        worker.want_back()
        until(lambda: worker.slate.words[slate.LET_GO])
        with pytest.raises(LaneOver):
            worker.lane.push(basket.items(double, [(2,)], 1))
            worker.receive(lambda: False)
        rest = worker.lane.rest()
    assert rest.let_go and not rest.begun and [item.index for item in rest.fresh] == [1]


def test_a_client_without_the_role_cannot_send_functions() -> None:
    """Whoever may call by name only gets a failure, and nothing of it is unpickled."""
    basket = Basket()
    with hired(trusted=False) as worker:
        worker.lane.push(basket.items(double, [(1,)]))
        worker.receive(lambda: not worker.lane.flying)
    (outcome,) = basket.outcomes.values()
    with pytest.raises(Denied, match="exec"):
        messages.as_result(outcome, trusted=True)


def test_nonsense_ends_the_lease_and_not_the_worker() -> None:
    """A client that does not keep to the protocol is closed."""
    with hired() as worker:
        worker.lane._connection.send(b"*2\r\n$3\r\nabc\r\n$1\r\nx\r\n")
        until(lambda: worker.slate.words[slate.LET_GO])
        with pytest.raises(LaneOver):
            worker.receive(lambda: False)


def test_arrays_lie_apart_and_are_each_ones_own() -> None:
    """Contents are equal both ways; what the worker writes into its array does not reach the sender's."""
    basket = Basket()
    arrays = [numpy.arange(200_000, dtype=float) + number for number in range(20)]

    def negate(array: Any) -> Any:
        array *= -1
        return array, "small", array[:3].copy()

    with hired() as worker:
        before = len(list(Path("/proc/self/fd").iterdir()))
        worker.lane.push(basket.items(negate, [(array,) for array in arrays]))
        worker.receive(lambda: not worker.lane.flying)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3 * APART_SPARE_MAX
        for number, (array, small, head) in basket.results().items():
            assert numpy.array_equal(array, -arrays[number]) and small == "small"
            assert head.tolist() == (-arrays[number][:3]).tolist()
            array[0] = 1.0  # it may be written to
        assert arrays[3][0] == 3.0


def test_memory_that_is_filled_again_is_nobodys() -> None:
    """Arrays that a function keeps, and results that are kept here, stay as they are."""
    basket, kept = Basket(), {}
    arrays = [numpy.full(100_000, float(number)) for number in range(40)]
    store: list[Any] = []

    def keep(array: Any, number: int) -> Any:
        if number % 3 == 0:
            store.append(array)
        return array + 0.5 if number % 2 else [float(one[-1]) for one in store]

    with hired() as worker:
        for number, array in enumerate(arrays):
            worker.lane.push(basket.items(keep, [(array, number)], number))
            worker.receive(lambda: not worker.lane.flying)
            result = messages.as_result(basket.outcomes.pop(number), trusted=True)
            if number % 2 == 0:
                assert result == [float(one) for one in range(0, number + 1, 3)]
            elif number % 5 == 0:
                kept[number] = result
            else:
                assert (result == number + 0.5).all()
        assert all((array == number + 0.5).all() for number, array in kept.items())


def test_an_array_that_is_returned_as_it_came_is_not_copied() -> None:
    """It comes back in the memory in which it was sent, also most of it; what was written to does not."""
    basket, array = Basket(), numpy.arange(200_000, dtype=float)

    def changed(array: Any, value: float) -> Any:
        array[77_777] = value
        return array

    def numbers_of(function: Any, *rest: Any) -> tuple[int, int]:
        (item,) = basket.items(function, [(array, *rest)])
        assert isinstance(item.arguments, Apart)
        sent = item.arguments.segment.number
        worker.lane.push([item])
        outcomes: list[Any] = []
        while worker.lane.flying:
            outcomes += [outcome for _, outcome in worker.lane.receive()]
        (outcome,) = outcomes
        assert isinstance(outcome, Received)
        result = messages.as_result(outcome, trusted=True)
        (got,) = (number for number in _mapped if number not in kept)
        kept[got] = result  # so that no memory is used again
        return sent, got

    kept: dict[int, Any] = {}
    with hired() as worker:
        for function in (lambda array: array, lambda array: array[1_000:190_000]):
            sent, got = numbers_of(function)
            assert got == sent
            assert numpy.array_equal(kept[got], function(array))
        for function, rest in ((changed, (-1.0,)), (lambda array: array[:50_000], ())):
            sent, got = numbers_of(function, *rest)
            assert got != sent
        assert [float(result[77_777]) for result in kept.values() if len(result) == 200_000] == [
            77_777.0,
            -1.0,
        ]


def test_memory_of_a_returned_array_is_not_filled_while_either_side_has_it() -> None:
    """Arrays that a worker keeps, or a client, or both, stay what they were, however many are sent later."""
    basket, kept = Basket(), {}
    store: list[Any] = []

    def same(array: Any, number: int) -> Any:
        if number % 3 == 0:
            store.append((number, array))
        assert all((one == float(at)).all() for at, one in store), "changed in the worker"
        return array

    with hired() as worker:
        for number in range(40):
            worker.lane.push(basket.items(same, [(numpy.full(100_000, float(number)), number)], number))
            worker.receive(lambda: not worker.lane.flying)
            result = messages.as_result(basket.outcomes.pop(number), trusted=True)
            if number % 2:
                result[0] = -1.0
                kept[number] = result
        assert len(kept) == 20
        for number, result in kept.items():
            assert result[0] == -1.0 and (result[1:] == float(number)).all()


def test_arguments_that_cannot_be_had_are_an_error_of_the_call() -> None:
    """And no reason to send them to another worker, where they cannot be had either; the lease goes on."""
    basket = Basket()
    with hired() as worker:
        item, after = basket.items(numpy.sum, [(numpy.ones(100_000),), (numpy.ones(100),)])
        assert isinstance(item.arguments, Apart)
        item.arguments.segment = Segment(os.memfd_create("test"))  # too short
        worker.lane.push([item, after])
        worker.receive(lambda: not worker.lane.flying)
    with pytest.raises(CallFailed, match=r"cannot be loaded .*shorter"):
        messages.as_result(basket.outcomes.pop(0), trusted=True)
    assert basket.results() == {1: 100.0}


def test_memory_that_could_shrink_is_not_mapped() -> None:
    """Whoever read it would be killed."""
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 1 << 20)
    with pytest.raises(OSError, match="can be made so"):
        Mapping(Segment(descriptor), 1 << 20, ours=True, kept=False)


def test_memory_comes_back_after_a_call() -> None:
    """What an argument lay in is the client's to fill again, once the worker does not use it any more."""
    basket = Basket()
    take_spare()
    with hired() as worker:
        worker.lane.push(basket.items(numpy.sum, [(numpy.ones(100_000),)]))
        found: list[Any] = []

        def spared() -> bool:
            found.extend(take_spare())
            return bool(found)

        worker.receive(spared)
    assert basket.results() == {0: 100_000.0}
    assert len(found) == 1 and os.fstat(found[0].descriptor).st_size == 800_000


def test_arguments_that_were_not_used_are_sent_again_unchanged() -> None:
    """A worker that does not know the function gives no memory back that is needed once more."""
    basket = Basket()
    first, second = numpy.full(100_000, 1.0), numpy.full(100_000, 2.0)
    with hired() as worker:
        (item,) = basket.items(numpy.sum, [(first,)])
        worker.lane._known.add(item.task.digest)
        worker.lane.push([item])
        odd = worker.receive(lambda: not worker.lane.flying)
        assert [outcome for _, outcome in odd] == [messages.UNKNOWN]
        worker.lane.push(basket.items(numpy.mean, [(second,)], 1))
        worker.receive(lambda: not worker.lane.flying)
        worker.lane.forget(item.task)
        worker.lane.push([item])
        worker.receive(lambda: not worker.lane.flying)
    assert basket.results() == {0: 100_000.0, 1: 2.0}


def test_large_values_pass_both_ways() -> None:
    """Longer than what the socket holds, while the worker is busy; none is cut."""
    basket = Basket()
    with hired() as worker:
        rows = [(bytes([number]) * 3_000_000,) for number in range(8)]
        worker.lane.push(basket.items(bytes, rows))

        def flow() -> bool:
            worker.lane.send()
            return not worker.lane.flying

        worker.receive(flow)
    assert basket.results() == {number: rows[number][0] for number in range(8)}
