"""Functions as bytes: kept only while nothing that they hold can have changed."""

from __future__ import annotations

import functools
import math
import pickle
import sys
import types
from typing import Any

import cloudpickle
import pytest

from virgo.cpu import exports, messages, shipping
from virgo.cpu.arguments import load_arguments
from virgo.cpu.tasks import task_of
from virgo.errors import BadArgument

cloudpickle.register_pickle_by_value(sys.modules[__name__])

SCALE = 2


def scaled(value: int) -> int:
    return value * SCALE


def called(data: bytes, *args: Any) -> Any:
    return pickle.loads(data)(*args)


def shipped(function: Any) -> bytes:
    return shipping.ship(function).data


def test_a_function_that_holds_nothing_mutable_is_pickled_once():
    """The very same bytes are given again."""
    assert shipping.ship(scaled) is shipping.ship(scaled)


def test_a_changed_global_is_shipped_anew(monkeypatch):
    """What a global was when the call was made is what counts."""
    module = sys.modules[__name__]
    assert called(shipped(scaled), 5) == 10
    monkeypatch.setattr(module, "SCALE", 3)
    assert called(shipped(scaled), 5) == 15


def test_a_changed_closure_is_shipped_anew():
    """A rebound variable and a mutated object are both seen."""
    step, seen = 1, [0]

    def rebound() -> int:
        return step

    def mutated() -> int:
        return seen[0]

    assert (called(shipped(rebound)), called(shipped(mutated))) == (1, 0)
    step = 2
    seen[0] = 7
    assert (called(shipped(rebound)), called(shipped(mutated))) == (2, 7)


def test_changes_of_a_called_function_are_shipped(monkeypatch):
    """What a function calls travels with it, as it is at that time."""

    def outer() -> int:
        return scaled(10)

    assert called(shipped(outer)) == 20
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 4)
    assert called(shipped(outer)) == 40


def test_changes_of_a_module_that_is_shipped_by_value_are_seen(monkeypatch):
    """Of one beside the program, as of its globals; an installed one goes by its name."""
    beside: Any = types.ModuleType("beside_the_program")
    beside.value = 1
    monkeypatch.setitem(sys.modules, beside.__name__, beside)
    cloudpickle.register_pickle_by_value(beside)

    def outer() -> int:
        return beside.value

    def number() -> float:
        return math.sqrt(4)

    try:
        assert called(shipped(outer)) == 1
        beside.value = 2
        assert called(shipped(outer)) == 2
    finally:
        cloudpickle.unregister_pickle_by_value(beside)
    assert shipping.ship(number) is shipping.ship(number)


@functools.lru_cache(maxsize=7)
def remembered(value: int) -> int:
    return value + SCALE


def test_functions_with_a_cache_are_shipped():
    """By themselves, inside of others, and made within a function; each with its bound."""

    @functools.cache
    def local(value: int) -> int:
        return remembered(value) * 10

    for function in (remembered, local, lambda value: remembered(value) + 1):
        assert called(shipped(function), 3) == function(3)
    assert pickle.loads(shipped(remembered)).cache_parameters()["maxsize"] == 7


def test_other_functions_at_the_same_address_are_not_confused():
    """Functions that come and go, some at equal addresses, are each shipped as they are."""
    assert [called(shipped(lambda bound=number: bound)) for number in range(600)] == list(range(600))


@pytest.mark.parametrize(
    "value", [None, True, -1, 2**70, 1.5, "ü", b"\xff", [1, [2]], {"a": None}, ("t",), {1}]
)
def test_arguments_and_results_survive(value):
    """Plain and structured values come back equal."""
    assert load_arguments(shipping.ship_arguments((value,), {"k": value})) == (
        (value,),
        {"k": value},
    )
    assert list(load_arguments(shipping.ship_arguments((value,), {}))[0]) == [value]
    assert messages.as_result(messages.pickled(value), trusted=True) == value


def test_an_untrusted_outcome_is_never_unpickled():
    """A pickle in place of a MessagePack result is refused, not opened."""
    bomb = messages.PICKLED + cloudpickle.dumps(sys.exit)
    with pytest.raises(messages.CallFailed, match="unknown kind"):
        messages.as_result(bomb, trusted=False)


@pytest.mark.parametrize("name", ["", "1st", "a b", "a/b", "x" * 64, "é"])
def test_names_of_exports_are_checked(name):
    """A name is a letter and letters, digits, '_', '.', '-'."""
    with pytest.raises(BadArgument):
        exports.check_name(name)


def test_export_returns_the_function_and_refuses_a_second_of_the_name(monkeypatch):
    """@export leaves a function as it is; another function cannot take its name unseen."""
    monkeypatch.setattr(exports, "_registry", {})

    @exports.export
    def first() -> int:
        return 1

    assert first() == 1 and exports.exported()["first"] is first
    assert exports.export(first) is first
    with pytest.raises(BadArgument, match="first"):
        exports.export(name="first")(scaled)
    assert exports.export(name="second")(scaled) is scaled


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout": 0}, "timeout is 0, but must be more than 0 s and at most 2678400 s"),
        ({"timeout": -1.5}, "timeout is -1.5"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"retries": -1}, "retries is -1, but must be 0 to 1000"),
        ({"retries": 1001}, "retries is 1001"),
        ({"retries": 1.5}, "retries is 1.5, but must be a number"),
        ({"timeout": "x"}, "timeout is 'x'"),
        ({"priority": "x"}, "priority is 'x'"),
    ],
)
def test_options_of_a_call_that_make_no_sense_are_refused_before_it_travels(
    options: dict[str, Any], said: str
) -> None:
    """BadArgument that names option, value and range, and says what to give instead."""
    with pytest.raises(BadArgument) as caught:
        task_of("pid", **options)
    assert said in caught.value.message
    assert caught.value.hint
