"""Values where they lie, for the time of a block: not copied, not changed by others, not used afterwards."""

from __future__ import annotations

import os
import threading

import pytest

from conftest import RunningCloud


def test_a_view_is_the_value_as_of_its_beginning(cloud3: RunningCloud) -> None:
    """What is set meanwhile, by anyone, shows in the next view; nobody is held up."""
    with cloud3.connect("n1") as cloud, cloud3.connect("n1") as other:
        memory = cloud.memory
        for size in (0, 1, 4000, 100_000, 3_000_000):
            value = os.urandom(size)
            memory["view"] = value
            with memory.view("view") as held:
                assert held == value
                assert held.readonly
                for number in range(20):
                    other.memory["view"] = b"%d" % number
                    cloud.client.execute("SET", f"view {number}", b"x" * 10_000)
                assert held == value, "its pages were used anew"
            with memory.view(b"view") as held:
                assert held == b"19"


def test_after_the_block_it_cannot_be_used(cloud3: RunningCloud) -> None:
    """The view is released, whatever ended the block, and reading goes on."""
    with cloud3.connect("n1") as cloud:
        cloud.memory["used late"] = b"12345678" * 1000
        with cloud.memory.view("used late") as held:
            assert sum(held[:8]) == sum(b"12345678")
        with pytest.raises(ValueError, match="released"):
            bytes(held)
        with pytest.raises(LookupError), cloud.memory.view("used late") as held:
            raise LookupError
        with pytest.raises(ValueError, match="released"):
            bytes(held)
        assert cloud.memory["used late"] == b"12345678" * 1000


def test_absent_and_elsewhere(cloud3: RunningCloud) -> None:
    """An absent key is a KeyError; one of another node, or that expires, is a view of a copy."""
    with cloud3.connect("n1") as cloud, cloud3.connect("n2") as far:
        with pytest.raises(KeyError):
            cloud.memory.view("absent")
        names = [f"elsewhere {number}" for number in range(30)]
        cloud.memory.set_many({name: name.encode() for name in names})
        far.memory.set("timed", b"t", ttl_s=60)
        space = cloud.memory.namespace("views")
        space["k"] = b"spaced"
        for name in names:
            with far.memory.view(name) as held:
                assert held == name.encode()
        with cloud.memory.view("timed") as held, space.view("k") as other:
            assert (bytes(held), bytes(other)) == (b"t", b"spaced")


def test_a_fork_and_threads_beside_a_view(cloud3: RunningCloud) -> None:
    """A child that is made within a block maps anew; views of several threads stand side by side."""
    with cloud3.connect("n1") as cloud:
        memory = cloud.memory
        memory["forked"] = b"v" * 50_000
        with memory.view("forked") as held:
            child = os.fork()
            if not child:
                try:
                    with memory.view("forked") as own:
                        os._exit(int(own != b"v" * 50_000))
                finally:
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
            assert held == b"v" * 50_000
            memory["forked"] = b"w" * 50_000
            assert memory.mapped, "it is still the parent's"
            assert held == b"v" * 50_000
        failures: list[str] = []

        def look() -> None:
            for _ in range(300):
                with memory.view("forked") as one, memory.view("forked") as two:
                    if {*one[::7]} == {*b"vw"} or {*two[::7]} == {*b"vw"} or len(one) != 50_000:
                        failures.append("torn")
                memory["forked"] = b"w" * 50_000

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
