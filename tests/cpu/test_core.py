"""Placement and the ledger: pure decisions, by tables and by a state machine."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from virgo.cpu import core
from virgo.cpu.core import Fork, Ledger, Retire, Start
from virgo.cpu.durations import Durations
from virgo.cpu.line import Line
from virgo.cpu.placement import Candidate, Seats, choose, compared, workers_of
from virgo.errors import Busy
from virgo.limits import DURATIONS_MAX, WORKERS_MAX
from virgo.members import Load, Member


def candidate(number: int, *, calls: int = 0, workers: int = 1, local: bool = False, **load: float):
    return Candidate(number, Load(**load), calls, workers, local)


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([candidate(1, local=True), candidate(2), candidate(3)], 1),
        ([candidate(1, calls=1), candidate(2, calls=1), candidate(3)], 3),
        ([candidate(1, calls=2, workers=8), candidate(2, calls=1, workers=2)], 1),
        ([candidate(1, cpu_pressure_percent=80), candidate(2, cpu_pressure_percent=5)], 2),
        ([candidate(1, memory_pressure_percent=40), candidate(2, cpu_pressure_percent=40)], 2),
        ([candidate(1, run_queue=8, cpus=2), candidate(2, run_queue=8, cpus=64)], 2),
        # A little more pressure at home is worth less than the hop; a lot is worth more.
        ([candidate(1, local=True, cpu_pressure_percent=20), candidate(2)], 1),
        ([candidate(1, local=True, cpu_pressure_percent=60), candidate(2)], 2),
    ],
)
def test_the_least_loaded_is_chosen(candidates, expected):
    """Calls, pressure and run queue each count; the local node has a small bonus."""
    assert choose(candidates, chance=random.Random(1)) == expected


def test_equals_are_chosen_evenly():
    """Among equals no node is favoured."""
    chance = random.Random(7)
    counts = dict.fromkeys((1, 2, 3), 0)
    for _ in range(3000):
        counts[choose([candidate(number) for number in counts], chance=chance)] += 1
    assert all(850 < count < 1150 for count in counts.values())


def test_best_of_two_spreads_over_many_nodes_on_stale_figures():
    """With 100 nodes whose figures are a batch old, best-of-two keeps the fullest near the mean."""
    chance = random.Random(3)
    queue = [0] * 100
    for _ in range(20):
        stale = list(queue)
        for _ in range(100):
            pool = [candidate(number, calls=stale[number]) for number in range(100)]
            queue[choose(pool, chance=chance)] += 1
    assert max(queue) <= 30 and min(queue) >= 10  # the mean is 20


def test_the_choice_depends_on_its_arguments_only():
    """The same candidates and the same random source give the same choice."""
    pool = [candidate(number) for number in range(20)]
    first = [choose(pool, chance=random.Random(seed)) for seed in range(50)]
    assert first == [choose(pool, chance=random.Random(seed)) for seed in range(50)]


def test_the_processors_of_a_machine_are_shared_by_its_nodes():
    """Three nodes on a machine of 8 have 3 each; a node alone has all; who says how many is believed."""
    here = [Member(f"n{n}", n, str(n), machine="m", load=Load(cpus=8)) for n in (1, 2, 3)]
    alone = Member("n4", 4, "4", load=Load(cpus=4))
    told = Member("n5", 5, "5", load=Load(cpus=4, workers=16))
    everybody = [*here, alone, told]
    assert [workers_of(member, everybody) for member in (here[0], alone, told)] == [3, 4, 16]


def test_seats_correct_old_figures_by_what_is_known():
    """Own calls are counted as they come and go, others as last told; one's own are not counted twice."""
    seats = Seats()
    assert seats.room(2) == 2
    seats.ours = 2
    assert seats.room(2) == 0
    seats.seen(Load(outstanding=3))  # two of them are ours
    assert (seats.calls, seats.room(2), seats.room(4)) == (3, -1, 1)
    seats.ours = 0
    assert (seats.calls, seats.room(2), seats.room(4)) == (1, 1, 3)


def test_a_node_full_of_others_calls_still_takes_one_of_each():
    """Nobody starves: whoever has no call there may send one."""
    seats = Seats()
    seats.seen(Load(outstanding=50))
    assert seats.room(2) == 1
    seats.ours = 1
    assert seats.room(2) == 0


