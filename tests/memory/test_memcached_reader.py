"""memcached's bytes made requests, and what is kept of items: pure, without a node."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virgo.errors import NodeLost, PoolFull, TooLarge, UnknownCommand, WrongToken
from virgo.limits import MEMCACHED_GET_BYTES_MAX, MEMCACHED_LINE_BYTES_MAX, MiB
from virgo.memory.keyspace import Entry, decode_entry, encode_entry
from virgo.memory.memcached import classic, meta
from virgo.memory.memcached.numbers import decoded, encoded, left_s, signed32, unsigned64, until_ms
from virgo.memory.memcached.orders import SAY, SET, WIDE
from virgo.memory.memcached.reader import MemcachedReader
from virgo.memory.memcached.replies import error_line
from virgo.memory.memcached.uses import Uses

_REQUESTS = [
    *(
        b"get a b\r\n",
        b"set a 1 0 3\r\nabc\r\n",
        b"set a 1 0 3 noreply\r\nab",
        b"ms b 2 T1\r\n\r\n\r\n",
        b"mg a v\r\n",
    ),
    *(
        b"\r\n",
        b"x\0y\r\n",
        b"cas a 0 0 1 5\r\nx\r\n",
        b"set big 0 0 2000\r\n" + b"x" * 2000 + b"\r\n",
        b"quit\r\n",
    ),
]


def reader() -> MemcachedReader:
    return MemcachedReader(MiB, 1024)


@given(st.lists(st.sampled_from(_REQUESTS), max_size=6), st.lists(st.integers(0, 4000)))
def test_what_is_read_does_not_depend_on_the_cuts(requests: list[bytes], cuts: list[int]) -> None:
    """However the bytes are cut into chunks, the requests are the same."""
    text = b"".join(requests)
    whole, pieces = reader(), reader()
    expected = whole.read(text)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    found = [request for low, high in itertools.pairwise(places) for request in pieces.read(text[low:high])]
    assert found == expected
    assert (pieces.open_bytes, pieces.fault) == (whole.open_bytes, whole.fault)


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_no_bytes_break_the_reader(chunks: list[bytes]) -> None:
    """Whatever comes is made requests, each with a command, or a fault."""
    each = reader()
    for chunk in chunks:
        for request in each.read(chunk):
            assert request
            assert all(isinstance(word, bytes) for word in request)


def test_a_long_line_is_given_up_and_a_long_get_is_not() -> None:
    """A line without end is a fault beyond 2 KiB, for gets of many keys beyond 8 MiB."""
    line = reader()
    line.read(b"set " + b"x" * MEMCACHED_LINE_BYTES_MAX)
    assert isinstance(line.fault, TooLarge)
    get = MemcachedReader(64 * MiB, 1024)
    keys = b"get " + b"k" * 100 + b" "
    get.read(keys)
    for _ in range(20):
        get.read((b"k" * 100 + b" ") * 1000)
    assert get.fault is None
    (request,) = get.read(b"\r\n")
    assert (request[0], len(request)) == (WIDE, 3 + 20_001)
    get.read(b"get ")
    for _ in range(9):
        get.read(b"k" * (MEMCACHED_GET_BYTES_MAX // 8))
    assert isinstance(get.fault, TooLarge)


def test_before_the_login_a_value_is_small() -> None:
    """A stranger's value may have as many bytes as a login needs."""
    each = MemcachedReader(1000, MiB)
    assert each.read(b"set a 0 0 5\r\nabcde\r\n")[0][0] == SET
    each.read(b"set a 0 0 1001\r\n")
    assert isinstance(each.fault, TooLarge)


@pytest.mark.parametrize(
    ("text", "unsigned", "signed"),
    [
        *(
            (b"0", 0, 0),
            (b"  12", 12, 12),
            (b"12 x", 12, 12),
            (b"+5", 5, 5),
            (b"x", None, None),
            (b"", None, None),
        ),
        *((b"5x", None, None), (b"-1", None, -1), (b"4294967295", 4294967295, -1), (b"7\0x", 7, 7)),
        *((b"18446744073709551615", 2**64 - 1, None), (b"18446744073709551616", None, None)),
        *((b"-18446744073709551615", 1, None), (b"9223372036854775807", 2**63 - 1, -1)),
    ],
)
def test_numbers_are_read_as_c_reads_them(text: bytes, unsigned: int | None, signed: int | None) -> None:
    """Blanks, signs, and what is too large, as strtoull and strtol have it."""
    assert (unsigned64(text), signed32(text)) == (unsigned, signed)


