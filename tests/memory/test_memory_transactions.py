"""MULTI, EXEC and WATCH: beside redis-server with the same generated commands, and over nodes."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import start_cloud, stop_cloud
from memory.replies import plain
from virgo.limits import MEMORY_QUEUED_COMMANDS_MAX

if TYPE_CHECKING:
    from conftest import RunningCloud

_KEY = st.sampled_from([b"{t}1", b"{t}2", b"{t}3"])
_COMMAND = st.one_of(
    st.sampled_from(
        [(b"MULTI",), (b"EXEC",), (b"EXEC",), (b"DISCARD",), (b"UNWATCH",), (b"PING",), (b"NONE",)]
    ),
    st.tuples(st.sampled_from([b"GET", b"INCR", b"DEL", b"WATCH", b"GETDEL", b"TTL"]), _KEY),
    st.tuples(st.just(b"SET"), _KEY, st.sampled_from([b"1", b"text"])),
    st.tuples(st.sampled_from([b"EXPIRE", b"INCRBY"]), _KEY, st.sampled_from([b"100", b"-1", b"x"])),
    st.tuples(st.sampled_from([b"RENAME", b"COPY"]), _KEY, _KEY),
    st.sampled_from([(b"GET",), (b"SET", b"{t}1"), (b"MGET", b"{t}1", b"{t}2"), (b"set", b"{t}1", b"5")]),
)
_STEPS = st.lists(st.tuples(st.integers(0, 1), _COMMAND), min_size=1, max_size=25)


class Peers:
    """Two connections to a server, on which requests are answered one after the other."""

    def __init__(self, clients: list[redis.Redis]) -> None:
        self._clients = clients
        self._connections: list[Any] = []
        self.renew()

    def renew(self) -> None:
        """New connections, and no keys."""
        self.close()
        self._connections = [client.connection_pool.get_connection() for client in self._clients]
        self.ask(0, (b"DEL", b"{t}1", b"{t}2", b"{t}3"))

    def ask(self, which: int, command: tuple[bytes, ...]) -> Any:
        connection = self._connections[which]
        connection.send_command(*command)
        try:
            return plain(connection.read_response())
        except redis.RedisError as error:
            return plain(redis.ResponseError(str(error)))

    def close(self) -> None:
        for client, connection in zip(self._clients, self._connections, strict=False):
            connection.disconnect()
            client.connection_pool.release(connection)
        self._connections = []


@pytest.fixture
def nodes(cloud3: RunningCloud) -> Iterator[list[redis.Redis]]:
    """redis-py on each node's Unix socket."""
    made = [redis.Redis(unix_socket_path=cloud3.socket(name)) for name in cloud3.names]
    yield made
    for client in made:
        client.close()


@pytest.fixture(scope="module")
def fresh() -> Iterator[list[redis.Redis]]:
    """redis-py on each of three nodes that have no keys yet, so that they share the slots."""
    with tempfile.TemporaryDirectory(prefix="virgo-") as directory:
        home = Path(directory)
        try:
            cloud = start_cloud(home, 3)
            made = [redis.Redis(unix_socket_path=cloud.socket(name)) for name in cloud.names]
            yield made
            for client in made:
                client.close()
        finally:
            stop_cloud(home)


@settings(max_examples=150)
@given(_STEPS)
def test_transactions_answer_as_redis(
    peer: redis.Redis, cloud3: RunningCloud, steps: list[tuple[int, tuple[bytes, ...]]]
) -> None:
    """Two clients that queue, watch and run the same commands get the same answers, also from two nodes."""
    clients = [redis.Redis(unix_socket_path=cloud3.socket(name)) for name in cloud3.names[:2]]
    ours, theirs = Peers(clients), Peers([peer, peer])
    try:
        for which, command in steps:
            answers = ours.ask(which, command), theirs.ask(which, command)
            assert answers[0] == answers[1], (which, command, *answers)
    finally:
        ours.close()
        theirs.close()
        for client in clients:
            client.close()


