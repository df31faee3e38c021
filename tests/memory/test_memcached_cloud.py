"""memcached's protocol over a cloud: keys on any node, other protocols, who may come, what is refused."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from conftest import RunningCloud, start_cloud, stop_cloud
from memory.lines import Talk
from virgo import config as configuration
from virgo.config import SecurityConfig
from virgo.errors import BadConfig, PortTaken
from virgo.memory.keyspace import slot_of
from virgo.memory.memcached.place import PORT, place
from virgo.node.transport import server_tls
from virgo.wire.tls import client_context

_LOOPBACK = {
    "VIRGO_MEMORY_MEMCACHED": f"127.0.0.1:{PORT}",
    "VIRGO_MEMORY_MEMCACHED_ROLES": '["read", "write"]',
}


def unix(home: Path) -> dict[str, str]:
    """Configured to listen on a Unix socket per node."""
    return {"VIRGO_MEMORY_MEMCACHED": f"unix:{home}/mc-{{node}}"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCloud]:
    """Two nodes."""
    home = tmp_path_factory.mktemp("mc2")
    try:
        large = {"VIRGO_MEMORY_MEMCACHED_ITEM_BYTES": str(64 << 20)}
        yield start_cloud(home, 2, environment={**unix(home), **large})
    finally:
        stop_cloud(home)


@pytest.fixture
def talks(pair: RunningCloud) -> Iterator[tuple[Talk, Talk]]:
    """A connection to each node."""
    found = (Talk(pair.home / "mc-n1"), Talk(pair.home / "mc-n2"))
    yield found
    for talk in found:
        talk.close()


def spread(talks: tuple[Talk, Talk], count: int) -> list[bytes]:
    """Keys of that many slots, each first set by the node to which it is given."""
    keys = [b"s%d" % number for number in range(count)]
    for number, key in enumerate(keys):
        assert talks[number % 2].ask(b"set %b 0 0 1\r\n1\r\n" % key) == b"STORED\r\n"
    return keys


def owned(cloud: RunningCloud, key: bytes) -> int:
    """The number of the node that has the key."""
    with redis.Redis(unix_socket_path=cloud.socket("n1")) as client:
        client.exists(key)  # so that this node knows by now
        table = client.execute_command("MEMORY.SLOTS")
    return int.from_bytes(table[2 * slot_of(key) : 2 * slot_of(key) + 2], "little")


_SCRIPT = (
    (b"set @ 5 100 2\r\n10\r\n", b"STORED\r\n"),
    (b"incr @ 5\r\ndecr @ 1\r\n", b"15\r\n14\r\n"),
    (b"append @ 0 0 1\r\n0\r\nget @\r\n", b"STORED\r\nVALUE @ 5 3\r\n140\r\nEND\r\n"),
    (b"add @ 0 0 1\r\nx\r\ntouch @ 50\r\n", b"NOT_STORED\r\nTOUCHED\r\n"),
    (b"mg @ v f t k O1\r\n", b"VA 3 f5 t50 k@ O1\r\n140\r\n"),
    (b"ma @ MD D40 v\r\nms @ 1 MP\r\n1\r\nmd @ I\r\n", b"VA 3\r\n100\r\nHD\r\nHD\r\n"),
    (b"mg @ v\r\nmg @ v\r\n", b"VA 4 X W\r\n1100\r\nVA 4 Z X\r\n1100\r\n"),
    (b"gat 0 @\r\n", b"VALUE @ 5 4\r\n1100\r\nEND\r\n"),
    (b"delete @ noreply\r\ndelete @\r\n", b"NOT_FOUND\r\n"),
    (b"mg @ N10\r\nme @\r\nmd @ q\r\nmg @\r\n", b"HD W\r\nME @ exp=10 la=0 cas=... EN\r\n"),
)


def test_every_command_reaches_a_key_of_another_node(pair: RunningCloud, talks: tuple[Talk, Talk]) -> None:
    """What is asked of a node that has not got the key is answered as by the one that has."""
    keys = spread(talks, 8)
    assert {owned(pair, key) for key in keys} == {1, 2}
    for key in keys:
        for talk in talks:
            answers = talk.ask(*(request.replace(b"@", key) for request, _ in _SCRIPT))
            answers = re.sub(rb"cas=.*?\r\n", b"cas=... ", answers)
            assert answers == b"".join(answer for _, answer in _SCRIPT).replace(b"@", key)


def test_a_get_of_many_keys_keeps_their_order(talks: tuple[Talk, Talk]) -> None:
    """Values of several nodes come in the order in which they were asked for."""
    keys = spread(talks, 10)
    wanted = b"".join(b"VALUE %b 0 1\r\n1\r\n" % key for key in keys) + b"END\r\n"
    for talk in talks:
        assert talk.ask(b"get %b nothing\r\n" % b" ".join(keys)) == wanted


def test_a_cas_unique_is_good_on_every_node(talks: tuple[Talk, Talk]) -> None:
    """What one node gave, another compares with; a change of the time alone leaves it as it is."""
    key = spread(talks, 2)[1]
    cas = talks[0].cas(key)
    assert talks[1].ask(b"touch %b 100\r\n" % key) == b"TOUCHED\r\n"
    assert talks[1].cas(key) == cas
    assert talks[1].ask(b"cas %b 0 0 1 %d\r\n2\r\n" % (key, cas)) == b"STORED\r\n"
    assert talks[0].ask(b"cas %b 0 0 1 %d\r\n3\r\n" % (key, cas)) == b"EXISTS\r\n"


def test_listings_are_of_the_whole_cloud(talks: tuple[Talk, Talk]) -> None:
    """`lru_crawler metadump` and `stats cachedump` name the keys of all nodes, and flush_all forgets them."""
    keys = spread(talks, 6)
    dumped = talks[0].ask(b"lru_crawler metadump all\r\n")
    listed = talks[1].ask(b"stats cachedump 1 1000\r\n")
    for key in keys:
        assert b"key=%b exp=-1 " % key in dumped
        assert b"ITEM %b [1 b; 0 s]\r\n" % key in listed
    assert talks[0].ask(b"stats cachedump 1 2\r\n").count(b"ITEM") == 2
    assert talks[1].ask(b"flush_all\r\n", b"get %b\r\n" % b" ".join(keys)) == b"OK\r\nEND\r\n"


# --- beside the other protocols -----------------------------------------------------------------


def test_all_protocols_see_the_same_keys(pair: RunningCloud, talks: tuple[Talk, Talk]) -> None:
    """A value set by one is read by all; what changes it keeps its flags, what replaces it does not."""
    with redis.Redis(unix_socket_path=pair.socket("n2")) as client, pair.connect() as cloud:
        talks[0].ask(b"set both 7 100 2\r\n41\r\n")
        assert client.get("both") == b"41" == cloud.memory[b"both"]
        assert client.incr("both") == 42
        assert 90 < client.ttl("both") <= 100
        assert talks[1].ask(b"get both\r\n") == b"VALUE both 7 2\r\n42\r\nEND\r\n"
        client.persist("both")
        assert talks[1].ask(b"mg both f t\r\n") == b"HD f7 t-1\r\n"
        client.rename("both", "other")
        assert talks[0].ask(b"get both other\r\n") == b"VALUE other 7 2\r\n42\r\nEND\r\n"
        client.set("other", "new")
        assert talks[0].ask(b"get other\r\n") == b"VALUE other 0 3\r\nnew\r\nEND\r\n"
        cloud.memory[b"other"] = b"newer"
        assert talks[0].ask(b"get other\r\n") == b"VALUE other 0 5\r\nnewer\r\nEND\r\n"


def test_a_stale_item_stays_so_on_its_way_to_another_node(
    pair: RunningCloud, talks: tuple[Talk, Talk]
) -> None:
    """That an item is stale goes with it when it is renamed, is read past by others, and ends with a set."""
    keys = spread(talks, 4)
    here, there = (next(key for key in keys if owned(pair, key) == number) for number in (1, 2))
    talks[0].ask(b"set %b 3 0 3\r\nold\r\nmd %b I\r\n" % (here, here))
    with redis.Redis(unix_socket_path=pair.socket("n2")) as client:
        client.rename(here, there)
        assert client.get(there) == b"old"
        assert talks[1].ask(b"mg %b v f\r\n" % there) == b"VA 3 f3 X W\r\nold\r\n"
        client.set(there, "new", keepttl=True)
    assert talks[1].ask(b"mg %b v f\r\n" % there) == b"VA 3 f0\r\nnew\r\n"


def test_a_time_that_slides_does_so_for_memcached_too(pair: RunningCloud, talks: tuple[Talk, Talk]) -> None:
    """Each get by this protocol lets a sliding key live on."""
    with pair.connect() as cloud:
        cloud.memory.set(b"sliding", b"1", ttl_s=0.8, sliding=True)
        for _ in range(4):
            time.sleep(0.4)
            assert talks[0].ask(b"get sliding\r\n") == b"VALUE sliding 0 1\r\n1\r\nEND\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        *("STORE k 0 set x 0 0 v", "STORE k 0 set 4294967296 0 0 v", "STORE k 0 set 0 2147483648 0 v"),
        *(
            "MG k 0 v v",
            "MG k 0 {}",
            "MS k 0 v T",
            "MA k 0 Dx",
            "GET 0 x k",
            "TOUCH k 0 {}",
            "DELTA k 0 + -1",
        ),
        "PAGE -1 1 keys",
    ],
)
def test_what_nodes_ask_each_other_is_checked_too(pair: RunningCloud, request_: str) -> None:
    """The commands between nodes take what a node sends; anything else is BADARG, and changes nothing."""
    with redis.Redis(unix_socket_path=pair.socket("n1")) as client:
        client.execute_command("MEMORY.MC.STORE", "k", "0", "set", "0", "0", "0", "5")
        words = ["" if word == "{}" else word for word in request_.split()]
        with pytest.raises(redis.ResponseError, match="BADARG"):
            client.execute_command(f"MEMORY.MC.{words[0]}", *words[1:])
        assert client.execute_command("MEMORY.MC.GET", "0", "", "k") == [b"VALUE k 0 1\r\n5\r\n"]


# --- losses ---------------------------------------------------------------------------------------


def test_a_lost_node_is_an_error_and_not_a_miss(
    make_cloud: Callable[..., RunningCloud], tmp_path: Path
) -> None:
    """Keys of a killed node are SERVER_ERROR with its name, others go on, also those that are kept twice."""
    cloud = make_cloud(2, environment=unix(tmp_path))
    talks = Talk(tmp_path / "mc-n1"), Talk(tmp_path / "mc-n2")
    keys = spread(talks, 6)
    lost, kept = (next(key for key in keys if owned(cloud, key) == number) for number in (2, 1))
    twice = [b"{*2}k%d" % number for number in range(6)]
    for number, key in enumerate(twice):
        assert (
            talks[number % 2]
            .ask(b"set %b 3 0 1\r\n2\r\ntouch %b 100\r\n" % (key, key))
            .endswith(b"TOUCHED\r\n")
        )
    os.kill(cloud.node("n2")["pid"], signal.SIGSTOP)
    os.kill(cloud.node("n2")["pid"], signal.SIGKILL)
    began = time.monotonic()
    # What else would end the answers is a key too, and may be lost with the node.
    talks[0].send(b"get %b\r\nset %b 0 0 1 noreply\r\n2\r\nget %b\r\n" % (lost, lost, kept))
    answers = talks[0].until(b"END\r\n")
    assert time.monotonic() - began < 15
    first, rest = answers.split(b"\r\n", 1)
    assert first.startswith(b"SERVER_ERROR NODELOST")
    assert b"n2" in first
    assert rest == b"VALUE %b 0 1\r\n1\r\nEND\r\n" % kept
    wanted = b"".join(b"VALUE %b 3 1\r\n2\r\n" % key for key in twice) + b"END\r\n"
    talks[0].send(b"get %b\r\n" % b" ".join(twice))
    assert talks[0].until(b"END\r\n") == wanted
    for talk in talks:
        talk.close()


def test_a_full_pool_is_said_and_loses_nothing(
    make_cloud: Callable[..., RunningCloud], tmp_path: Path
) -> None:
    """What finds no room is SERVER_ERROR: unlike in a cache nothing has to go for it; a delete helps."""
    cloud = make_cloud(1, environment={**unix(tmp_path), "VIRGO_MEMORY_CAPACITY_BYTES": str(16 << 20)})
    talk = Talk(tmp_path / "mc-n1")
    value = b"x" * (1 << 19)
    full = b"SERVER_ERROR out of memory storing object\r\n"
    answers = [talk.ask(b"set {f}%d 0 0 %d\r\n%b\r\n" % (number, len(value), value)) for number in range(40)]
    assert answers.count(b"STORED\r\n") + answers.count(full) == 40
    assert 25 < answers.count(b"STORED\r\n") < 33
    for number, answer in enumerate(answers):
        assert talk.ask(b"mg {f}%d\r\n" % number) == (b"EN\r\n" if answer == full else b"HD\r\n")
    assert talk.ask(b"ms {f}full %d q\r\n%b\r\n" % (len(value), value)) == full
    assert talk.ask(b"get {f}0\r\n").startswith(b"VALUE {f}0 0 524288\r\n")
    assert talk.ask(b"delete {f}0\r\nset {f}small 0 0 1\r\n1\r\n") == b"DELETED\r\nSTORED\r\n"
    assert talk.ask(b"cache_memlimit 16\r\nstats settings\r\n").startswith(
        b"OK\r\nSTAT maxbytes 16777216\r\n"
    )
    assert talk.ask(b"cache_memlimit 64\r\n").startswith(b"MEMLIMIT_ADJUST_FAILED")
    talk.close()
    assert cloud.node("n1")["state"] == "up"


# --- who may come -----------------------------------------------------------------------------------


def offset_of(cloud: RunningCloud) -> int:
    return cloud.ports("n1")["memory"] - 30_000


def test_tcp_asks_for_a_token(make_cloud: Callable[..., RunningCloud]) -> None:
    """By TCP nothing is done before a set has carried a user and a token; each node has the next port."""
    cloud = make_cloud(2, environment={"VIRGO_MEMORY_MEMCACHED": f"127.0.0.1:{PORT}"})
    with socket.create_connection(("127.0.0.1", PORT + offset_of(cloud) + 1), timeout=10) as connection:
        answers = connection.makefile("rb")
        refused = b"CLIENT_ERROR unauthenticated\r\n"
        for request in (
            b"get a\r\n",
            b"version\r\n",
            b"add a 0 0 1\r\n1\r\n",
            b"flush_all\r\n",
            b"nonsense\r\n",
        ):
            connection.sendall(request)
            assert answers.readline() == refused
        connection.sendall(b"set a 0 0 8\r\nwho pass\r\nset a 0 0 1\r\n1\r\n")
        assert answers.readline() == b"CLIENT_ERROR authentication failure\r\n"
        assert answers.readline() == b"CLIENT_ERROR bad authentication token format\r\n"
        login = f"default {cloud.token}".encode()
        connection.sendall(b"set a 0 0 %d\r\n%b\r\nset a 0 0 1\r\n1\r\nget a\r\n" % (len(login), login))
        assert [answers.readline() for _ in range(5)] == [
            *(b"STORED\r\n", b"STORED\r\n", b"VALUE a 0 1\r\n", b"1\r\n", b"END\r\n")
        ]
    done = cloud.virgo("token", "create", "reader", "--role", "read")
    login = f"reader {done.stdout.split()[-1]}".encode()
    talk = Talk(PORT + offset_of(cloud))
    talk.send(b"set a 0 0 %d\r\n%b\r\n" % (len(login), login))
    assert talk.ask(b"").startswith(b"STORED\r\n")
    assert talk.ask(b"get a\r\n") == b"VALUE a 0 1\r\n1\r\nEND\r\n"
    for request in (
        b"set a 0 0 1\r\n2\r\n",
        b"incr a 1\r\n",
        b"delete a\r\n",
        b"gat 1 a\r\n",
        b"mg a T1\r\n",
        b"flush_all\r\n",
    ):
        assert talk.ask(request).startswith(b"CLIENT_ERROR NOPERM")
    talk.close()


def test_roles_without_a_login_have_to_be_configured(make_cloud: Callable[..., RunningCloud]) -> None:
    """Only where the configuration says so may everybody on the machine come in, and do that much."""
    environment = {**_LOOPBACK, "VIRGO_MEMORY_MEMCACHED_ROLES": '["read"]'}
    cloud = make_cloud(1, environment=environment)
    talk = Talk(PORT + offset_of(cloud))
    assert talk.ask(b"get a\r\nversion\r\n") == b"END\r\nVERSION 1.6.18\r\n"
    assert talk.ask(b"set a 0 0 1\r\n1\r\n").startswith(b"CLIENT_ERROR NOPERM")
    assert talk.ask(b"cache_memlimit 100\r\n").startswith(b"CLIENT_ERROR NOPERM")
    talk.close()
    with redis.Redis(unix_socket_path=cloud.socket("n1")) as client:
        assert client.info("memory")["memcached"] == f"127.0.0.1:{PORT + offset_of(cloud)}"
        assert f"at 127.0.0.1:{PORT + offset_of(cloud)}".encode() in client.execute_command("MODULES")
        with pytest.raises(redis.ResponseError, match="no command"):
            client.execute_command("MC.SAY", "the listener's own commands are its own")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"VIRGO_MEMORY_MEMCACHED": "nowhere:x"}, "not an address"),
        ({"VIRGO_MEMORY_MEMCACHED": "0.0.0.0:11211"}, "TLS is not ready"),
        ({**_LOOPBACK, "VIRGO_MEMORY_MEMCACHED": "0.0.0.0:11211"}, "without a login"),
        ({**_LOOPBACK, "VIRGO_MEMORY_MEMCACHED_ROLES": '["exec"]'}, "'exec'"),
        ({"VIRGO_MEMORY_MEMCACHED_ITEM_BYTES": "12"}, "memcached_item_bytes is 12"),
        ({"VIRGO_MEMORY_MEMCACHED": "127.0.0.1:65535"}, "does not exist"),
        ({"VIRGO_MEMORY_MEMCACHED": "unix:/tmp/one"}, "several nodes would listen"),
    ],
)
def test_an_impossible_place_is_refused(tmp_path: Path, settings: dict[str, str], what: str) -> None:
    """Such a configuration stops the start, and the error says what is wrong."""
    with pytest.raises(BadConfig, match=what):
        found = configuration.load({"VIRGO_HOME": str(tmp_path), **settings})
        server_tls(found, place(found, "n1", 2).address.host)


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    """A port that another process holds stops the start with PortTaken."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        environment = {
            **_LOOPBACK,
            "VIRGO_MEMORY_MEMCACHED": f"127.0.0.1:{port}",
            "VIRGO_NODE_BIND": "",
            "VIRGO_NODE_PORT_OFFSET": "0",
        }
        with pytest.raises(PortTaken, match=str(port)):
            start_cloud(tmp_path, 1, environment=environment)
    stop_cloud(tmp_path)


