"""What every `concurrent.futures.Executor` must do, as claims that can be run against any.

A claim is a function of one argument, which makes an executor with two workers; its docstring says what it
shows, and it raises AssertionError if that is not so. Whatever a claim runs is importable from here, so
executors of processes can be tested too. `CLAIMS` lists them all:

    @pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
    def test_contract(claim): claim(lambda: ThreadPoolExecutor(2))

What the standard library leaves open is not claimed, whether a running call can be cancelled for example.
ThreadPoolExecutor is the measure: ProcessPoolExecutor hands more calls to its workers than these run, so what
is claimed of calls that wait does not hold there for all of them.
"""

from __future__ import annotations

import concurrent.futures as cf
import contextlib
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, Final

Make = Callable[[], Executor]
Claim = Callable[[Make], None]
_PATIENCE_S: Final = 30.0


# --- what is run ----------------------------------------------------------------------------


def add(first: Any, second: Any = 0) -> Any:
    """The sum."""
    return first + second


def keywords(**named: Any) -> dict[str, Any]:
    """What was given by name."""
    return named


def fail(text: str) -> None:
    """Raise ValueError."""
    raise ValueError(text)


def invert(number: int) -> float:
    """One by the number; ZeroDivisionError for 0."""
    return 1 / number


def hold(begun: str, until: str) -> str:
    """Make the first file, wait for the second; its name."""
    Path(begun).touch()
    while not os.path.exists(until):  # noqa: PTH110 - it is asked often
        time.sleep(0.005)
    return until


def mark(path: str) -> None:
    """Make the file longer by a byte."""
    with Path(path).open("ab") as file:
        file.write(b"x")


def step(path: str, begun: str, until: str) -> None:
    """Hold if there is a file to begin with, else mark."""
    if begun:
        hold(begun, until)
    else:
        mark(path)


# --- helpers --------------------------------------------------------------------------------


class _Held:
    """Calls that keep both workers of an executor until they are let go."""

    futures: list[Future[Any]]

    def __init__(self, executor: Executor, directory: Path) -> None:
        self.until = directory / "go"
        begun = [directory / f"begun{number}" for number in range(2)]
        self.futures = [executor.submit(hold, str(path), str(self.until)) for path in begun]
        _wait(lambda: all(path.exists() for path in begun))

    def let_go(self) -> None:
        self.until.touch()


@contextlib.contextmanager
def _held(executor: Executor) -> Iterator[_Held]:
    with tempfile.TemporaryDirectory(prefix="virgo-") as directory:
        held = _Held(executor, Path(directory))
        try:
            yield held
        finally:
            held.let_go()
            cf.wait(held.futures, _PATIENCE_S)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.002)


def _raised(kind: type[BaseException], work: Callable[[], Any]) -> BaseException:
    try:
        result = work()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, got {result!r}")


# --- submit and futures ---------------------------------------------------------------------


def submit_gives_the_result(make: Make) -> None:
    """Arguments pass by place and by name, also those named like parameters of `submit`."""
    with make() as executor:
        assert executor.submit(add, 1, second=2).result(_PATIENCE_S) == 3
        named = {"self": 1, "fn": 2, "target": 3, "args": 4, "kwargs": 5, "timeout": 6, "node": 7}
        assert executor.submit(keywords, **named).result(_PATIENCE_S) == named


def an_exception_is_raised_by_result_and_given_by_exception(make: Make) -> None:
    """The very type and text; the future is done and not cancelled."""
    with make() as executor:
        future = executor.submit(fail, "no")
        error = future.exception(_PATIENCE_S)
        assert type(error) is ValueError and str(error) == "no"
        assert str(_raised(ValueError, future.result)) == "no"
        assert future.done() and not future.cancelled() and not future.running()


def result_waits_no_longer_than_asked(make: Make) -> None:
    """TimeoutError, and the result is there later."""
    with make() as executor, _held(executor) as held:
        future = held.futures[0]
        _raised(TimeoutError, lambda: future.result(0.01))
        _raised(TimeoutError, lambda: future.exception(0.01))
        assert not future.done()
        held.let_go()
        assert future.result(_PATIENCE_S) == str(held.until)


def a_future_is_running_while_it_runs(make: Make) -> None:
    """Neither done nor cancelled, then done and not running."""
    with make() as executor, _held(executor) as held:
        future = held.futures[0]
        _wait(future.running)
        assert not future.done() and not future.cancelled()
        held.let_go()
        future.result(_PATIENCE_S)
        assert future.done() and not future.running()


