"""The table of a mount against a simple model: what the kernel was told, names, open files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from virgo.files.mount.table import OpenFile, Table, is_top, top, tree_of

TOP = top(3)
NAMES = st.sampled_from([b"a", b"b", b"c"])
FILES = st.sampled_from([b"file-1", b"file-2", b"file-3"])


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    found = Table(tmp_path)
    yield found
    found.close()


def test_nodes_say_of_which_tree_they_are(table: Table) -> None:
    """Tops have fixed numbers; no node of one tree is one of another, for the same file either."""
    first, second = table.learn(top(1), b"x", b"id"), table.learn(top(2), b"x", b"id")
    assert first != second and (tree_of(first), tree_of(second)) == (1, 2)
    assert is_top(top(1)) and not is_top(first)
    assert table.learn(top(1), b"y", b"id") == first
    assert sorted(table.names(first)) == [(top(1), b"x"), (top(1), b"y")]


def test_paths_follow_names_upwards(table: Table) -> None:
    """Each name gives one; a directory that is renamed takes what is below along."""
    directory = table.learn(TOP, b"dir", b"d")
    file = table.learn(directory, b"file", b"f")
    table.learn(TOP, b"other", b"f")
    assert sorted(table.paths(file)) == [b"dir/file", b"other"]
    table.rename(TOP, b"dir", TOP, b"new", swap=False)
    assert sorted(table.paths(file)) == [b"new/file", b"other"]
    table.unbind(directory, b"file")
    table.unbind(TOP, b"other")
    assert table.paths(file) == [] and table.paths(TOP) == [b""]


def test_a_node_is_forgotten_when_the_kernel_has_forgotten_it_as_often_as_it_was_told(table: Table) -> None:
    """Then its number is never given again, and what was known of it is gone."""
    node = table.learn(TOP, b"x", b"id")
    assert table.learn_all(TOP, [(b"x", b"id"), (b"x", b"id")]) == [node, node]
    with table.changing() as txn:
        table.set_open(node, OpenFile(1, 7, (5, 6)), txn)
        assert not table.see(node, b"v1", txn) and table.see(node, b"v1", txn)
    table.forget([(node, 2), (12345, 1)])
    assert table.identity(node) == b"id"
    assert table.opened(node) == OpenFile(1, 7, (5, 6), (0, 0))
    table.forget([(node, 1)])
    with pytest.raises(KeyError):
        table.identity(node)
    assert table.opened(node) is None and table.child(TOP, b"x") is None
    assert table.learn(TOP, b"x", b"id") > node
    assert table.stats() == {"known": 1, "open": 0}


def test_two_processes_see_one_table(table: Table, tmp_path: Path) -> None:
    """What one has learnt the other knows at once."""
    import os

    node = table.learn(TOP, b"x", b"id")
    table.close()
    child = os.fork()
    if not child:
        other = Table(tmp_path)
        os._exit(0 if other.learn(TOP, b"y", b"id") == node else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    again = Table(tmp_path)
    assert sorted(again.names(node)) == [(TOP, b"x"), (TOP, b"y")]
    again.close()


class Model(RuleBasedStateMachine):
    """Names in one directory: what a dictionary says is what the table says."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self._directory = tempfile.TemporaryDirectory(prefix="virgo-table-")
        self.table = Table(Path(self._directory.name))
        self.names: dict[bytes, bytes] = {}
        self.told: dict[bytes, int] = {}
        self.nodes: dict[bytes, int] = {}

    def teardown(self) -> None:
        self.table.close()
        self._directory.cleanup()

    @rule(name=NAMES, file=FILES)
    def learn(self, name: bytes, file: bytes) -> None:
        node = self.table.learn(TOP, name, file)
        assert self.nodes.setdefault(file, node) == node
        self.told[file] = self.told.get(file, 0) + 1
        self.names[name] = file

    @rule(name=NAMES)
    def unbind(self, name: bytes) -> None:
        self.table.unbind(TOP, name)
        self.names.pop(name, None)

    @rule(name=NAMES, new=NAMES, swap=st.booleans())
    def rename(self, name: bytes, new: bytes, swap: bool) -> None:
        if name == new or name not in self.names or (swap and new not in self.names):
            return
        self.table.rename(TOP, name, TOP, new, swap=swap)
        moved, other = self.names.pop(name), self.names.get(new)
        self.names[new] = moved
        if swap and other is not None:
            self.names[name] = other

    @rule(file=FILES, count=st.integers(1, 3))
    def forget(self, file: bytes, count: int) -> None:
        if self.told.get(file, 0) < count:
            return
        self.table.forget([(self.nodes[file], count)])
        self.told[file] -= count
        if not self.told[file]:
            del self.told[file], self.nodes[file]
            self.names = {name: other for name, other in self.names.items() if other != file}

    @invariant()
    def agree(self) -> None:
        for file, node in self.nodes.items():
            assert self.table.identity(node) == file
            named = sorted(name for name, other in self.names.items() if other == file)
            assert sorted(name for _, name in self.table.names(node)) == named
        for name in (b"a", b"b", b"c"):
            held = self.names.get(name)
            assert self.table.child(TOP, name) == (None if held is None else self.nodes[held])
        assert self.table.stats()["known"] == len(self.nodes)


def test_names_are_kept_as_in_a_dictionary() -> None:
    """Whatever is learnt, renamed, swapped, removed and forgotten, in any order."""
    run_state_machine_as_test(
        Model, settings=settings(max_examples=40, stateful_step_count=30, deadline=None)
    )


@given(st.integers(1, 65_535))
def test_any_number_of_a_tree_is_found_in_its_nodes(number: int) -> None:
    """Sixteen bits."""
    assert tree_of(top(number)) == number and is_top(top(number))
