"""The simulation of placement: its rules, on few nodes."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ElementTree

from benchmarks.placement import AGES, LeastLoaded, picture, policies, quantile, waits


def p99(name: str, age: float) -> float:
    chance = random.Random(5)
    return quantile(waits(policies(300, age, chance)[name], 300, age, chance), 0.99)


def test_virgos_rule_is_good_at_every_age() -> None:
    """Far better than random with fresh figures, far better than least loaded with old ones."""
    assert p99("virgo", 0.1) < 0.6 * p99("random", 0.1)
    assert p99("virgo", 10.0) < 0.75 * p99("least loaded", 10.0)
    assert p99("virgo", 0.1) < p99("best of two", 0.1)


def test_least_loaded_knows_the_fewest() -> None:
    """Whatever is heard, in any order."""
    chance = random.Random(2)
    policy = LeastLoaded(20, chance)
    calls = [0] * 20
    for _ in range(2000):
        node = chance.randrange(20)
        calls[node] = chance.randrange(5)
        policy.heard(node, calls[node])
        assert calls[policy.place()] == min(calls)


def test_the_picture_is_one() -> None:
    """Well-formed, with a line and a name for each rule."""
    found = {name: dict.fromkeys(AGES, (1.0, 5.0)) for name in policies(1, 1.0, random.Random())}
    root = ElementTree.fromstring(picture(found, 300))
    tags = [element.tag.rpartition("}")[2] for element in root]
    assert tags.count("polyline") == 4
    words = [element.text for element in root if element.tag.endswith("text")]
    assert set(found) <= set(words)
    heights = {float(element.get("y", 0)) for element in root if element.text in found}
    assert len(heights) == 4