def a_waiting_call_can_be_cancelled_and_is_not_run(make: Make) -> None:
    """`cancel` is True, also the second time; `result` raises CancelledError; nothing is run."""
    with make() as executor, _held(executor) as held:
        path = held.until.with_name("marked")
        waiting = [executor.submit(mark, str(path)) for _ in range(10)]
        assert all(future.cancel() for future in waiting)
        assert all(future.cancel() for future in waiting)
        assert all(future.cancelled() and future.done() for future in waiting)
        _raised(cf.CancelledError, lambda: waiting[0].result(1))
        _raised(cf.CancelledError, lambda: waiting[0].exception(1))
        held.let_go()
        cf.wait(held.futures, _PATIENCE_S)
        assert executor.submit(add, 1).result(_PATIENCE_S) == 1
        assert not path.exists()


def a_call_that_is_done_cannot_be_cancelled(make: Make) -> None:
    """`cancel` is False, and the result stays."""
    with make() as executor:
        future = executor.submit(add, 1, 1)
        assert future.result(_PATIENCE_S) == 2
        assert future.cancel() is False and future.result() == 2


def callbacks_are_called_once_with_the_future(make: Make) -> None:
    """Added before or after the end, in their order; one that raises stops none; for cancelled ones too."""
    with make() as executor, _held(executor) as held:
        seen: list[tuple[str, Future[Any]]] = []
        future, waiting = held.futures[0], executor.submit(add, 1)
        for name in ("first", "second"):
            future.add_done_callback(lambda done, name=name: seen.append((name, done)))  # type: ignore[misc]
        waiting.add_done_callback(lambda done: seen.append(("cancelled", done)))
        assert waiting.cancel()
        _wait(lambda: len(seen) == 1)
        held.let_go()
        future.result(_PATIENCE_S)
        _wait(lambda: len(seen) == 3)
        future.add_done_callback(lambda done: seen.append(("late", done)))
        assert [name for name, _ in seen] == ["cancelled", "first", "second", "late"]
        assert [one for _, one in seen] == [waiting, future, future, future]


def many_threads_may_submit(make: Make) -> None:
    """Each gets its own results."""
    results: dict[int, list[int]] = {}
    with make() as executor:

        def work(number: int) -> None:
            futures = [executor.submit(add, number, step) for step in range(50)]
            results[number] = [future.result(_PATIENCE_S) - number for future in futures]

        threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_PATIENCE_S)
    assert results == {1000 * number: list(range(50)) for number in range(8)}


def every_call_is_run_once(make: Make) -> None:
    """Neither more often nor less, however many there are."""
    with tempfile.TemporaryDirectory(prefix="virgo-") as directory, make() as executor:
        path = Path(directory) / "marked"
        cf.wait([executor.submit(mark, str(path)) for _ in range(500)], _PATIENCE_S)
        assert path.stat().st_size == 500


# --- wait and as_completed ------------------------------------------------------------------


def as_completed_gives_each_as_it_ends(make: Make) -> None:
    """Those that are done first; each once; TimeoutError for those that take too long."""
    with make() as executor:
        quick = executor.submit(add, 1)
        assert quick.result(_PATIENCE_S) == 1
        with _held(executor) as held:
            futures: list[Future[Any]] = [*held.futures, quick, quick]
            found = cf.as_completed(futures, timeout=0.05)
            assert next(found) is quick
            _raised(TimeoutError, lambda: next(found))
            held.let_go()
            assert set(cf.as_completed(futures, _PATIENCE_S)) == {*held.futures, quick}


def wait_returns_when_it_was_asked_to(make: Make) -> None:
    """At the first end, at the first exception, when all have ended, or when the time is over."""
    with make() as executor:
        with _held(executor) as held:
            done, left = cf.wait(held.futures, timeout=0.05)
            assert not done and left == set(held.futures)
            held.let_go()
            done, left = cf.wait(held.futures, _PATIENCE_S)
            assert not left and done == set(held.futures)
        failing = executor.submit(fail, "no")
        done, _ = cf.wait([failing], _PATIENCE_S, return_when=cf.FIRST_EXCEPTION)
        assert done == {failing}
        many = [executor.submit(add, number) for number in range(20)]
        done, _ = cf.wait(many, _PATIENCE_S, return_when=cf.FIRST_COMPLETED)
        assert done
        assert sorted(one.result(_PATIENCE_S) for one in many) == list(range(20))


# --- map ------------------------------------------------------------------------------------


def map_gives_results_in_order(make: Make) -> None:
    """Of several iterables, up to the end of the shortest; with chunks too; of none as well."""
    with make() as executor:
        assert list(executor.map(add, range(100), itertools.count(5))) == [2 * n + 5 for n in range(100)]
        assert list(executor.map(add, range(10), range(10), chunksize=3)) == [2 * n for n in range(10)]
        assert list(executor.map(add, [])) == []


