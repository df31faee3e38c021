"""What travels with a request, and who is believed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from virgo import context as contexts
from virgo.clock import COUNTER_BITS, wall_ms
from virgo.context import NOBODY, Context, Identity
from virgo.errors import BadArgument, BadRequest, DeadlineExceeded, VirgoError
from virgo.limits import CLOCK_SKEW_MS_MAX

CHECK = settings(deadline=None, max_examples=100, phases=set(Phase) - {Phase.explain})
ALICE = Identity(name="token:alice", roles=frozenset({"read"}))
NODE = Identity(name="cert:n2", roles=frozenset({"admin"}), node=True)
ADMIN = Identity(name="token:main", roles=frozenset({"admin"}))


def test_a_context_arrives_with_what_is_left_of_its_deadline() -> None:
    """Over the wire id, cause, time and identity stay; the deadline comes as the time that is left."""
    sent = contexts.derive(timeout_s=5, identity=ALICE)
    got = contexts.decode(contexts.encode(sent), speaker=NODE)
    assert (got.id, got.cause, got.time, got.identity) == (sent.id, sent.cause, sent.time, ALICE)
    assert got.remaining_s() == pytest.approx(5, abs=0.5)
    assert contexts.decode(contexts.encode(Context(id="x")), speaker=NODE).deadline is None


@pytest.mark.parametrize("speaker", [ALICE, ADMIN, Identity(name="uid:5"), NOBODY])
def test_only_members_of_the_cloud_may_speak_for_others(speaker: Identity) -> None:
    """Whatever identity, roles or membership a stranger claims, its request runs as itself; an
    administrator's too."""
    for claim in (
        ADMIN,
        NODE,
        Identity(name=speaker.name, roles=frozenset({"exec", "admin"}), node=True),
        Identity(node=True),
    ):
        data = contexts.encode(Context(id="r1", identity=claim))
        assert contexts.decode(data, speaker=speaker).identity is speaker


def test_a_member_speaks_for_whom_it_names_or_for_itself() -> None:
    """A node's request on behalf of a user runs as that user, and its own as the node."""
    data = contexts.encode(Context(id="r1", identity=ALICE))
    assert contexts.decode(data, speaker=NODE).identity == ALICE
    assert contexts.decode(contexts.encode(Context(id="r1")), speaker=NODE).identity is NODE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"id":"\xff"}',
        b'{"id":5}',
        b'{"left_ms":"5"}',
        b'{"left_ms":1' + b"0" * 400 + b"}",
        b'{"left_ms":-5}',
        b'{"left_ms":1e400}',
        b'{"identity":{"roles":"admin"}}',
        b'{"identity":7}',
        b'{"time":1.5}',
        b"[" * 10_000,
    ],
)
def test_a_malformed_context_is_refused(data: bytes) -> None:
    """Bytes that are no context are BadRequest, whoever sends them."""
    for speaker in (ALICE, NODE):
        with pytest.raises(BadRequest):
            contexts.decode(data, speaker=speaker)


@CHECK
@given(
    st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.one_of(
                st.none(),
                st.booleans(),
                st.integers(),
                st.floats(allow_nan=False, allow_infinity=False),
                st.text(max_size=5),
            ),
            lambda inner: st.dictionaries(
                st.sampled_from(["id", "cause", "left_ms", "time", "identity", "name", "roles"]), inner
            ),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    """Any bytes are a context of the speaker's, or one of our errors."""
    with contextlib.suppress(VirgoError):
        assert contexts.decode(data, speaker=ALICE).identity is ALICE


def test_long_ids_are_cut_and_missing_ones_made() -> None:
    """Ids of another's making cannot fill a log; a request without one gets one."""
    got = contexts.decode(contexts.encode(Context(id="x" * 1000, cause="y" * 1000)), speaker=ALICE)
    assert len(got.id) == len(got.cause) == 80
    assert contexts.decode(b"{}", speaker=ALICE).id


def test_a_clock_far_ahead_is_refused() -> None:
    """A context from a machine whose clock is wrong is BadArgument, and does not drag ours along."""
    wrong = wall_ms() + CLOCK_SKEW_MS_MAX + 60_000 << COUNTER_BITS
    with pytest.raises(BadArgument, match="NTP"):
        contexts.decode(contexts.encode(Context(id="x", time=wrong)), speaker=NODE)
    assert contexts.clock.now() < wrong
    right = wall_ms() + 1000 << COUNTER_BITS
    contexts.decode(contexts.encode(Context(id="x", time=right)), speaker=NODE)
    assert contexts.clock.now() > right


def test_a_derived_request_is_caused_by_the_current_one_and_never_outlives_it() -> None:
    """Cause and identity are inherited; the deadline is the earlier of the two."""
    with contexts.using(contexts.derive(timeout_s=10, identity=ALICE)):
        parent = contexts.current()
        assert parent is not None
        for timeout_s, left_s in ((None, 10), (60, 10), (2, 2)):
            child = contexts.derive(timeout_s=timeout_s)
            assert (child.cause, child.identity) == (parent.id, ALICE)
            assert child.remaining_s() == pytest.approx(left_s, abs=0.5)
            assert child.time > parent.time
            assert child.id != parent.id
    assert contexts.current() is None
    first = contexts.derive()
    assert (first.cause, first.deadline, first.identity) == ("", None, NOBODY)


def test_the_current_context_is_each_tasks_own() -> None:
    """Concurrent tasks do not see each other's context, and what a task starts inherits its."""

    async def work(name: str) -> tuple[str, str]:
        with contexts.using(Context(id=name)):
            await asyncio.sleep(0)
            child = await asyncio.create_task(inner())
            current = contexts.current()
            return current.id if current else "", child

    async def inner() -> str:
        return contexts.derive().cause

    async def main() -> list[tuple[str, str]]:
        return await asyncio.gather(*(work(f"r{index}") for index in range(5)))

    assert asyncio.run(main()) == [(f"r{index}", f"r{index}") for index in range(5)]


def test_a_passed_deadline_is_said() -> None:
    """`check` raises once no time is left; the time left is never negative."""
    late = Context(id="r1", deadline=time.monotonic() - 5)
    assert late.remaining_s() == 0.0
    with pytest.raises(DeadlineExceeded, match=r"VIRGO_GET.*r1"):
        late.check("VIRGO_GET")
    Context(id="r2", deadline=time.monotonic() + 5).check("VIRGO_GET")
    Context(id="r3").check("VIRGO_GET")


def test_ids_are_unique_over_processes() -> None:
    """Two processes do not give the same request id."""
    code = "from virgo.context import new_id; print(*[new_id() for _ in range(100)])"
    ids = [contexts.new_id() for _ in range(100)]
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
        ids += done.stdout.split()
    assert len(set(ids)) == 300


def test_admin_has_every_role() -> None:
    """`may` knows that an administrator may do everything, and nobody nothing."""
    assert all(ADMIN.may(role) for role in contexts.ROLES)
    assert not any(NOBODY.may(role) for role in contexts.ROLES)
    assert ALICE.may("read")
    assert not ALICE.may("write")
