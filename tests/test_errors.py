"""The error tree: one line on the wire, the same class at the other end."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from virgo import errors
from virgo.errors import CallFailed, FileRefused, UnknownId, VirgoError, from_line

ALL = sorted(errors._registry.values(), key=lambda kind: kind.code)
CHECK = settings(deadline=None, max_examples=100, phases=set(Phase) - {Phase.explain})


def test_codes_are_short_unique_words_that_cover_the_tree() -> None:
    """Every class of `errors` but the base has a code of its own, and none is an ordinary Redis reply."""
    below = {kind for kind in VirgoError.__subclasses__() if kind.__module__ == errors.__name__}
    assert below == set(ALL)
    for kind in ALL:
        assert kind.code.isascii()
        assert kind.code.isupper()
        assert kind.code.isalpha()
        assert kind.__doc__


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.code)
def test_an_error_arrives_as_the_same_class(kind: type[VirgoError]) -> None:
    """Line and back keeps class, message and hint, and also what Python's own class says of it."""
    for error in (kind("it went wrong", hint="do this"), kind("no hint given"), kind()):
        line = error.to_line()
        assert "\n" not in line
        back = from_line(line)
        assert type(back) is kind
        assert str(back).strip() == str(error).strip()
        assert (back.message, back.hint) == (error.message, error.hint)
        assert getattr(back, "errno", None) == getattr(error, "errno", None)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.code)
def test_an_error_can_be_pickled_and_copied(kind: type[VirgoError]) -> None:
    """Between processes an error keeps its class, text and attributes."""
    error = kind("it went wrong", hint="do this")
    for back in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(back) is kind
        assert str(back) == str(error)
        assert back.__dict__ == error.__dict__


def test_the_cause_of_a_failed_call_travels_in_a_pickle() -> None:
    """CallFailed keeps cause, node and the remote traceback."""
    error = CallFailed("boom", hint="look", cause="signal", node="n2", remote_traceback="Traceback ...")
    back = pickle.loads(pickle.dumps(error))
    assert (back.cause, back.node, back.remote_traceback) == ("signal", "n2", "Traceback ...")


def test_str_is_message_and_hint_also_where_python_does_otherwise() -> None:
    """A KeyError's or OSError's own habits do not show."""
    assert str(UnknownId("no region 5", hint="free once")) == "no region 5 Hint: free once"
    assert str(FileRefused("cannot read /a: it is a directory (EISDIR)")).endswith("(EISDIR)")
    assert isinstance(UnknownId("x"), KeyError)


@CHECK
@given(
    st.sampled_from(ALL),
    st.text(max_size=60),
    st.text(max_size=60).filter(lambda hint: not hint or hint.split()),
)
def test_any_text_stays_on_one_line_and_reads_the_same(
    kind: type[VirgoError], message: str, hint: str
) -> None:
    """Whatever message and hint hold, the line has no line end, and the other side's text is the same."""
    error = kind(message, hint=hint)
    line = error.to_line()
    assert len(line.splitlines()) == 1
    assert from_line(line).to_line() == line


def test_an_error_that_quotes_another_keeps_its_own_hint() -> None:
    """The last hint is the error's own."""
    inner = UnknownId("no region 5", hint="inner")
    back = from_line(CallFailed(f"the call failed: {inner}", hint="outer").to_line())
    assert back.hint == "outer"
    assert back.message.endswith("Hint: inner")


def test_an_unknown_code_is_still_an_error() -> None:
    """What another server says, or a later version of ours, is a plain VirgoError with all of its text."""
    back = from_line("WRONGTYPE Operation against a key")
    assert type(back) is VirgoError
    assert str(back) == "WRONGTYPE Operation against a key"
    assert type(from_line("")) is VirgoError


def test_two_errors_cannot_share_a_code() -> None:
    """A second class with the same code is refused where it is defined."""
    with pytest.raises(AssertionError, match="NOID"):
        type("Again", (VirgoError,), {"code": "NOID"})
