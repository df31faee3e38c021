"""The pure decisions of the memory pool."""

from __future__ import annotations

import random
from collections import Counter
from fnmatch import fnmatchcase
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virgo.errors import BadArgument, PoolFull, TooLarge
from virgo.limits import (
    MEMORY_CHUNK_BYTES,
    MEMORY_REGION_BYTES_MAX,
    MEMORY_SLOTS,
    MEMORY_SLOTS_AHEAD,
    NODES_MAX,
    GiB,
    MiB,
)
from virgo.memory import core, keyspace
from virgo.memory.core import Region
from virgo.memory.keyspace import Entry

CHUNK = MEMORY_CHUNK_BYTES


@given(
    st.builds(
        Region,
        size=st.integers(1, MEMORY_REGION_BYTES_MAX),
        spread=st.booleans(),
        version=st.integers(0, 2**64 - 1),
        length=st.integers(0, MEMORY_REGION_BYTES_MAX),
        plan=st.lists(st.integers(1, 32767), max_size=256).map(tuple),
    )
)
def test_a_region_survives_its_record(region: Region) -> None:
    """Encoding and decoding a region changes nothing."""
    assert Region.decode(region.encode()) == region


@pytest.mark.parametrize("size", [0, -1, -(2**63)])
def test_no_size_is_refused(size: int) -> None:
    """A region has at least one byte."""
    with pytest.raises(BadArgument):
        core.check_size(size)


def test_the_largest_region_is_bounded() -> None:
    """The limit itself is allowed, one byte more is not."""
    core.check_size(MEMORY_REGION_BYTES_MAX)
    with pytest.raises(TooLarge):
        core.check_size(MEMORY_REGION_BYTES_MAX + 1)


@given(st.integers(1, MEMORY_REGION_BYTES_MAX))
def test_chunks_cover_a_value_exactly(length: int) -> None:
    """The chunks add up to the value, and only the last is short."""
    sizes = [core.chunk_bytes(length, index) for index in range(core.chunk_count(length))]
    assert sum(sizes) == length
    assert all(size == CHUNK for size in sizes[:-1])
    assert 0 < sizes[-1] <= CHUNK


