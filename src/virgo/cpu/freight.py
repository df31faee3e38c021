"""Large buffers on their way between machines: taken in pieces by the node that needs them, as memory.

A call for another machine, and a result from there, say only where their buffers are to be had: from which
node, under which token. The node that gets them asks for piece after piece (`CPU.FREIGHT`), some at a time,
and writes each where it is to lie: arguments in memory that the worker maps, a result where it is waited for
(see `landing`). So no node holds more than some pieces, and none is busy with one request for long.

In bytes this begins with AFAR, and goes on with a MessagePack array: the pickle, the places and sizes of the
buffers, the node's number, the token, and how many bytes all take.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from virgo.cpu import apart, landing
from virgo.cpu.apart import AT_HAND, LANDED, Buffers
from virgo.cpu.landing import Address, Place
from virgo.cpu.segments import Segment, made, read, write
from virgo.errors import BadArgument, Busy, CallFailed, UnknownId
from virgo.limits import FREIGHT_AT_ONCE, FREIGHT_KEPT_S, FREIGHT_PIECE_BYTES
from virgo.module import NodeServices
from virgo.parallel import gather

AFAR: Final = b"A"
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(tuple[bytes, list[int], list[int], int, str, int]).decode


@dataclass(slots=True)
class _Cargo:
    """Buffers that are to be taken: `size` bytes of a segment from `start` on."""

    segment: Segment
    start: int
    size: int
    left: int
    place: Place | None = None
    end: asyncio.TimerHandle | None = None


class Freight:
    """What this node has for others, and takes from them.

    Args:
        services: the node.
    """

    def __init__(self, services: NodeServices) -> None:
        self._services = services
        self._cargo: dict[str, _Cargo] = {}

    def __repr__(self) -> str:
        return f"<Freight of {self._services.name}, {len(self._cargo)} to be taken>"

    # --- arguments ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def sent(self, label: str, arguments: list[bytes]) -> Iterator[list[bytes]]:
        """Arguments for another machine, while the block runs. Raises BadArgument."""
        if not arguments or arguments[0][:1] != AT_HAND:
            yield arguments
            return
        try:
            buffers, address = apart.unpack_at_hand(arguments[0])
            cargo = _Cargo(landing.reached(address), address[-1], buffers.size, buffers.size)
        except (OSError, ValueError) as error:
            raise BadArgument(
                f"the arguments of {label} cannot be read: {error}",
                hint="They lie in the memory of whoever sent the call, who must wait for it.",
            ) from None
        token, data = self._offer(buffers, cargo)
        try:
            yield [data]
        finally:
            self._cargo.pop(token, None)

    @contextlib.asynccontextmanager
    async def taken(self, label: str, arguments: Sequence[bytes]) -> AsyncIterator[list[bytes]]:
        """Arguments that another machine sent, at hand for workers here while the block runs. Raises Busy."""
        if not arguments or arguments[0][:1] != AFAR:
            yield list(arguments)
            return
        segment = made("virgo-freight")  # which a worker may keep beyond the call
        buffers = await self._take(arguments[0], segment, 0, f"the arguments of {label}")
        yield [apart.at_hand(buffers, landing.address_of(segment))]
        del segment  # until here it was open

    # --- results ------------------------------------------------------------------------------

    def offered(self, outcome: bytes, place: Place) -> bytes:
        """An outcome for another machine, which takes what has landed here, or loses it."""
        if outcome[:1] != LANDED:
            return outcome
        buffers, start = apart.unpack_landed(outcome)
        cargo = _Cargo(place.segment, start, buffers.size, buffers.size, place)
        token, data = self._offer(buffers, cargo)
        self._keep(token, cargo)
        return data

    async def landed(self, label: str, outcome: bytes, land: Address | None) -> bytes:
        """An outcome of another machine, with its buffers where they are waited for. Raises CallFailed."""
        if outcome[:1] != AFAR:
            return outcome
        assert land is not None  # or nobody would have been asked to offer them
        what = f"the result of {label}"
        try:
            segment = landing.reached(land)
            buffers = await self._take(outcome, segment, land[-1], what)
        except (OSError, Busy, UnknownId) as error:
            raise CallFailed(f"{what} cannot be kept here: {error}", cause="result") from None
        return apart.landed(buffers, land)

    # --- pieces -------------------------------------------------------------------------------

    def serve(self, token: str, at: int, size: int) -> bytes:
        """A piece of what is offered. Raises UnknownId, BadArgument."""
        cargo = self._cargo.get(token)
        if cargo is None:
            raise UnknownId("nothing is offered under this token", hint="It is taken at once, and once.")
        if not (0 <= at < cargo.size and 0 < size <= min(FREIGHT_PIECE_BYTES, cargo.size - at)):
            raise BadArgument(
                f"there is no piece of {size} bytes at {at}",
                hint="CPU.FREIGHT is for nodes alone.",
            )
        piece = read(cargo.segment, cargo.start + at, size)
        cargo.left -= size
        if cargo.place is not None:
            self._keep(token, cargo)
        return piece

    def _offer(self, buffers: Buffers, cargo: _Cargo) -> tuple[str, bytes]:
        token = os.urandom(16).hex()
        self._cargo[token] = cargo
        return token, AFAR + _pack([*buffers, self._services.number, token, cargo.size])

    def _keep(self, token: str, cargo: _Cargo) -> None:
        """Keep what is to be taken, for as long as somebody takes it."""
        if cargo.end is not None:
            cargo.end.cancel()
        if cargo.left > 0:
            loop = asyncio.get_running_loop()
            cargo.end = loop.call_later(FREIGHT_KEPT_S, self._cargo.pop, token, None)
        else:
            del self._cargo[token]

    async def _take(self, data: bytes, segment: Segment, start: int, what: str) -> Buffers:
        """Take what is offered, and write it there. Raises Busy if there is no room, NodeLost, UnknownId."""
        pickled, places, sizes, node, token, size = _unpack(memoryview(data)[1:])

        async def take(at: int) -> None:
            count = min(FREIGHT_PIECE_BYTES, size - at)
            piece = await self._services.call(node, "CPU.FREIGHT", token, at, count)
            try:
                write(segment, memoryview(piece), start + at)
            except OSError as error:
                raise Busy(f"there is no room for {what}: {error.strerror}") from None

        await gather(map(take, range(0, size, FREIGHT_PIECE_BYTES)), at_once=FREIGHT_AT_ONCE)
        return Buffers(pickled, places, sizes)