def test_clients_that_were_sent_to_a_node_count_until_it_says_so_itself():
    """Until its next figures come nobody sends it as many again."""
    seats = Seats()
    seats.seen(Load(outstanding=0))
    seats.moved = 2
    assert (seats.calls, seats.room(2), seats.room(4)) == (2, 0, 2)
    seats.seen(Load(outstanding=1))
    assert (seats.calls, seats.room(2), seats.room(4)) == (1, 1, 3)


# --- the ledger -----------------------------------------------------------------------------


def forked(effects: list[core.Effect]) -> list[int]:
    return [effect.worker for effect in effects if isinstance(effect, Fork)]


def test_workers_are_made_as_calls_come_up_to_the_target():
    """Three calls on a target of two: two workers, one call waits, and is taken by the first to be free."""
    ledger = Ledger(target=2)
    workers = [*forked(ledger.submit(1)), *forked(ledger.submit(2)), *forked(ledger.submit(3))]
    assert workers == [1, 2]
    assert ledger.ready(1) == [Start(1, 1)]
    assert ledger.ready(2) == [Start(2, 2)]
    assert ledger.done(2) == [Start(3, 2)]
    assert (ledger.running, ledger.waiting) == (2, 0)


def test_a_call_that_waits_for_a_call_lends_its_place():
    """On a target of one, a clone that clones gets a second worker, which goes again when both are done."""
    ledger = Ledger(target=1)
    ledger.submit(1)
    assert ledger.ready(1) == [Start(1, 1)]
    assert ledger.submit(2) == []  # somebody else's
    ledger.lend(1)
    ledger.withdraw(2)
    assert ledger.submit(3, nested=True) == []  # a worker for call 2 is being made already
    assert ledger.ready(2) == [Start(3, 2)]
    assert ledger.done(2) == []
    ledger.reclaim(1)
    assert ledger.trim() == [Retire(2)]


def test_calls_of_calls_go_first_newest_first():
    """Nested calls overtake the others, so that few calls are half done at any time."""
    ledger = Ledger(target=1)
    for call in (1, 2, 3):
        ledger.submit(call)
    ledger.ready(1)
    ledger.submit(4, nested=True)
    ledger.submit(5, nested=True)
    order = [effect.call for _ in range(4) for effect in ledger.done(1) if isinstance(effect, Start)]
    assert order == [5, 4, 2, 3]


def test_recursion_without_end_is_refused():
    """When calls that wait for calls hold all the workers there can be, the next is Busy, not stuck."""
    ledger = Ledger(target=1)
    with pytest.raises(Busy, match="hold all"):
        for call in range(1, 2 * WORKERS_MAX):
            for worker in forked(ledger.submit(call, nested=call > 1)):
                ledger.ready(worker)
            ledger.lend(call)
    assert ledger.workers <= WORKERS_MAX


def test_a_dead_worker_is_replaced_only_if_there_is_work():
    """The death of a worker frees its place; another is made for those who wait."""
    ledger = Ledger(target=1)
    ledger.submit(1)
    ledger.ready(1)
    ledger.submit(2)
    assert ledger.gone(1) == [Fork(2)]
    assert ledger.ready(2) == [Start(2, 2)]
    assert ledger.gone(2) == []


def leased(target: int, *crews: bytes) -> Ledger:
    """A ledger whose workers are leased by these clients, one each."""
    ledger = Ledger(target=target)
    ledger.warm(target)
    for worker in range(1, target + 1):
        ledger.ready(worker)
    for call, crew in enumerate(crews, 1):
        ledger.submit(call, crew=crew)
    return ledger


