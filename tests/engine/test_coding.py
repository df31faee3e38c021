"""Names as subjects, and entries as frames: coding that loses nothing and mixes nothing up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virgo.engine import frames
from virgo.engine.naming import decode, encode, log_stream
from virgo.errors import BadArgument, InternalFault, TooLarge

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(names)
def test_names_come_back(name: str) -> None:
    """Encoding a name gives one subject token, and decoding it the name."""
    token = encode(name)
    assert not set(token) & set(" .*>/\\\t\r\n\0")
    assert token.isascii()
    assert decode(token) == name


@given(names, names)
def test_different_logs_have_different_streams(one: str, two: str) -> None:
    """No two logs share a stream, short or long, and no stream's name is too long for the server."""
    assert (log_stream(one) == log_stream(two)) == (one == two)
    assert (log_stream("long" * 40 + one) == log_stream("long" * 40 + two)) == (one == two)
    assert len(log_stream(one * 4)) <= 255


@pytest.mark.parametrize("name", ["", "x" * 513, "é" * 257, "\udc80"])
def test_impossible_names_are_refused(name: str) -> None:
    """A name that is empty, too long or no UTF-8 is a BadArgument."""
    with pytest.raises(BadArgument):
        encode(name)


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=50))
def test_entries_come_back(entries: list[bytes]) -> None:
    """What is packed is unpacked, in order, with rising sequences."""
    (frame,) = frames.pack(entries)
    assert frames.count(frame) == len(entries)
    found = frames.unpack(7, frame)
    assert [entry.data for entry in found] == entries
    assert [frames.split(entry.sequence) for entry in found] == [(7, index) for index in range(len(entries))]


@given(st.lists(st.integers(0, frames.LOG_ENTRY_BYTES_MAX), min_size=1, max_size=8))
def test_frames_fit_a_message(sizes: list[int]) -> None:
    """Entries of any size are packed into frames that fit, all of them and in order."""
    entries = [bytes(size) for size in sizes]
    packed = frames.pack(entries)
    assert all(len(frame) <= frames.FRAME_BYTES_MAX for frame in packed)
    sequences = [entry for number, frame in enumerate(packed, 1) for entry in frames.unpack(number, frame)]
    assert [len(entry.data) for entry in sequences] == sizes
    assert [entry.sequence for entry in sequences] == sorted(entry.sequence for entry in sequences)


@given(st.binary(max_size=200))
def test_foreign_bytes_are_no_frame(data: bytes) -> None:
    """Bytes that are no frame, or a cut one, are an InternalFault, never a wrong entry."""
    with pytest.raises(InternalFault):
        frames.unpack(1, b"x" + data)
    (frame,) = frames.pack([b"some", data])
    for cut in (1, 5, len(frame) - 1):
        with pytest.raises(InternalFault):
            frames.unpack(1, frame[:cut])


def test_bounds_of_an_append() -> None:
    """Too many entries, too long ones and too many bytes are refused before anything is sent."""
    with pytest.raises(BadArgument):
        frames.check([])
    with pytest.raises(TooLarge):
        frames.check([b""] * 1001)
    with pytest.raises(TooLarge):
        frames.check([bytes(frames.LOG_ENTRY_BYTES_MAX + 1)])
    with pytest.raises(TooLarge):
        frames.check([bytes(frames.LOG_ENTRY_BYTES_MAX)] * 80)
    assert frames.check([b"ab", b""]) == 2
