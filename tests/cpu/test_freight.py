"""Large buffers between nodes, without the nodes: two of them in one process, and what lies between them."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from virgo.cpu import freight, landing, messages
from virgo.cpu.apart import AT_HAND, Apart, load_at_hand
from virgo.cpu.freight import AFAR, Freight
from virgo.cpu.shipping import ship_arguments
from virgo.errors import BadArgument, Busy, CallFailed, NodeLost, UnknownId
from virgo.limits import FREIGHT_PIECE_BYTES

ARRAY = numpy.arange(5 * FREIGHT_PIECE_BYTES // 8 + 1, dtype=float)


class Wire:
    """Two nodes, which ask each other for pieces.

    Attributes:
        asked: pieces asked for so far, and at_once, the most of them at the same time.
        lost_at: after so many nobody answers.
    """

    def __init__(self) -> None:
        self.asked = self.at_once = self._flying = 0
        self.lost_at = 1 << 30
        self.nodes = {number: self._node(number) for number in (1, 2)}

    def _node(self, number: int) -> Freight:
        return Freight(SimpleNamespace(name=f"n{number}", number=number, call=self.call))  # type: ignore[arg-type]

    async def call(self, number: int, verb: str, token: str, at: int, size: int) -> bytes:
        assert verb == "CPU.FREIGHT"
        self.asked += 1
        self._flying += 1
        self.at_once = max(self.at_once, self._flying)
        await asyncio.sleep(0)
        self._flying -= 1
        if self.asked > self.lost_at:
            raise NodeLost("n1 is lost")
        return self.nodes[number].serve(token, at, size)


def arguments() -> Apart:
    found = ship_arguments((ARRAY, 3), {}, segments=True)
    assert isinstance(found, Apart)
    return found


def result(place: landing.Place) -> bytes:
    outcome = messages.pickled(ARRAY, land=place.address)
    assert isinstance(outcome, bytes)
    return outcome


def test_arguments_arrive_as_they_were() -> None:
    """In pieces, some at a time; nothing is offered any more when the call is over."""
    wire, kept = Wire(), arguments()

    async def main() -> Any:
        with wire.nodes[1].sent("f", [kept.at_hand()]) as sent:
            assert sent[0][:1] == AFAR
            async with wire.nodes[2].taken("f", sent) as here:
                assert here[0][:1] == AT_HAND
                found = load_at_hand(here[0])
        with pytest.raises(UnknownId):
            async with wire.nodes[2].taken("f", sent):
                pass
        return found

    (array, three), _ = asyncio.run(main())
    array += 1  # it is the worker's own
    assert three == 3 and (array == ARRAY + 1).all()
    assert 6 <= wire.asked <= 11 and wire.at_once == freight.FREIGHT_AT_ONCE


def test_results_arrive_where_they_are_waited_for() -> None:
    """They are taken once, and then their memory is given back where they were made."""
    wire, made, wanted = Wire(), landing.Landing().place(), landing.place()

    async def main() -> bytes:
        offered = wire.nodes[2].offered(result(made), made)
        landed = await wire.nodes[1].landed("f", offered, wanted.address)
        with pytest.raises(CallFailed, match="cannot be kept here"):
            await wire.nodes[1].landed("f", offered, wanted.address)
        return landed

    found = messages.as_result(messages.arrived(asyncio.run(main()), wanted), trusted=True)
    assert (found == ARRAY).all()
    assert "0 to be taken" in repr(wire.nodes[2])


def test_what_nobody_takes_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freight, "FREIGHT_KEPT_S", 0.05)
    node, place = Wire().nodes[2], landing.Landing().place()

    async def main() -> None:
        node.offered(result(place), place)
        assert "1 to be taken" in repr(node)
        await asyncio.sleep(0.2)

    asyncio.run(main())
    assert "0 to be taken" in repr(node)


def test_a_node_that_is_lost_on_the_way_is_an_error_of_the_call() -> None:
    wire, kept = Wire(), arguments()
    wire.lost_at = 3

    async def main() -> None:
        with wire.nodes[1].sent("f", [kept.at_hand()]) as sent:
            async with wire.nodes[2].taken("f", sent):
                pass

    with pytest.raises(NodeLost):
        asyncio.run(main())


def test_no_room_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """For arguments the node is busy, so that another may run the call; for a result the call has failed."""

    def full(*_args: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(freight, "write", full)
    wire, kept, made, wanted = Wire(), arguments(), landing.Landing().place(), landing.place()

    async def main() -> None:
        with wire.nodes[1].sent("f", [kept.at_hand()]) as sent, pytest.raises(Busy, match="no room"):
            async with wire.nodes[2].taken("f", sent):
                pass
        offered = wire.nodes[2].offered(result(made), made)
        with pytest.raises(CallFailed, match="no room"):
            await wire.nodes[1].landed("f", offered, wanted.address)

    asyncio.run(main())


def test_only_what_is_offered_is_served() -> None:
    node, kept = Wire().nodes[1], arguments()
    with node.sent("f", [kept.at_hand()]):
        (token,) = node._cargo
        size = node._cargo[token].size
        assert len(node.serve(token, 0, 10)) == 10
        assert len(node.serve(token, size - 1, 1)) == 1
        for at, count in ((-1, 1), (0, 0), (0, -5), (size, 1), (size - 1, 2), (0, FREIGHT_PIECE_BYTES + 1)):
            with pytest.raises(BadArgument):
                node.serve(token, at, count)
    with pytest.raises(UnknownId):
        node.serve(token, 0, 10)
