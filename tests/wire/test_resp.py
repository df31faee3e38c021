"""Replies as bytes: what the table in `virgo.wire.resp` says, read back by a client's decoder."""

from __future__ import annotations

import hiredis
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from virgo.errors import Busy, UnknownId
from virgo.wire import resp

CHECK = settings(deadline=None, max_examples=200, phases=set(Phase) - {Phase.explain})


def read(data: bytes) -> object:
    reader = hiredis.Reader()
    reader.feed(data)
    reply = reader.gets()
    assert not reader.has_data()
    return reply


@pytest.mark.parametrize(
    ("value", "two", "three"),
    [
        (b"a\r\nb", b"$4\r\na\r\nb\r\n", None),
        (bytearray(b"ab"), b"$2\r\nab\r\n", None),
        (memoryview(b"abcd")[1:3], b"$2\r\nbc\r\n", None),
        ("é", b"$2\r\n\xc3\xa9\r\n", None),
        ("\udcff", b"$1\r\n\xff\r\n", None),
        (0, b":0\r\n", None),
        (-5, b":-5\r\n", None),
        (2**63 - 1, b":9223372036854775807\r\n", None),
        (-(2**63), b":-9223372036854775808\r\n", None),
        (2**63, b"$19\r\n9223372036854775808\r\n", None),
        (True, b":1\r\n", b"#t\r\n"),
        (False, b":0\r\n", b"#f\r\n"),
        (1.5, b"$3\r\n1.5\r\n", b",1.5\r\n"),
        (None, b"$-1\r\n", b"_\r\n"),
        ([1, b"a", None], b"*3\r\n:1\r\n$1\r\na\r\n$-1\r\n", b"*3\r\n:1\r\n$1\r\na\r\n_\r\n"),
        ((), b"*0\r\n", None),
        ({"k": 1}, b"*2\r\n$1\r\nk\r\n:1\r\n", b"%1\r\n$1\r\nk\r\n:1\r\n"),
        (resp.OK, b"+OK\r\n", None),
        (resp.Simple("done"), b"+done\r\n", None),
    ],
)
def test_values_have_the_forms_of_the_table(value: object, two: bytes, three: bytes | None) -> None:
    """Each kind of value is encoded as the table says, in both protocols."""
    assert resp.encode(value) == two
    assert resp.encode(value, 3) == (two if three is None else three)


def test_an_error_inside_a_reply_is_an_error_there() -> None:
    """A batch's reply can hold errors beside values."""
    assert (
        resp.encode([b"a", Busy("no room", hint="wait")]) == b"*2\r\n$1\r\na\r\n-BUSY no room Hint: wait\r\n"
    )


def test_an_error_is_one_line_whatever_its_message_holds() -> None:
    """Line ends in a message cannot end the reply early, so nothing can be smuggled in behind it."""
    data = resp.error(UnknownId("no\r\n+OK\r\n id \n 7", hint="a\rb"))
    assert data.count(b"\r\n") == 1
    assert data.startswith(b"-NOID no +OK id 7 Hint: a b")
    assert isinstance(read(data), hiredis.ReplyError)
    assert resp.error(UnknownId("bad \udcff text")).endswith(b"\r\n")


def test_what_has_no_form_is_refused() -> None:
    """An object of another kind is a TypeError and not a guess."""
    for value in (object(), {1, 2}, 1j, [object()]):
        with pytest.raises(TypeError, match="no form on the wire"):
            resp.encode(value)


VALUES = st.recursive(
    st.one_of(
        st.binary(max_size=20),
        st.integers(resp.INTEGER_MAX * -1 - 1, resp.INTEGER_MAX),
        st.none(),
        st.booleans(),
        st.floats(allow_nan=False),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.binary(max_size=5), inner, max_size=4)
    ),
    max_leaves=20,
)


@CHECK
@given(VALUES)
def test_resp3_carries_values_unchanged(value: object) -> None:
    """With RESP3 nested values of all kinds come back equal."""
    assert read(resp.encode(value, 3)) == value