def test_tls_asks_for_a_certificate(tmp_path: Path) -> None:
    """Beyond loopback there is only TLS; a certificate's roles are what its holder may do."""
    home, alice = tmp_path / "home", tmp_path / "alice"
    home.mkdir()
    cloud = RunningCloud(home, ["n1"])
    cloud.virgo("ca", "init")
    cloud.virgo("ca", "issue", "alice", "--role", "read")
    shutil.copytree(home / "tls" / "issued" / "alice", alice / "tls")
    start_cloud(home, 1, environment={"VIRGO_MEMORY_MEMCACHED": f"0.0.0.0:{PORT}"})
    try:
        port = PORT + offset_of(cloud)
        context = client_context(alice, SecurityConfig(), check_host=False)
        plain = socket.create_connection(("127.0.0.1", port), timeout=10)
        with context.wrap_socket(plain) as connection, connection.makefile("rb") as answers:
            connection.sendall(b"get a\r\nset a 0 0 1\r\n1\r\n")
            assert answers.readline() == b"END\r\n"
            assert answers.readline().startswith(b"CLIENT_ERROR NOPERM")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
            plain.sendall(b"version\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert b"VERSION" not in plain.recv(1000)
    finally:
        stop_cloud(home)


def test_a_slow_reader_is_not_read_from(pair: RunningCloud, talks: tuple[Talk, Talk]) -> None:
    """Answers that nobody reads do not pile up in the node: it stops to read from such a client."""
    value = b"x" * 1_000_000
    talks[0].ask(b"set slow 0 0 %d\r\n%b\r\n" % (len(value), value))
    slow = Talk(pair.home / "mc-n1")
    slow.socket.setblocking(False)
    sent = 0
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        try:
            sent += slow.socket.send(b"get slow\r\n" * 100)
        except BlockingIOError:
            time.sleep(0.02)
    assert sent < 8 << 20
    slow.close()
    assert talks[0].ask(b"get nothing\r\n") == b"END\r\n"


def test_values_larger_than_a_mebibyte_can_be_allowed(talks: tuple[Talk, Talk]) -> None:
    """The largest item is a setting; a large value comes back whole, also by pieces and by another node."""
    value = os.urandom(1 << 20) * 8
    for key in spread(talks, 4):
        stored = talks[0].ask(b"set %b 0 0 %d\r\n" % (key, len(value)), value, b"\r\n")
        assert stored == b"STORED\r\n"
        assert talks[1].ask(b"get %b\r\n" % key) == b"VALUE %b 0 %d\r\n%b\r\nEND\r\n" % (
            key,
            len(value),
            value,
        )
