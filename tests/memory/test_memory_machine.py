"""Regions and keys against a model in a dictionary, by generated sequences, over two nodes."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from memory.pools import pools
from virgo.errors import PoolFull, TooLarge, UnknownId
from virgo.limits import MEMORY_CHUNK_BYTES, MiB

SIZES = st.one_of(st.integers(1, 300), st.sampled_from([MEMORY_CHUNK_BYTES, 3 * MEMORY_CHUNK_BYTES - 1]))
NODES = st.sampled_from([1, 2])
KEYS = st.sampled_from([b"", b"a", b"b", b"c" * 500])
CAPACITY = 24 * MiB


class Memory(RuleBasedStateMachine):
    """Every request goes to either node; the answers are those of a dictionary."""

    regions = Bundle("regions")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = tempfile.TemporaryDirectory(prefix="virgo-")
        self.context = pools(Path(self.directory.name), 2, capacity_bytes=CAPACITY)
        self.nodes = self.loop.run_until_complete(self.context.__aenter__())
        self.values: dict[int, bytes] = {}
        self.sizes: dict[int, int] = {}
        self.given: set[int] = set()
        self.keys: dict[bytes, bytes] = {}

    def teardown(self) -> None:
        self.loop.run_until_complete(self.context.__aexit__(None, None, None))
        self.loop.close()
        self.directory.cleanup()

    def run(self, node: int, *request: Any) -> Any:
        return self.loop.run_until_complete(self.nodes[node].run(*request))

    @rule(target=regions, node=NODES, size=SIZES)
    def malloc(self, node: int, size: int) -> int:
        try:
            identifier = self.run(node, "VIRGO_MALLOC", size)
        except PoolFull:
            assert sum(self.sizes.values()) + size > CAPACITY
            return 0
        assert identifier not in self.given
        self.given.add(identifier)
        self.sizes[identifier], self.values[identifier] = size, b""
        return int(identifier)

    @rule(node=NODES, identifier=regions, data=st.binary(max_size=301), times=st.sampled_from([1, 30_000]))
    def set(self, node: int, identifier: int, data: bytes, times: int) -> None:
        data *= times
        try:
            self.run(node, "VIRGO_SET", identifier, data)
        except UnknownId:
            assert identifier not in self.values
        except TooLarge:
            assert len(data) > self.sizes[identifier]
        else:
            assert len(data) <= self.sizes[identifier]
            self.values[identifier] = data

    @rule(node=NODES, identifier=regions)
    def get(self, node: int, identifier: int) -> None:
        try:
            assert self.run(node, "VIRGO_GET", identifier) == self.values[identifier]
        except UnknownId:
            assert identifier not in self.values

    @rule(node=NODES, identifier=consumes(regions), again=st.booleans())
    def free(self, node: int, identifier: int, again: bool) -> None:
        for _ in range(1 + again):
            try:
                self.run(node, "VIRGO_FREE", identifier)
            except UnknownId:
                assert identifier not in self.values
            else:
                del self.values[identifier], self.sizes[identifier]

    @rule(node=NODES)
    def restart(self, node: int) -> None:
        self.loop.run_until_complete(self.nodes[node].stop())
        self.loop.run_until_complete(self.nodes[node].start())

    @rule(node=NODES, key=KEYS, value=st.binary(max_size=9))
    def set_key(self, node: int, key: bytes, value: bytes) -> None:
        self.run(node, "SET", key, value)
        self.keys[key] = value

    @rule(node=NODES, key=KEYS)
    def delete_key(self, node: int, key: bytes) -> None:
        assert self.run(node, "DEL", key) == (self.keys.pop(key, None) is not None)

    @rule(node=NODES, keys=st.lists(KEYS, min_size=1, max_size=4))
    def get_keys(self, node: int, keys: list[bytes]) -> None:
        assert self.run(node, "MGET", *keys) == [self.keys.get(key) for key in keys]
        assert self.run(node, "GET", keys[0]) == self.keys.get(keys[0])

    @invariant()
    def the_figures_agree(self) -> None:
        assert self.nodes.total("regions") == len(self.values)
        assert self.nodes.total("declared_bytes") == sum(self.sizes.values())
        assert self.nodes.total("keys") == len(self.keys)


Memory.TestCase.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMemory = Memory.TestCase