def map_begins_before_it_is_read(make: Make) -> None:
    """The calls run, also if nobody takes the results."""
    with tempfile.TemporaryDirectory(prefix="virgo-") as directory, make() as executor:
        path = Path(directory) / "marked"
        results = executor.map(mark, [str(path)] * 20)
        _wait(lambda: path.exists() and path.stat().st_size == 20)
        assert list(results) == [None] * 20


def map_raises_in_the_place_of_the_result(make: Make) -> None:
    """What comes before is given; what comes after is not, since the generator has ended."""
    with make() as executor:
        results = executor.map(invert, [1, 2, 0, 4])
        assert [next(results), next(results)] == [1.0, 0.5]
        _raised(ZeroDivisionError, lambda: next(results))
        _raised(StopIteration, lambda: next(results))


def map_waits_no_longer_than_asked(make: Make) -> None:
    """TimeoutError from `next`, counted from the call of `map`."""
    with make() as executor, _held(executor):
        results = executor.map(add, [1, 2], timeout=0.05)
        _raised(TimeoutError, lambda: next(results))


def map_that_is_left_cancels_what_waits(make: Make) -> None:
    """Closing the generator early leaves nothing to be run."""
    with tempfile.TemporaryDirectory(prefix="virgo-") as directory, make() as executor:
        path, until = Path(directory) / "marked", Path(directory) / "go"
        begun = [Path(directory) / f"begun{number}" for number in range(2)]
        results = executor.map(
            step, [str(path)] * 1003, ["", *map(str, begun), *[""] * 1000], [str(until)] * 1003
        )
        next(results)
        _wait(lambda: all(one.exists() for one in begun))
        results.close()  # type: ignore[attr-defined]
        size = path.stat().st_size
        until.touch()
        assert executor.submit(add, 1).result(_PATIENCE_S) == 1
        executor.shutdown()
        assert path.stat().st_size == size < 1001


# --- shutdown -------------------------------------------------------------------------------


def after_shutdown_nothing_is_taken(make: Make) -> None:
    """RuntimeError from `submit` and `map`; shutting down again does nothing."""
    executor = make()
    executor.shutdown()
    _raised(RuntimeError, lambda: executor.submit(add, 1))
    _raised(RuntimeError, lambda: list(executor.map(add, [1])))
    executor.shutdown(wait=False, cancel_futures=True)


def shutdown_waits_for_what_was_begun_and_what_waits(make: Make) -> None:
    """All futures are done when it returns, or the block ends."""
    with tempfile.TemporaryDirectory(prefix="virgo-") as directory, make() as executor:
        path = Path(directory) / "marked"
        futures = [executor.submit(mark, str(path)) for _ in range(50)]
        executor.shutdown()
        assert all(future.done() for future in futures) and path.stat().st_size == 50


def shutdown_without_waiting_lets_all_end(make: Make) -> None:
    """It returns at once; what was submitted is run all the same."""
    executor = make()
    with _held(executor) as held:
        waiting = executor.submit(add, 1)
        began = time.monotonic()
        executor.shutdown(wait=False)
        assert time.monotonic() - began < _PATIENCE_S / 6 and not held.futures[0].done()
        held.let_go()
        assert held.futures[0].result(_PATIENCE_S) == str(held.until)
        assert waiting.result(_PATIENCE_S) == 1
    executor.shutdown()


def shutdown_may_cancel_what_waits(make: Make) -> None:
    """With `cancel_futures` what has not begun is cancelled, and what runs is let run to its end."""
    executor = make()
    with _held(executor) as held:
        waiting = [executor.submit(add, number) for number in range(10)]
        executor.shutdown(wait=False, cancel_futures=True)
        assert all(future.cancelled() for future in waiting)
        held.let_go()
        assert [future.result(_PATIENCE_S) for future in held.futures] == [str(held.until)] * 2
    executor.shutdown()


CLAIMS: Final[tuple[Claim, ...]] = (
    submit_gives_the_result,
    an_exception_is_raised_by_result_and_given_by_exception,
    result_waits_no_longer_than_asked,
    a_future_is_running_while_it_runs,
    a_waiting_call_can_be_cancelled_and_is_not_run,
    a_call_that_is_done_cannot_be_cancelled,
    callbacks_are_called_once_with_the_future,
    many_threads_may_submit,
    every_call_is_run_once,
    as_completed_gives_each_as_it_ends,
    wait_returns_when_it_was_asked_to,
    map_gives_results_in_order,
    map_begins_before_it_is_read,
    map_raises_in_the_place_of_the_result,
    map_waits_no_longer_than_asked,
    map_that_is_left_cancels_what_waits,
    after_shutdown_nothing_is_taken,
    shutdown_waits_for_what_was_begun_and_what_waits,
    shutdown_without_waiting_lets_all_end,
    shutdown_may_cancel_what_waits,
)
