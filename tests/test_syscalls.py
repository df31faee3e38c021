"""The nine calls in their C shape, and what they refuse before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import virgo
from conftest import RunningCloud
from virgo import syscalls
from virgo.errors import BadArgument
from virgo.members import compose_id


@pytest.fixture
def here(cloud3: RunningCloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningCloud]:
    """The process's own connection leads to the shared cloud, for the time of a test."""
    monkeypatch.setenv("VIRGO_HOME", str(cloud3.home))
    monkeypatch.delenv("VIRGO_URL", raising=False)
    syscalls.close()
    yield cloud3
    syscalls.close()


def test_the_nine_calls(here: RunningCloud) -> None:
    """Each gives what its table says."""
    assert virgo.virgo_clone(pow, 2, 10) == 1024
    identifier = virgo.virgo_malloc(10)
    assert isinstance(identifier, int)
    assert virgo.virgo_get(identifier) == b""
    virgo.virgo_set(identifier, bytearray(b"data"))
    assert virgo.virgo_get(identifier) == b"data"
    virgo.virgo_free(identifier)
    descriptor = virgo.virgo_open("/n2/syscalls")
    assert virgo.virgo_write(descriptor, memoryview(b"content"), 0) == 7
    assert virgo.virgo_read(descriptor, 100, 3) == b"tent"
    assert virgo.virgo_read(descriptor, 100, 7) == b""
    virgo.virgo_close(descriptor)
    syscalls.cloud().files.remove("/n2/syscalls")


_ID = compose_id(1, 1)
_WRONG: list[tuple[str, Callable[[], Any], str]] = [
    ("malloc(True)", lambda: virgo.virgo_malloc(True), "the size must be a whole number, not True (bool)"),
    ("malloc(1.5)", lambda: virgo.virgo_malloc(1.5), "not 1.5 (float)"),  # type: ignore[arg-type]
    ("malloc('9')", lambda: virgo.virgo_malloc("9"), "not '9' (str)"),  # type: ignore[arg-type]
    ("malloc(None)", lambda: virgo.virgo_malloc(None), "the size"),  # type: ignore[arg-type]
    ("get('x')", lambda: virgo.virgo_get("x"), "the id must be a whole number"),  # type: ignore[arg-type]
    ("get(1.0)", lambda: virgo.virgo_get(1.0), "the id"),  # type: ignore[arg-type]
    ("free(None)", lambda: virgo.virgo_free(None), "the id"),  # type: ignore[arg-type]
    ("set('x')", lambda: virgo.virgo_set("x", b""), "the id"),  # type: ignore[arg-type]
    ("set(str)", lambda: virgo.virgo_set(_ID, "text"), "bytes, not str"),  # type: ignore[arg-type]
    ("open(5)", lambda: virgo.virgo_open(5), "a path is text, not int"),  # type: ignore[arg-type]
    ("open(mode)", lambda: virgo.virgo_open("/n1/x", 5), "a mode is text, not int"),  # type: ignore[arg-type]
    ("read(size)", lambda: virgo.virgo_read(_ID, "a", 0), "the size"),  # type: ignore[arg-type]
    ("read(fd)", lambda: virgo.virgo_read("a", 1, 0), "the descriptor"),  # type: ignore[arg-type]
    ("read(position)", lambda: virgo.virgo_read(_ID, 1, None), "the position"),  # type: ignore[arg-type]
    ("write(str)", lambda: virgo.virgo_write(_ID, "text", 0), "bytes, not str"),  # type: ignore[arg-type]
    ("write(position)", lambda: virgo.virgo_write(_ID, b"", 0.5), "the position"),  # type: ignore[arg-type]
    ("write(fd)", lambda: virgo.virgo_write(None, b"", 0), "the descriptor"),  # type: ignore[arg-type]
    ("close(True)", lambda: virgo.virgo_close(True), "the descriptor"),
    ("clone(5)", lambda: virgo.virgo_clone(5), "a callable or a name"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "said"), [case[1:] for case in _WRONG], ids=[case[0] for case in _WRONG])
def test_a_wrong_type_is_a_bad_argument(here: RunningCloud, call: Callable[[], Any], said: str) -> None:
    """Never a raw TypeError from within: BadArgument that names the argument, with a hint."""
    with pytest.raises(BadArgument) as caught:
        call()
    assert said in caught.value.message
    assert caught.value.hint


def test_clients_refuse_the_same(here: RunningCloud) -> None:
    """What the nine calls refuse, the objects of `virgo.connect()` refuse too."""
    with here.connect() as cloud:
        calls: list[Callable[[], Any]] = [
            lambda: cloud.memory.malloc(True),
            lambda: cloud.memory.region("x"),  # type: ignore[arg-type]
            lambda: cloud.memory.get_region("x"),  # type: ignore[arg-type]
            lambda: cloud.files.read(_ID, 1.5, 0),  # type: ignore[arg-type]
            lambda: cloud.files.truncate(_ID, "x"),  # type: ignore[arg-type]
            lambda: cloud.files.write_bytes("/n1/wrong", "text"),  # type: ignore[arg-type]
            lambda: cloud.files.close("x"),  # type: ignore[arg-type]
            lambda: cloud.client.execute("GET", None),  # type: ignore[arg-type]
            lambda: cloud.client.execute("GET", "\udcff", [1]),  # type: ignore[arg-type]
            lambda: cloud.client.execute("GET", True),
        ]
        for call in calls:
            with pytest.raises(BadArgument) as caught:
                call()
            assert caught.value.hint
        assert isinstance(caught.value, TypeError), "it is Python's own class too"


class Index:
    """A whole number of another make, as numpy's are."""

    def __index__(self) -> int:
        return 10


def test_whole_numbers_of_any_make_are_taken(here: RunningCloud) -> None:
    """What Python takes as an index is a size."""
    virgo.virgo_free(virgo.virgo_malloc(Index()))  # type: ignore[arg-type]