def test_times_are_relative_up_to_thirty_days() -> None:
    """0 is for ever, a negative time is over, a long one is of the calendar; what is left is rounded up."""
    now = 1_700_000_000_000
    days = 30 * 24 * 3600
    assert until_ms(0, now) == 0
    assert 0 < until_ms(-1, now) < now
    assert until_ms(days, now) == now + days * 1000
    assert until_ms(days + 1, now) == (days + 1) * 1000
    assert [left_s(now + left, now) for left in (-5, 0, 1, 1000, 1001)] == [0, 0, 1, 1, 2]


@given(st.binary(min_size=1, max_size=250))
def test_base64_goes_back_and_forth(key: bytes) -> None:
    """A key that was encoded is decoded; what is no base64 is not."""
    assert decoded(encoded(key)) == key
    assert decoded(encoded(key) + b"!") is None


def test_flags_keep_their_order_and_the_last_fault_counts() -> None:
    """Flags are answered in the order in which they came; a flag that is there twice is a fault."""
    found = meta.flags((b"v", b"T30", b"Oabc", b"F7"))
    assert (found.seen, found.seconds, found.mark, found.fault) == (b"vTOF", 30, 7, b"")
    assert meta.flags((b"v", b"v")).fault == b"CLIENT_ERROR duplicate flag\r\n"
    assert meta.flags((b"O" + b"x" * 32,)).fault == b"CLIENT_ERROR opaque token too long\r\n"
    assert classic.order(b"ma key J12x", 1024).request[0] == SAY


def test_uses_are_exact_for_those_that_are_kept() -> None:
    """Fetched and last used: exact for the last items, and the least it can be for those forgotten."""
    now = [100.0]
    uses = Uses(lambda: now[0], most=2)
    uses.note(b"a", 1, fetched=False)
    assert uses.look(b"a", 1) == (False, 0)
    now[0] = 103.0
    uses.note(b"a", 1, fetched=True)
    now[0] = 105.0
    assert uses.look(b"a", 1) == (True, 2)
    assert uses.look(b"a", 2) == (False, 5), "another version is another item"
    uses.carry(b"a", 1, 2)
    assert uses.look(b"a", 2) == (True, 2)
    uses.note(b"b", 1, fetched=True)
    now[0] = 106.0
    uses.note(b"c", 1, fetched=False)
    assert uses.look(b"a", 2) == (False, 3), "forgotten: used at 103 at the latest"
    assert uses.look(b"b", 1) == (True, 1)


@pytest.mark.parametrize("state", [0, 1, 7])
@pytest.mark.parametrize("expires_ms", [0, 5])
@pytest.mark.parametrize("mark", [0, 9])
def test_a_record_keeps_the_state(state: int, expires_ms: int, mark: int) -> None:
    """What memcached's protocol notes of an item is in its record; without it a record is as it was."""
    entry = Entry(b"value", expires_ms, mark=mark, version=77, state=state)
    record = encode_entry(entry, 77)
    assert decode_entry(record) == entry
    assert len(record) == 9 + 5 + 8 * bool(expires_ms) + 4 * bool(mark) + bool(state)


def test_errors_say_whose_fault_it_is() -> None:
    """What memcached has words for is said in them, the rest by code and hint, on one line."""
    assert error_line(UnknownCommand("x")) == b"ERROR\r\n"
    assert error_line(PoolFull("x")) == b"SERVER_ERROR out of memory storing object\r\n"
    assert error_line(WrongToken("x")) == b"CLIENT_ERROR authentication failure\r\n"
    assert error_line(NodeLost("node n2\nis lost")).startswith(
        b"SERVER_ERROR NODELOST node n2 is lost Hint: "
    )
    assert error_line(TooLarge("x")).startswith(b"CLIENT_ERROR TOOBIG x")