def apart(nodes: list[redis.Redis]) -> tuple[bytes, bytes]:
    """A key on n1 and one on n2: a node takes the slots of the keys that are first set through it.

    And some more slots, so that now and then another key has to be tried.
    """
    nodes[0].flushdb()
    found = []
    for index in (0, 1):
        for number in range(50):
            key = b"%d on n%d" % (number, index + 1)
            nodes[index].set(key, b"0")
            if nodes[index].execute_command("MEMORY.KEYS.COUNT"):
                found.append(key)
                break
            nodes[index].delete(key)
    first, second = found
    return first, second


def test_keys_on_two_nodes_are_refused_and_nothing_is_done(fresh: list[redis.Redis]) -> None:
    """What cannot be done as one is CROSSNODE, in EXEC, MSETNX and WATCH, and both keys are as before."""
    nodes = fresh
    first, second = apart(nodes)
    pipeline = nodes[0].pipeline(transaction=True).incr(first).incr(second)
    with pytest.raises(redis.ResponseError, match="CROSSNODE"):
        pipeline.execute()
    with pytest.raises(redis.ResponseError, match="CROSSNODE"):
        nodes[2].pipeline().watch(first, second)
    with pytest.raises(redis.ResponseError, match="CROSSNODE"):
        nodes[1].msetnx({first: b"9", second: b"9"})
    assert nodes[2].mget(first, second) == [b"0", b"0"]


def test_rename_and_copy_over_two_nodes_lose_nothing(fresh: list[redis.Redis]) -> None:
    """A key that gets another node by its new name keeps value and time, and the old name is gone."""
    nodes = fresh
    first, second = apart(nodes)
    nodes[2].set(first, b"value", ex=1000)
    assert nodes[2].rename(first, second)
    assert nodes[0].get(second) == b"value" and 990 < nodes[0].ttl(second) <= 1000
    assert nodes[1].get(first) is None
    with pytest.raises(redis.ResponseError, match="BADARG"):
        nodes[0].rename(first, second)
    assert nodes[0].copy(second, first) and not nodes[0].copy(second, first)
    assert not nodes[1].renamenx(first, second)
    assert nodes[1].mget(first, second) == [b"value", b"value"]


def test_counters_under_optimistic_locks_are_exact(nodes: list[redis.Redis]) -> None:
    """Clients of three nodes that read, compute and write under WATCH lose no increment."""

    def count(client: redis.Redis) -> None:
        for _ in range(30):
            client.transaction(add, "{sum}")

    def add(pipe: Any) -> None:
        value = int(pipe.get("{sum}") or 0)
        pipe.multi()
        pipe.set("{sum}", value + 1)

    nodes[0].delete("{sum}")
    threads = [threading.Thread(target=count, args=(client,)) for client in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nodes[0].get("{sum}") == b"90"


def test_a_broken_connection_runs_nothing(cloud3: RunningCloud, nodes: list[redis.Redis]) -> None:
    """Commands that were queued on a connection that ends are as if never sent."""
    connection = nodes[0].connection_pool.get_connection()
    for command in ((b"SET", b"{gone}", b"0"), (b"MULTI",), (b"SET", b"{gone}", b"1")):
        connection.send_command(*command)
        connection.read_response()
    connection.disconnect()
    assert nodes[1].get("{gone}") == b"0"


def test_a_queue_is_bounded_and_may_hold_only_keys(nodes: list[redis.Redis]) -> None:
    """Too many commands, or such as are not on keys, are refused, and EXEC then runs none."""
    connection = nodes[0].connection_pool.get_connection()

    def ask(*command: bytes) -> Any:
        connection.send_command(*command)
        return connection.read_response()

    ask(b"MULTI")
    with pytest.raises(redis.ResponseError, match="BADARG"):
        ask(b"VIRGO_MALLOC", b"100")
    with pytest.raises(redis.ResponseError, match="queued"):
        ask(b"EXEC")
    ask(b"MULTI")
    packed = connection.pack_command(b"SET", b"{many}", b"1")
    connection.send_packed_command(list(packed) * (MEMORY_QUEUED_COMMANDS_MAX // 1000))
    for _ in range(MEMORY_QUEUED_COMMANDS_MAX // 1000):
        assert connection.read_response() == b"QUEUED"
    assert ask(b"DISCARD") == b"OK" and ask(b"EXISTS", b"{many}") == 0
    connection.disconnect()