@pytest.mark.parametrize(
    ("crews", "asking", "idle", "turn", "expected"),
    [
        ((b"a", b"a"), b"b", {1}, False, 1),  # an idle one, whosever it is ...
        ((b"a", b"a"), b"a", {1}, False, None),  # ... but one's own
        ((b"a", b"a"), b"b", set(), False, 2),  # who has most gives, the last first
        ((b"a", b"b"), b"c", set(), False, None),  # with one each there are turns:
        ((b"a", b"b"), b"c", set(), True, 1),  # the longest held
        ((b"a", b"b"), b"a", set(), True, None),  # nobody's turn comes while he has one
        ((b"a", b"a", b"a", b"b"), b"b", set(), False, 3),
        ((b"a", b"a", b"b", b"b"), b"a", set(), True, None),
        ((b"a", b"a"), b"", set(), False, 2),  # a single call is a client too
        ((b"a",), b"", set(), True, 1),
        ((), b"a", set(), True, None),
    ],
)
def test_leases_are_shared_among_clients(crews, asking, idle, turn, expected):
    """Who waits gets an idle worker, or one of who has most, or one when his turn comes."""
    assert leased(4, *crews).victim(asking, idle, turn=turn) == expected


def test_one_lease_is_recalled_at_a_time():
    """While one is on its way, no further is asked back; then the next may be."""
    ledger = leased(2, b"a", b"a")
    first = ledger.victim(b"b", set(), turn=False)
    ledger.recall(first)
    assert ledger.victim(b"b", set(), turn=True) is None
    ledger.done(ledger.worker_of(first))
    assert ledger.victim(b"b", set(), turn=True) == 1


def test_a_recalled_lease_at_a_long_call_keeps_nobody_waiting():
    """Another is asked back after a turn, an idle one first, and none twice."""
    ledger = leased(4, b"a", b"a", b"a", b"b")
    ledger.recall(3)
    assert ledger.victim(b"b", {1}, turn=True) is None
    assert ledger.victim(b"b", {1}, {3}, turn=True) == 1
    assert ledger.victim(b"", set(), {3}, turn=False) == 2
    ledger.recall(2)
    assert ledger.victim(b"", set(), {3}, turn=False) is None
    assert ledger.victim(b"", set(), {2, 3}, turn=True) == 1


