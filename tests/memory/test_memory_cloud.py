"""Memory on real nodes: redis-py, the Python clients, and nodes that are killed."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import redis

from virgo import aio
from virgo.errors import NodeLost, PoolFull, TooLarge, UnknownId, VirgoError
from virgo.limits import MEMORY_CHUNK_BYTES, NODE_LOST_S, MiB
from virgo.memory.client import MemoryClient
from virgo.memory.mapped import MISSING

if TYPE_CHECKING:
    from conftest import RunningCloud

CHUNK = MEMORY_CHUNK_BYTES


@pytest.fixture
def clients(cloud3: RunningCloud) -> Iterator[list[redis.Redis]]:
    """redis-py on the memory port of each node."""
    made = [redis.Redis(port=cloud3.ports(name)["memory"], password=cloud3.token) for name in cloud3.names]
    yield made
    for client in made:
        client.close()


@pytest.fixture
def memory(cloud3: RunningCloud) -> Iterator[MemoryClient]:
    """The Python client on n1, with no keys in the cloud."""
    with cloud3.connect("n1") as cloud:
        cloud.memory.clear()
        yield cloud.memory


def test_the_calls_over_resp_on_all_nodes(clients: list[redis.Redis]) -> None:
    """What the contract says of VIRGO_MALLOC, SET, GET and FREE holds for redis-py on every node."""
    identifier = clients[0].execute_command("VIRGO_MALLOC", 100)
    assert isinstance(identifier, int)
    for number, client in enumerate(clients):
        assert client.execute_command("virgo_cloud_set", identifier, b"%d, \r\n" % number) == b"OK"
        assert [each.execute_command("VIRGO_GET", identifier) for each in clients] == [
            b"%d, \r\n" % number
        ] * 3
    assert clients[2].execute_command("VIRGO_FREE", hex(identifier)) == b"OK"
    for client in clients:
        for command in ("VIRGO_FREE", "VIRGO_GET"):
            with pytest.raises(redis.ResponseError, match="NOID"):
                client.execute_command(command, identifier)
    with pytest.raises(redis.ResponseError, match="BADARG"):
        clients[0].execute_command("VIRGO_MALLOC", -1)
    with pytest.raises(redis.ResponseError, match="TOOBIG"):
        clients[0].execute_command("VIRGO_MALLOC", 1 << 40)


def test_a_large_region_over_real_nodes(clients: list[redis.Redis]) -> None:
    """20 MiB are spread over all three nodes, whole from each of them, and gone when freed."""

    def chunks() -> list[int]:
        return [json.loads(client.execute_command("MEMORY.STATS"))["chunks"] for client in clients]

    before = chunks()
    value = os.urandom(20 * MiB + 1)
    identifier = clients[0].execute_command("VIRGO_MALLOC", len(value))
    clients[1].execute_command("VIRGO_SET", identifier, value)
    assert all(now > then for now, then in zip(chunks(), before, strict=True))
    assert all(client.execute_command("VIRGO_GET", identifier) == value for client in clients)
    clients[2].execute_command("VIRGO_FREE", identifier)
    assert chunks() == before


def test_redis_py_as_a_cache(clients: list[redis.Redis], memory: MemoryClient) -> None:
    """The usual calls of redis-py work unchanged, whatever node they go to."""
    first, second, third = clients
    assert first.set("greeting", "hello") is True
    assert second.get("greeting") == b"hello"
    assert third.set("greeting", "x", nx=True) is None
    assert second.set("greeting", "bye", xx=True, get=True) == b"hello"
    assert third.mset({f"k{number}": str(number) for number in range(50)}) is True
    assert first.mget("k1", "none", "k49") == [b"1", None, b"49"]
    assert second.dbsize() == 51
    assert sorted(third.scan_iter("k?")) == [b"k%d" % number for number in range(10)]
    assert first.exists("k1", "k2", "none") == 2
    assert second.delete("k1", "k2", "none") == 2
    assert third.type("k3") == b"string"
    assert first.expire("k3", 100) is True
    assert 0 < third.ttl("k3") <= 100
    with first.pipeline(transaction=False) as pipe:
        for number in range(200):
            pipe.set(f"p{number}", number).get(f"p{number}")
        assert pipe.execute() == [part for number in range(200) for part in (True, b"%d" % number)]
    assert second.flushdb() is True
    assert memory.get("greeting") is None


def test_the_mapping_behaves_as_a_dictionary(memory: MemoryClient) -> None:
    """The methods of a MutableMapping do what they do on a dict, for text and bytes as keys."""
    assert memory.mapped
    assert not memory
    memory["a"] = b"1"
    memory[b"b"] = bytearray(b"2")
    assert (memory["a"], memory[b"a"], memory.get("none"), memory.get("none", b"d")) == (
        b"1",
        b"1",
        None,
        b"d",
    )
    assert "a" in memory and "none" not in memory and 3 not in memory
    assert dict(memory) == {b"a": b"1", b"b": b"2"}
    with pytest.raises(KeyError):
        memory["none"]
    with pytest.raises(KeyError):
        del memory["none"]
    assert memory.setdefault("a", b"9") == b"1"
    assert memory.pop("a") == b"1"
    assert memory.pop("a", None) is None
    memory.update({"c": b"3", "d": b"4"})
    memory.set_many({"e": b"5"})
    assert memory.get_many(["c", "e", "none"]) == {"c": b"3", "e": b"5"}
    assert memory.delete("c", "d", "none") == 2
    assert len(memory) == 2
    assert memory.set("e", b"6", only_if="absent") is False
    assert memory.set("t", b"7", ttl_s=0.05) is True
    assert memory["t"] == b"7"
    deadline = time.monotonic() + 5
    while "t" in memory and time.monotonic() < deadline:
        time.sleep(0.01)
    assert memory.get("t") is None
    memory.clear()
    assert len(memory) == 0


def test_a_region_in_python(memory: MemoryClient) -> None:
    """malloc gives an object with id, size and node; the block frees it; errors have their types."""
    with memory.malloc(10) as region:
        assert (region.size, region.node, region.get()) == (10, "n1", b"")
        region.set(b"0123456789")
        with pytest.raises(TooLarge):
            region.set(b"0123456789a")
        assert region.get() == b"0123456789"
        same = memory.region(region.id)
        assert (same.size, same.get(), same.stats().length) == (10, b"0123456789", 10)
    with pytest.raises(UnknownId):
        region.get()
    with pytest.raises(UnknownId):
        region.free()
    with memory.malloc(10, node="n3") as far:
        far.set(b"far")
        assert (far.node, far.get()) == ("n3", b"far")
        assert repr(far) == f"<Region {far.id:#x} of 10 bytes>"
    with memory.malloc(3 * CHUNK) as large:
        value = os.urandom(3 * CHUNK)
        large.set(value)
        assert large.get() == value


def test_the_asyncio_client(cloud3: RunningCloud, memory: MemoryClient) -> None:
    """The same surface with await, seeing the same memory."""

    async def main() -> None:
        async with await aio.connect(f"unix:{cloud3.socket('n2')}", home=cloud3.home) as cloud:
            shared = cloud.memory
            await shared.set("a", b"1")
            assert memory["a"] == b"1"
            assert (await shared.get("a"), await shared.get("none", b"d")) == (b"1", b"d")
            await shared.set_many({"b": b"2", "c": b"3"})
            assert await shared.get_many(["b", "none"]) == {"b": b"2"}
            assert await shared.mapped()
            assert sorted([key async for key in shared]) == [b"a", b"b", b"c"]
            keys = shared.keys()
            assert sorted([key async for key in keys]) == [b"a", b"b", b"c"]
            assert sorted([value async for value in shared.values()]) == [b"1", b"2", b"3"]
            assert {key: value async for key, value in shared.items()} == dict(memory)
            assert (await shared.count(), await shared.exists("a"), await shared.delete("a")) == (3, True, 1)
            async with await shared.malloc(2 * CHUNK + 1) as region:
                value = os.urandom(2 * CHUNK + 1)
                await region.set(value)
                assert await region.get() == value
                assert memory.get_region(region.id) == value
                assert await region.node() == "n2"
                assert await region.size() == await shared.region(region.id).size() == len(value)
            with pytest.raises(UnknownId):
                await region.get()

    asyncio.run(main())


def test_the_mapping_of_asyncio(cloud3: RunningCloud, memory: MemoryClient) -> None:
    """The methods of a MutableMapping that can be awaited do what they do on a dict, in one step each."""

    async def main() -> None:
        async with await aio.connect(f"unix:{cloud3.socket('n3')}", home=cloud3.home) as cloud:
            shared = cloud.memory
            with pytest.raises(KeyError):
                await shared.popitem()
            assert [item async for item in shared.items()] == []
            assert (await shared.setdefault("a", b"1"), await shared.setdefault("a", b"2")) == (b"1", b"1")
            assert (
                await asyncio.gather(*[shared.setdefault("b", b"%d" % n) for n in range(20)])
                == [memory["b"]] * 20
            )
            await shared.update({"c": b"3"}, d=b"4")
            await shared.update([("e", b"5")])
            await shared.update()
            assert len(memory) == 5
            taken = await asyncio.gather(*[shared.popitem() for _ in range(5)])
            assert {key for key, _value in taken} == {b"a", b"b", b"c", b"d", b"e"}
            assert (await shared.pop("a", None), len(memory)) == (None, 0)
            many = {b"many:%d" % number: b"%d" % number for number in range(3000)}
            await shared.set_many(many)
            assert {key: value async for key, value in shared.items()} == many
            await shared.clear()
            await shared.close()
            assert await shared.get("a") is None

    asyncio.run(main())


def test_reads_by_mapping_need_no_node(cloud3: RunningCloud, memory: MemoryClient) -> None:
    """What the connected node holds is read without a request; with mapping off the answers are the same."""
    region = memory.malloc(100)
    region.set(b"data")
    assert memory.mapped and memory._reach.local is not None
    for number in range(500):  # other tests may have led some slots to other nodes
        name = f"a{number}"
        memory[name] = b"1"
        if memory[name] == b"1" and memory._reach.local.key(name.encode()) is not MISSING:
            break
    assert (memory[name], region.get()) == (b"1", b"data")
    runner, asked = memory._reach._runner, []

    class Watched:
        def run(self, call: Any) -> Any:
            asked.append(call.request[0])
            return runner.run(call)

        run_many = runner.run_many

    memory._reach._runner = Watched()  # type: ignore[assignment]
    assert (memory[name], memory.get(name.encode()), region.get()) == (b"1", b"1", b"data")
    assert asked == []
    plain = MemoryClient(runner, mapped=False)
    assert (plain[name], plain.get_region(region.id), plain.mapped) == (b"1", b"data", False)
    memory._reach._runner = runner
    region.free()


def test_reads_stay_whole_while_all_nodes_write(cloud3: RunningCloud, memory: MemoryClient) -> None:
    """Writers on two nodes and readers by wire and by map: every value read is one that was set, whole."""
    region = memory.malloc(2 * CHUNK)
    region.set(b"0" * CHUNK)
    small = memory.malloc(50_000)
    small.set(b"0" * 50_000)
    stop, wrong = threading.Event(), []

    def write(name: str, letters: bytes) -> None:
        with cloud3.connect(name) as cloud:
            for turn in range(6):
                letter = letters[turn % len(letters) :][:1]
                cloud.memory.set_region(region.id, letter * (CHUNK + turn * 1000))
                for length in range(1000, 50_000, 7000):
                    cloud.memory.set_region(small.id, letter * length)
                    cloud.memory["shared"] = letter * length

    def read(name: str) -> None:
        with cloud3.connect(name) as cloud:
            while not stop.is_set():
                for value in (
                    cloud.memory.get_region(small.id),
                    cloud.memory.get("shared", b""),
                    cloud.memory.get_region(region.id),
                ):
                    wrong.extend([name] * (len(set(value)) > 1))

    writers = [
        threading.Thread(target=write, args=("n1", b"abc")),
        threading.Thread(target=write, args=("n3", b"xyz")),
    ]
    readers = [threading.Thread(target=read, args=(name,)) for name in ("n1", "n2")]
    for thread in writers + readers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not wrong
    region.free()
    small.free()


def test_a_killed_node_is_named_and_loses_nothing(make_cloud: Callable[..., RunningCloud]) -> None:
    """kill -9 of a node: NodeLost within the bound, the others go on, and after its restart all is there."""
    cloud = make_cloud(3, environment={"VIRGO_MEMORY_CAPACITY_BYTES": str(64 * MiB)})
    with cloud.connect("n1") as first, cloud.connect("n2") as second:
        there = first.memory.malloc(100, node="n2")
        there.set(b"on n2")
        large = first.memory.malloc(6 * CHUNK)
        value = os.urandom(6 * CHUNK)
        large.set(value)
        for number in range(40):
            second.memory[f"k{number}"] = b"%d" % number
        os.kill(cloud.node("n2")["pid"], 9)
        began = time.monotonic()
        with pytest.raises(NodeLost, match="n2"):
            while (
                True
            ):  # the supervisor may be quick to restart it: then it is asked again until it is not there
                there.get()
                assert time.monotonic() - began < NODE_LOST_S
        assert time.monotonic() - began < NODE_LOST_S
        first.memory.malloc(10).set(b"goes on")
        assert wait(there.get) == b"on n2"
        assert wait(large.get) == value
        assert wait(lambda: first.memory.get_many([f"k{number}" for number in range(40)])) == {
            f"k{number}": b"%d" % number for number in range(40)
        }


def wait(read: Callable[[], Any], *, limit_s: float = 20.0) -> Any:
    """The result of `read` once the node is back."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return read()
        except VirgoError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_a_full_pool_of_real_nodes(make_cloud: Callable[..., RunningCloud]) -> None:
    """With small pools, PoolFull comes from malloc and from keys, and freeing makes room again."""
    cloud = make_cloud(2, environment={"VIRGO_MEMORY_CAPACITY_BYTES": str(16 * MiB)})
    with cloud.connect("n1") as connection:
        memory = connection.memory
        regions = []
        with pytest.raises(PoolFull):
            regions.extend(memory.malloc(3 * MiB) for _ in range(100))
        assert len(regions) == 10
        assert {region.node for region in regions} == {"n1", "n2"}
        with pytest.raises(PoolFull):
            memory.malloc(8 * MiB)
        with pytest.raises(PoolFull):
            for number in range(100):
                memory[f"k{number}"] = bytes(200_000)
        for region in regions:
            region.free()
        memory.malloc(8 * MiB).set(bytes(8 * MiB))
        memory["after"] = b"works"
        assert memory["after"] == b"works"
