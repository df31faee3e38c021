"""Pipelines of key commands, whose runs of GET and SET are handled together: as redis-server answers them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.replies import plain
from virgo.limits import MEMORY_KEY_BYTES_MAX, RUN_REQUESTS_MAX

if TYPE_CHECKING:
    from conftest import RunningCloud

_KEY = st.sampled_from([b"p1", b"p2", b"p3", b"{p1}4", b"", b"p5"])
_VALUE = st.sampled_from([b"", b"1", b"x" * 5000, b"\r\n\0"])
_STEP = st.one_of(
    st.tuples(st.just(b"GET"), _KEY),
    st.tuples(st.just(b"SET"), _KEY, _VALUE),
    st.tuples(st.sampled_from([b"get", b"DEL", b"INCR"]), _KEY),
    st.tuples(st.just(b"SET"), _KEY, _VALUE, st.sampled_from([b"NX", b"XX"])),
    st.tuples(st.just(b"SET"), _KEY, _VALUE, st.just(b"EX"), st.just(b"1000")),
    st.sampled_from([(b"GET",), (b"SET", b"p1"), (b"PING",)]),
)
_PIPELINE = st.lists(st.tuples(_STEP, st.integers(1, 4)), min_size=1, max_size=30).map(
    lambda steps: [step for step, times in steps for _ in range(times)]
)


def answers(client: redis.Redis, commands: list[tuple[bytes, ...]]) -> list[Any]:
    """The replies to a pipeline that is sent at once."""
    connection = client.connection_pool.get_connection()
    try:
        connection.send_packed_command(connection.pack_commands(commands))
        found = []
        for _ in commands:
            try:
                found.append(plain(connection.read_response()))
            except redis.ResponseError as error:
                found.append(plain(error))
        return found
    finally:
        client.connection_pool.release(connection)


@settings(max_examples=200)
@given(_PIPELINE)
def test_pipelines_answer_as_redis(
    peer: redis.Redis, cloud3: RunningCloud, commands: list[tuple[bytes, ...]]
) -> None:
    """Whatever is sent at once, through whichever node, each answer is redis-server's, in order."""
    peer.flushall()
    clients = [redis.Redis(unix_socket_path=cloud3.socket(name)) for name in cloud3.names[:2]]
    try:
        clients[1].set(b"p2", b"")  # some of the keys may lie on n2
        for client in clients:
            client.delete(b"p1", b"p2", b"p3", b"{p1}4", b"", b"p5")
            peer.flushall()
            assert answers(client, commands) == answers(peer, commands)
    finally:
        for client in clients:
            client.close()


def test_long_runs_and_what_breaks_them(cloud3: RunningCloud) -> None:
    """Runs longer than are handled at once, with a key in the middle that is too long, keep their order."""
    client = redis.Redis(unix_socket_path=cloud3.socket("n1"), protocol=3)
    count = 5 * RUN_REQUESTS_MAX
    sets: list[tuple[bytes, ...]] = [(b"SET", b"run%d" % n, b"%d" % n) for n in range(count)]
    sets[count // 2] = (b"SET", b"k" * (MEMORY_KEY_BYTES_MAX + 1), b"x")
    found = answers(client, sets)
    assert found[count // 2] is plain(redis.ResponseError("x"))
    assert found[: count // 2] + found[count // 2 + 1 :] == [b"OK"] * (count - 1)
    gets = answers(client, [(b"GET", b"run%d" % n) for n in range(count)])
    assert gets == [None if n == count // 2 else b"%d" % n for n in range(count)]
    client.delete(*[b"run%d" % n for n in range(count)])
    client.close()
