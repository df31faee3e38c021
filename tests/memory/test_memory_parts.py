"""Reading and writing regions at offsets: against a bytearray, over two nodes, small, spread and shared."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memory.pools import Pools, pools
from virgo.errors import BadArgument, NodeLost, TooLarge, UnknownId
from virgo.limits import MEMORY_CHUNK_BYTES, MiB

CHUNK = MEMORY_CHUNK_BYTES
NODES = st.sampled_from([1, 2])
KINDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "small": (300, ()),
    "spread": (3 * CHUNK - 7, ()),
    "shared": (CHUNK + 300, ("SHARED",)),
}
EDGES = [0, 1, 299, 300, 4095, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 8]


def run(directory: Path, test: Any, *, count: int = 3) -> None:
    async def main() -> None:
        async with pools(directory, count, capacity_bytes=64 * MiB) as found:
            await test(found)

    asyncio.run(main())


class Parts(RuleBasedStateMachine):
    """One region of each kind; each request goes to either node."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = tempfile.TemporaryDirectory(prefix="virgo-")
        self.context = pools(Path(self.directory.name), 2, capacity_bytes=64 * MiB)
        self.nodes = self.loop.run_until_complete(self.context.__aenter__())
        self.ids: dict[str, int] = {}
        self.values = {kind: bytearray() for kind in KINDS}

    def teardown(self) -> None:
        self.loop.run_until_complete(self.context.__aexit__(None, None, None))
        self.loop.close()
        self.directory.cleanup()

    def run(self, node: int, *request: Any) -> Any:
        return self.loop.run_until_complete(self.nodes[node].run(*request))

    @initialize(node=NODES)
    def malloc(self, node: int) -> None:
        for kind, (size, options) in KINDS.items():
            self.ids[kind] = self.run(node, "VIRGO_MALLOC", size, *options)

    @rule(
        node=NODES,
        kind=st.sampled_from(list(KINDS)),
        offset=st.sampled_from(EDGES) | st.integers(0, 310),
        data=st.binary(max_size=9),
        times=st.sampled_from([1, 30, CHUNK // 8, CHUNK // 4]),
    )
    def write(self, node: int, kind: str, offset: int, data: bytes, times: int) -> None:
        data *= times
        size, value = KINDS[kind][0], self.values[kind]
        try:
            self.run(node, "VIRGO_SET", self.ids[kind], data, "AT", offset)
        except BadArgument:
            assert offset > size
        except TooLarge:
            assert offset + len(data) > size
        else:
            assert offset + len(data) <= size
            if data:
                value.extend(bytes(max(0, offset - len(value))))
                value[offset : offset + len(data)] = data

    @rule(node=NODES, kind=st.sampled_from(list(KINDS)), data=st.binary(max_size=9), times=st.integers(1, 30))
    def set(self, node: int, kind: str, data: bytes, times: int) -> None:
        self.run(node, "VIRGO_SET", self.ids[kind], data * times)
        self.values[kind] = bytearray(data * times)

    @rule(
        node=NODES,
        kind=st.sampled_from(list(KINDS)),
        offset=st.sampled_from(EDGES) | st.integers(0, 310),
        count=st.none() | st.sampled_from([0, 1, 300, CHUNK]),
    )
    def read(self, node: int, kind: str, offset: int, count: int | None) -> None:
        size, options = KINDS[kind][0], [] if count is None else [count]
        try:
            found = self.run(node, "VIRGO_GET", self.ids[kind], "AT", offset, *options)
        except BadArgument:
            assert offset + (count or 0) > size
        else:
            assert offset + (count or 0) <= size
            assert found == self.values[kind][offset : None if count is None else offset + count]

    @rule(node=NODES, sweep=st.booleans())
    def restart(self, node: int, sweep: bool) -> None:
        if sweep:
            assert self.loop.run_until_complete(self.nodes[node].module._chunks.sweep()) == 0
        else:
            self.loop.run_until_complete(self.nodes[node].stop())
            self.loop.run_until_complete(self.nodes[node].start())

    @rule(node=NODES, kind=st.sampled_from(list(KINDS)))
    def get(self, node: int, kind: str) -> None:
        assert self.run(node, "VIRGO_GET", self.ids[kind]) == self.values[kind]

    @invariant()
    def no_chunk_is_left(self) -> None:
        if self.ids:
            assert self.nodes.total("chunks") <= -(-len(self.values["spread"]) // CHUNK)


Parts.TestCase.settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestParts = Parts.TestCase


def test_hostile_offsets_are_typed_errors(tmp_path: Path) -> None:
    """Offsets and sizes that are negative, no numbers, huge or outside leave the value as it was."""

    async def test(nodes: Pools) -> None:
        small = await nodes[1].run("VIRGO_MALLOC", 10)
        large = await nodes[1].run("VIRGO_MALLOC", 2 * CHUNK)
        shared = await nodes[1].run("VIRGO_MALLOC", 5000, "SHARED")
        for identifier, size in ((small, 10), (large, 2 * CHUNK), (shared, 5000)):
            await nodes[2].run("VIRGO_SET", identifier, b"0123456789")
            for node in (nodes[1], nodes[2]):
                for kind, *words in (
                    (BadArgument, "VIRGO_GET", identifier, "AT", -1),
                    (BadArgument, "VIRGO_GET", identifier, "AT", size + 1),
                    (BadArgument, "VIRGO_GET", identifier, "AT", 0, size + 1),
                    (BadArgument, "VIRGO_GET", identifier, "AT", 1, size),
                    (BadArgument, "VIRGO_GET", identifier, "AT", 0, -1),
                    (BadArgument, "VIRGO_GET", identifier, "AT", 2**64, 1),
                    (BadArgument, "VIRGO_GET", identifier, "AT", 2**63 - 1, 2**63 - 1),
                    (BadArgument, "VIRGO_GET", identifier, "AT", "1.0"),
                    (BadArgument, "VIRGO_GET", identifier, "AT"),
                    (BadArgument, "VIRGO_GET", identifier, "ON", 1),
                    (BadArgument, "VIRGO_SET", identifier, b"x", "AT", -1),
                    (BadArgument, "VIRGO_SET", identifier, b"x", "AT", 2**70),
                    (BadArgument, "VIRGO_SET", identifier, b"x", "AT"),
                    (BadArgument, "VIRGO_SET", identifier, b"x", "IN", 1),
                    (TooLarge, "VIRGO_SET", identifier, b"xy", "AT", size - 1),
                    (BadArgument, "VIRGO_SET", identifier, b"", "AT", size + 1),
                ):
                    with pytest.raises(kind) as caught:
                        await node.run(*words)
                    assert caught.value.hint
            assert await nodes[3].run("VIRGO_GET", identifier) == b"0123456789"
            assert await nodes[3].run("VIRGO_GET", identifier, "AT", size) == b""
            await nodes[3].run("VIRGO_FREE", identifier)
            for words in (["VIRGO_GET", identifier, "AT", 0], ["VIRGO_SET", identifier, b"x", "AT", 0]):
                with pytest.raises(UnknownId):
                    await nodes[2].run(*words)

    run(tmp_path, test)


def test_only_the_touched_chunks_travel(tmp_path: Path) -> None:
    """A write of a few bytes into a spread region puts one chunk, and a read of a few fetches these."""

    async def test(nodes: Pools) -> None:
        identifier = await nodes[1].run("VIRGO_MALLOC", 6 * CHUNK)
        value = bytearray(b"abcd" * (6 * CHUNK // 4))
        await nodes[1].run("VIRGO_SET", identifier, bytes(value))
        asked: list[list[bytes]] = []
        nodes.on_call = lambda _number, request: asked.append(request)  # type: ignore[func-returns-value]
        for index in range(6):
            await nodes[1].run("VIRGO_SET", identifier, b"%d" % index, "AT", index * CHUNK)
            value[index * CHUNK : index * CHUNK + 1] = b"%d" % index
            assert await nodes[1].run("VIRGO_GET", identifier, "AT", index * CHUNK, 3) == b"%dbc" % index
        kinds = [request[0] for request in asked]
        assert 0 < kinds.count(b"MEMORY.CHUNK.PUT") <= 6
        gets = [request for request in asked if request[0] == b"MEMORY.CHUNK.GET"]
        assert {int(request[5]) - int(request[4]) for request in gets} == {3, CHUNK}
        nodes.on_call = None
        assert await nodes[2].run("VIRGO_GET", identifier) == value
        assert nodes.total("chunks") == 6

    run(tmp_path, test)


def test_a_gap_is_zeros_wherever_its_chunks_lie(tmp_path: Path) -> None:
    """A short chunk, here or on another node, that is followed by a later one reads as filled with zeros."""

    async def test(nodes: Pools) -> None:
        for home in (1, 2, 3):
            identifier = await nodes[home].run("VIRGO_MALLOC", 4 * CHUNK)
            await nodes[home].run("VIRGO_SET", identifier, b"abc")
            await nodes[home].run("VIRGO_SET", identifier, b"z", "AT", 3 * CHUNK)
            value = b"abc".ljust(3 * CHUNK, b"\0") + b"z"
            assert await nodes[home].run("VIRGO_GET", identifier) == value
            assert await nodes[1].run("VIRGO_GET", identifier, "AT", 1, 5) == b"bc\0\0\0"
            assert await nodes[1].run("VIRGO_GET", identifier, "AT", CHUNK - 1, CHUNK) == bytes(CHUNK)
            assert nodes.total("chunks") == 2, "what is nothing but zeros takes no room"
            await nodes[home].run("VIRGO_FREE", identifier)

    run(tmp_path, test)


def test_a_write_that_dies_midway_leaves_the_old_value_and_no_rest(tmp_path: Path) -> None:
    """Cancelled between its chunks and the flip, it changes nothing; what it left is swept, and no more."""

    async def test(nodes: Pools) -> None:
        identifier = await nodes[1].run("VIRGO_MALLOC", 6 * CHUNK)
        value = b"abcd" * (6 * CHUNK // 4)
        await nodes[1].run("VIRGO_SET", identifier, value)
        await nodes[1].run("VIRGO_SET", identifier, b"x", "AT", CHUNK)  # chunks of two versions from now on
        value = value[:CHUNK] + b"x" + value[CHUNK + 1 :]
        drops: list[list[bytes]] = []

        def fail(_number: int, request: list[bytes]) -> None:
            if request[0] in (b"MEMORY.CHUNK.DROP", b"MEMORY.CHUNK.RESERVE"):
                drops.append(request)
                raise NodeLost("just now")

        nodes.on_call = fail
        for index in (0, 2, 3):  # their old chunks stay behind, of a version of which others are wanted
            await nodes[1].run("VIRGO_SET", identifier, b"%d" % index, "AT", index * CHUNK + 2)
            where = index * CHUNK + 2
            value = value[:where] + b"%d" % index + value[where + 1 :]
        assert drops and nodes.total("chunks") == 6 + len(drops)
        nodes.on_call = None
        swept = sum([await node.module._chunks.sweep() for node in nodes.nodes.values()])
        assert (swept, nodes.total("chunks")) == (len(drops), 6)
        assert await nodes[3].run("VIRGO_GET", identifier) == value

    run(tmp_path, test)


def test_a_write_needs_the_node_of_its_chunk_only(tmp_path: Path) -> None:
    """With a node lost, other chunks are written and read; a part of its own is NodeLost, a whole moves."""

    async def test(nodes: Pools) -> None:
        identifier = await nodes[1].run("VIRGO_MALLOC", 6 * CHUNK)
        await nodes[1].run("VIRGO_SET", identifier, bytes(6 * CHUNK))
        plan = nodes[1].module._spread._known(identifier).plan
        lost, good = plan.index(2), plan.index(1)
        await nodes[2].stop()
        await nodes[3].run("VIRGO_SET", identifier, b"new", "AT", good * CHUNK)
        assert await nodes[3].run("VIRGO_GET", identifier, "AT", good * CHUNK, 4) == b"new\0"
        with pytest.raises(NodeLost):
            await nodes[3].run("VIRGO_SET", identifier, b"new", "AT", lost * CHUNK + 1)
        await nodes[3].run("VIRGO_SET", identifier, b"n" * CHUNK, "AT", lost * CHUNK)
        assert await nodes[3].run("VIRGO_GET", identifier, "AT", lost * CHUNK, CHUNK) == b"n" * CHUNK
        with pytest.raises(NodeLost):
            await nodes[3].run("VIRGO_GET", identifier)
        await nodes[2].start()
        await nodes[1].settle()
        for node in nodes.nodes.values():
            await node.module._chunks.sweep()
        value = bytearray(6 * CHUNK)
        value[good * CHUNK : good * CHUNK + 3] = b"new"
        value[lost * CHUNK : (lost + 1) * CHUNK] = b"n" * CHUNK
        assert await nodes[2].run("VIRGO_GET", identifier) == value
        assert nodes.total("chunks") == 6

    run(tmp_path, test)