class LedgerMachine(RuleBasedStateMachine):
    """Whatever happens: no call has two workers, none is lost, and there are never too many workers."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(target=2)
        self.calls: set[int] = set()
        self.running: dict[int, int] = {}
        self.starting: set[int] = set()
        self.alive: set[int] = set()
        self.lent: list[int] = []
        self.last = 0

    def apply(self, effects: list[core.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Fork):
                assert effect.worker not in self.alive
                self.alive.add(effect.worker)
                self.starting.add(effect.worker)
            elif isinstance(effect, Start):
                assert effect.worker in self.alive and effect.worker not in self.running
                assert effect.call in self.calls and effect.call not in self.running.values()
                self.running[effect.worker] = effect.call
            else:
                assert effect.worker not in self.running
                self.alive.discard(effect.worker)

    @rule(nested=st.booleans(), extra=st.booleans())
    def submit(self, nested: bool, extra: bool) -> None:
        self.last += 1
        self.calls.add(self.last)
        self.apply(self.ledger.submit(self.last, nested=nested, extra=extra))

    @precondition(lambda self: self.starting)
    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.starting)))
        self.starting.discard(worker)
        self.apply(self.ledger.ready(worker))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.running)))
        self.calls.discard(self.running.pop(worker))
        self.apply(self.ledger.done(worker))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.alive)))
        self.alive.discard(worker)
        self.starting.discard(worker)
        self.calls.discard(self.running.pop(worker, 0))
        self.apply(self.ledger.gone(worker))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def lend(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(sorted(self.running.values())))
        self.lent.append(call)
        self.apply(self.ledger.lend(call))

    @precondition(lambda self: self.lent)
    @rule()
    def reclaim(self) -> None:
        self.ledger.reclaim(self.lent.pop())

    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        waiting = sorted(self.calls - set(self.running.values()))
        if waiting:
            call = data.draw(st.sampled_from(waiting))
            assert self.ledger.withdraw(call)
            self.calls.discard(call)

    @rule()
    def trim(self) -> None:
        self.apply(self.ledger.trim())

    @invariant()
    def every_call_waits_or_runs(self) -> None:
        assert self.ledger.running == len(self.running)
        assert self.ledger.waiting == len(self.calls) - len(self.running)
        assert self.ledger.workers == len(self.alive)

    @invariant()
    def a_call_waits_only_when_no_worker_may_take_it(self) -> None:
        idle = self.alive - self.starting - set(self.running)
        if self.ledger.waiting and not self.starting:
            assert not idle or self.ledger.running >= self.ledger.limit


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLedger = LedgerMachine.TestCase


def test_a_call_of_several_places_waits_until_they_are_free():
    """It is not passed by those behind it, and alone it runs however many it asks for."""
    ledger = Ledger(target=4)
    effects = ledger.submit(1, places=3)
    effects += ledger.submit(2, places=2)
    effects += ledger.submit(3)
    workers = [effect.worker for effect in effects if isinstance(effect, Fork)]
    assert ledger.room == 4 - 3 - 2 - 1
    started = [effect for worker in workers for effect in ledger.ready(worker)]
    assert [effect.call for effect in started if isinstance(effect, Start)] == [1]
    first = next(effect.worker for effect in started if isinstance(effect, Start))
    started = ledger.done(first)
    assert [effect.call for effect in started if isinstance(effect, Start)] == [2, 3]
    assert ledger.room == 1
    for worker in (ledger.worker_of(2), ledger.worker_of(3)):
        assert worker is not None
        ledger.done(worker)
    started = ledger.submit(4, places=9)
    assert [effect.call for effect in started if isinstance(effect, Start)] == [4]


def test_a_call_of_several_places_lends_them_all():
    """While it waits for a call of its own, that one finds room."""
    ledger = Ledger(target=2)
    effects = ledger.submit(1, places=2)
    (worker,) = [effect.worker for effect in effects if isinstance(effect, Fork)]
    assert ledger.ready(worker) == [Start(1, worker)]
    assert ledger.room == 0
    ledger.lend(1)
    assert ledger.room == 2
    effects = ledger.submit(2, nested=True, places=2)
    (second,) = [effect.worker for effect in effects if isinstance(effect, Fork)]
    assert ledger.ready(second) == [Start(2, second)]
    ledger.done(second)
    ledger.reclaim(1)
    assert ledger.room == 0


def test_a_line_is_by_priority_and_then_by_arrival():
    """Whoever leaves takes nothing with him."""
    line = Line()
    for number, priority in enumerate((0, 5, 0, -1, 5)):
        line.add(number, str(number), priority=priority)
    assert list(line) == [1, 4, 0, 2, 3] and line[3] == "3"
    for number in (1, 3, 3, 99):
        line.drop(number)
    assert list(line) == [4, 0, 2] and len(line) == 3


def test_data_draw_a_call_but_do_not_make_it_wait():
    """A node near them is taken while it has a free worker, over one that is idle or the local one."""
    chance = random.Random(1)
    pool = [candidate(1), candidate(2, calls=0), candidate(3)]
    assert {choose(pool, chance=chance, near=2) for _ in range(20)} == {2}
    pool = [candidate(1), candidate(2, calls=1), candidate(3)]
    assert 2 not in {choose(pool, chance=chance, near=2) for _ in range(20)}
    many = [candidate(number, calls=1) for number in range(1, 100)]
    assert {choose(many, chance=chance, near=77) for _ in range(20)} == {77}


def test_more_nodes_are_compared_for_longer_calls():
    """Their figures are fresher, beside them."""
    assert [compared(seconds) for seconds in (None, 0.001, 0.99, 1.0, 9.9, 10.0, 1e6)] == [
        2,
        2,
        2,
        4,
        4,
        8,
        8,
    ]
    pool = [candidate(number, calls=1) for number in range(1, 500)] + [candidate(500)]
    found = [
        sum(choose(pool, chance=random.Random(seed), compare=few) == 500 for seed in range(2000))
        for few in (2, 8)
    ]
    assert found[1] > 2 * found[0] > 0


def test_durations_are_learnt_and_bounded():
    """A moving average by name; the least recently used are forgotten."""
    durations = Durations()
    assert durations.expect("f") is None
    durations.learn("f", 1.0)
    durations.learn("f", 2.0)
    assert durations.expect("f") == pytest.approx(1.3)
    for number in range(DURATIONS_MAX):
        durations.learn(str(number), float(number))
    assert durations.expect("f") is None
    assert list(durations.longest(2).values()) == [DURATIONS_MAX - 1, DURATIONS_MAX - 2]