@given(
    st.lists(st.integers(1, CHUNK), min_size=1, max_size=60),
    st.dictionaries(st.integers(1, 9), st.integers(0, 80 * MiB), min_size=1),
)
def test_placing_overfills_no_node(sizes: list[int], rooms: dict[int, int]) -> None:
    """Each chunk gets a node, and none gets more than its room; else the pool is said to be full."""
    try:
        plan = core.place_chunks(sizes, rooms)
    except PoolFull:
        assert sum(room // CHUNK for room in rooms.values()) < len(sizes)
        return
    used: Counter[int] = Counter()
    for size, number in zip(sizes, plan, strict=True):
        used[number] += size
    assert len(plan) == len(sizes)
    assert all(used[number] <= rooms[number] for number in used)


def test_chunks_go_round_by_weight() -> None:
    """Nodes share in proportion to their room, in turns rather than one after the other."""
    plan = core.place_chunks([CHUNK] * 40, {1: 4 * GiB, 2: 2 * GiB, 3: 2 * GiB})
    assert Counter(plan) == {1: 20, 2: 10, 3: 10}
    assert all(len(set(plan[index : index + 4])) == 3 for index in range(0, 40, 4))


def test_only_the_chunks_of_bad_nodes_move() -> None:
    """A new plan keeps what can stay, and what has to."""
    region = Region(4 * CHUNK, spread=True, plan=(1, 2, 3, 2))
    every, rooms = range(4), {1: CHUNK, 2: GiB, 3: CHUNK}
    assert core.replace_chunks(region, {2}, rooms, every) == (1, 1, 3, 3)
    assert core.replace_chunks(region, {2}, rooms, {0, 3}) == (1, 2, 3, 1)
    with pytest.raises(PoolFull):
        core.replace_chunks(region, {2}, {1: CHUNK, 2: GiB}, every)


def test_a_regions_record_is_read_as_it_was_written() -> None:
    """Of every kind, with the versions of its chunks, or its note."""
    plan = (1, 2, 3, 2)
    spread = Region(4 * CHUNK, spread=True, version=5, length=3 * CHUNK, plan=plan)
    for region in (
        Region(7),
        spread,
        core.written(spread, 6, CHUNK, 1),
        core.written(Region(4 * CHUNK, spread=True, plan=plan), 9, 3 * CHUNK, 5),
        Region(9, shared=True),
        Region(9, shared=True, note=b'{"shape": []}'),
    ):
        assert Region.decode(region.encode()) == region
        assert Region.is_shared(region.encode()) == region.shared
    mixed = core.written(spread, 6, CHUNK - 1, 2)
    assert mixed.versions == (6, 6, 5) and mixed.length == 3 * CHUNK
    assert core.written(mixed, 7, 0, 3 * CHUNK).versions == (), "all of one version again"
    assert core.written(Region(4 * CHUNK, spread=True, plan=plan), 9, 3 * CHUNK, 5).versions == (0, 0, 0, 9)


def test_the_local_node_comes_first() -> None:
    """While there is room here, nobody else is chosen."""
    assert core.choose_node(10, 1, {1: 10, 2: GiB}, random.randrange) == 1


def test_the_better_of_two_is_chosen() -> None:
    """Of two drawn nodes the one with more room; full ones are not drawn."""
    draws = iter([0, 2])
    rooms = {1: 0, 2: 50, 3: 5, 4: 60, 5: 70}
    assert core.choose_node(10, 1, rooms, lambda below: next(draws)) == 5
    with pytest.raises(PoolFull):
        core.choose_node(100, 1, rooms, random.randrange)


def test_slots_of_keys_kept_twice_get_a_mirror() -> None:
    """With the owner, and slots ahead of the same kind only."""
    table = keyspace.decode_table(b"")
    found = keyspace.assign_slots(
        table, {MEMORY_SLOTS + 5}, local=1, rooms={1: GiB, 2: GiB}, draw=random.randrange
    )
    pairs = keyspace.pairs(found)
    assert pairs[5] == (1, 2)
    assert pairs.count((1, 2)) == 1 + MEMORY_SLOTS_AHEAD
    assert not any(found[:MEMORY_SLOTS])
    alone = keyspace.assign_slots(table, {MEMORY_SLOTS + 5}, local=1, rooms={1: GiB}, draw=random.randrange)
    assert keyspace.pairs(alone)[5] == (1, 0)
    assert keyspace.pairs(keyspace.with_pairs(found, {5: keyspace.Pair(2, 0)}))[5] == (2, 0)


def test_slots_are_taken_ahead_and_never_moved() -> None:
    """One change assigns what is wanted and some more; what was assigned stays."""
    table = keyspace.decode_table(b"")
    table[7] = 9
    found = keyspace.assign_slots(table, {7, 8}, local=1, rooms={1: GiB, 2: GiB}, draw=random.randrange)
    assert (found[7], found[8]) == (9, 1)
    assert found.count(1) == 1 + MEMORY_SLOTS_AHEAD
    assert found[:MEMORY_SLOTS].count(0) == MEMORY_SLOTS - MEMORY_SLOTS_AHEAD - 2
    again = keyspace.assign_slots(found, {7, 8}, local=2, rooms={2: GiB}, draw=random.randrange)
    assert again == found


def test_a_full_node_gives_slots_to_others_and_takes_none_ahead() -> None:
    """Without room here only the wanted slots are assigned, elsewhere."""
    found = keyspace.assign_slots(
        keyspace.decode_table(b""), {1, 2}, local=1, rooms={1: 0, 2: GiB}, draw=random.randrange
    )
    assert {number for number in found if number} == {2}
    assert found.count(2) == 2


def test_the_table_survives_its_register() -> None:
    """Encoding and decoding the table changes nothing, up to the largest number of a node."""
    table = [random.randrange(NODES_MAX + 1) for _ in range(keyspace.TABLE_LENGTH)]
    assert keyspace.decode_table(keyspace.encode_table(table)) == table


_ENTRIES = st.builds(
    lambda value, at, sliding, mark: Entry(value, at, sliding if at else 0, mark),
    st.binary(max_size=100),
    st.integers(0, 2**63),
    st.integers(0, 2**40),
    st.integers(0, 2**32 - 1),
)


@given(_ENTRIES, st.integers(0, 2**64 - 1))
def test_an_entry_survives_its_record(entry: Entry, version: int) -> None:
    """Value, times and mark come back with the version that they were kept as; 0 is none."""
    record = keyspace.encode_entry(entry, version)
    assert keyspace.decode_entry(record) == entry._replace(version=version)
    if not (entry.expires_ms or entry.mark):
        assert record == keyspace.encode_plain(entry.value, version)


def test_keys_with_the_same_braces_share_a_slot() -> None:
    """The part in the first braces decides, as in Redis Cluster; empty or open braces are just characters."""
    slot = keyspace.slot_of
    assert slot(b"{user:7}:name") == slot(b"{user:7}:age") == slot(b"x{user:7}") == slot(b"user:7")
    assert slot(b"{a}{b}") == slot(b"a")
    for plain in (b"{}a", b"{a", b"a}b{"):
        assert slot(plain) == crc32(plain) % MEMORY_SLOTS


_PATTERN = st.lists(st.sampled_from(["*", "?", "a", "b", "[ab]", "[!a]", "."]), max_size=6).map("".join)


@given(_PATTERN, st.text("ab.", max_size=6))
def test_patterns_match_as_shells_do(pattern: str, text: str) -> None:
    """`*`, `?` and sets mean what they mean in fnmatch, whose negation is spelt differently."""
    ours = keyspace.glob(pattern.replace("!", "^").encode())
    assert bool(ours(text.encode())) == fnmatchcase(text, pattern)


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        (b"h\\*llo", b"h*llo", True),
        (b"h\\*llo", b"hello", False),
        (b"a[", b"a[", True),
        (b"[a-c]x", b"bx", True),
        (b"[a-c]x", b"dx", False),
        (b"*\n*", b"a\nb", True),
        (b"[^^]", b"^", False),
        (b"a||b", b"a||b", True),
        (b"\xff*", b"\xff\x00", True),
    ],
)
def test_odd_patterns(pattern: bytes, text: bytes, matches: bool) -> None:
    """Literals, open brackets, ranges, line ends and bytes that are no text."""
    assert bool(keyspace.glob(pattern)(text)) is matches


def test_half_of_the_machine_is_shared_by_its_nodes() -> None:
    """Without configuration a node takes its share of half the memory, within bounds."""
    assert core.capacity_bytes(0, 24 * GiB, 3) == 4 * GiB
    assert core.capacity_bytes(0, 1 * MiB, 1) == 16 * MiB
    assert core.capacity_bytes(100 * MiB, 24 * GiB, 3) == 100 * MiB
