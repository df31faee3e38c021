"""`virgo memory`: the pool for people and for scripts."""

from __future__ import annotations

import json

from cli.conftest import Virgo
from conftest import RunningCloud
from virgo.cli.memory import rates
from virgo.memory.figures import NodePool, Pool


def test_the_pool_and_its_namespaces(on: Virgo, cloud3: RunningCloud) -> None:
    """Every node has a line with its figures, every namespace one with its keys on all nodes."""
    with cloud3.connect("n2") as cloud:
        space = cloud.memory.namespace("cli", cache=True)
        space.set_many({str(number): b"v" * 100 for number in range(200)})
        cloud.memory.namespace("cli kept", copies=2)["k"] = b"v"
    pool = on("memory", "--json").json
    assert [node["name"] for node in pool["nodes"]] == ["n1", "n2", "n3"]
    assert all(node["figures"]["capacity_bytes"] > 0 for node in pool["nodes"])
    spaces = {space["name"]: space for space in pool["namespaces"]}
    assert (spaces["cli"]["keys"], spaces["cli"]["cache"]) == (200, True)
    assert spaces["cli"]["key_bytes"] > 20_000
    assert spaces["{*2}cli kept"]["keys"] == 1, "its copy is no key of its own"
    assert on("memory", "show", "--json").json["nodes"][0]["name"] == "n1"
    shown = on("memory").text
    assert all(word in shown for word in ("n1", "n3", "CAPACITY", "FRAGMENTED", "cli", "may be evicted"))
    assert on("memory", "drop", "cli").text == "Dropped the keys that begin with cli:\n"
    assert on("memory", "drop", "cli kept", "--json").json == {"dropped": "cli kept"}
    spaces = {space["name"]: space for space in on("memory", "--json").json["namespaces"]}
    assert (spaces["cli"]["keys"], spaces["cli"]["generation"]) == (0, 2)
    assert "colon" in on("memory", "drop", "a:b", status=1).err


def test_top_shows_rates(on: Virgo) -> None:
    """As often as wanted: a table for each look, or a line of JSON."""
    lines = on("memory", "top", "--count", 2, "--interval", 0.1, "--json").text.splitlines()
    assert len(lines) == 2
    assert {node["node"] for node in json.loads(lines[0])} == {"n1", "n2", "n3"}
    shown = on("memory", "top", "--count", 1, "--interval", 0.1).text
    assert "GETS/S" in shown
    assert "\x1b" not in shown
    assert on("memory", "top", "--interval", 0, status=2).err


def test_help_names_the_verbs(on: Virgo) -> None:
    """`virgo memory --help` is about the group, not about its first verb."""
    shown = on("memory", "--help").text
    assert all(verb in shown for verb in ("show", "drop", "top"))
    assert "memory" in on("--help").text


def test_rates_of_nodes_that_come_and_go() -> None:
    """One that restarted counts from nothing; one that is lost has its reason; a new one has no past."""
    full = {"hits": 30, "misses": 10, "transactions": 50, "keys_evicted": 4, "used_bytes": 1, "keys": 2}
    figures = {**full, "readers": 3}
    less = {**figures, "hits": 0, "misses": 0}
    before = Pool([NodePool("a", {**less, "transactions": 0}), NodePool("b", figures)], [])
    now = Pool(
        [NodePool("a", figures), NodePool("b", less), NodePool("c", error="gone"), NodePool("d", less)], []
    )
    found = {node["node"]: node for node in rates(before, now, 2.0)}
    assert (found["a"]["gets_per_s"], found["a"]["hit_rate"], found["a"]["changes_per_s"]) == (20, 0.75, 25)
    assert (found["b"]["gets_per_s"], found["b"]["hit_rate"]) == (0, None)
    assert found["c"] == {"node": "c", "error": "gone"}
    assert found["d"]["changes_per_s"] == 0
