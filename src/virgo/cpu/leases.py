"""Workers leased to clients, as their node gives them out.

A client opens one connection for good (`CPU.CREW key`) and one for each worker that it wants
(`CPU.LEASE`). The connection of a lease is handed to the worker, which greets the client on it (see
`leased`); from then on the node is not in the way of its calls. What the node keeps is the slate, from which
it sees how far the worker is, and the right to take the worker back.

When the first connection closes, the client is gone or has let go of all: its workers may finish what takes
moments, then they are stopped, with whatever they run.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from virgo import context as contexts
from virgo.context import NOBODY, Context
from virgo.cpu import messages
from virgo.cpu.dispatch import Dispatcher
from virgo.cpu.hiring import Hiring
from virgo.cpu.messages import Failure, Options, Terms
from virgo.errors import BadArgument, Denied, VirgoError
from virgo.limits import LEASE_ENDS_MAX, LEASE_LEAVE_S
from virgo.module import NodeServices
from virgo.wire import resp
from virgo.wire.session import Session

_NOT_YOURS = "Leases are for VIRGO's own clients: CPU.CREW comes first, on a connection that stays open."


@dataclass(slots=True)
class _Lease:
    """One lease, asked for or held."""

    number: int
    hiring: Hiring
    task: asyncio.Task[bytes]
    stopped: bool = False  # on the client's request


@dataclass(slots=True)
class _Crew:
    """The leases of one client."""

    owner: str
    leases: dict[int, _Lease] = field(default_factory=dict)
    # How the last ones ended, for the client to ask: an outcome or an error.
    ends: OrderedDict[int, bytes | VirgoError] = field(default_factory=OrderedDict)


class Leases:
    """The leases of a node.

    Args:
        services: the node.
        dispatcher: who says which node has a place.
    """

    def __init__(self, services: NodeServices, dispatcher: Dispatcher) -> None:
        self._services = services
        self._dispatcher = dispatcher
        self._crews: dict[bytes, _Crew] = {}
        self._serial = itertools.count(1)

    def __repr__(self) -> str:
        return f"<Leases {len(self)} of {len(self._crews)} clients>"

    def __len__(self) -> int:
        return sum(len(crew.leases) for crew in self._crews.values())

    def stats(self) -> dict[str, int]:
        """How many are held, and by how many clients."""
        return {"leases": len(self), "lessees": len(self._crews)}

    def crew(self, session: Session, key: bytes) -> list[int]:
        """Let a client lease workers until this connection of it closes; the nodes of this machine.

        Raises:
            BadArgument: the key is none that a client makes.
        """
        if len(key) < 16 or key in self._crews:
            raise BadArgument("the key of a crew is too short, or taken", hint=_NOT_YOURS)
        crew = self._crews[key] = _Crew((contexts.current() or session).identity.name)

        def leave() -> None:
            del self._crews[key]
            asyncio.get_running_loop().call_later(LEASE_LEAVE_S, _stop_all, crew)

        session.at_end.append(leave)
        machine = self._services.member(self._services.number).machine
        return [member.number for member in self._services.members() if member.machine == machine]

    async def lease(self, session: Session, options: Options) -> Any:
        """Hand the connection to a worker, or say which other node has one: `[name, socket or "", places]`.

        Raises:
            VirgoError: there is no worker to be had.
        """
        if session.remote:
            raise BadArgument("workers are leased by the node's Unix socket alone", hint=_NOT_YOURS)
        crew = self._find(options.crew)
        context = contexts.current() or Context(id=contexts.new_id(), identity=session.identity)
        identity = context.identity
        number = next(self._serial)
        hiring = Hiring(options.crew, session.duplicate)
        memory = self._services.config.cpu.memory_bytes
        name = self._services.name
        terms = Terms(number, name, contexts.new_id(), identity.may("exec"), identity, memory)
        with contexts.using(context):
            task = asyncio.get_running_loop().create_task(self._hold(crew, number, options, hiring, terms))
        crew.leases[number] = _Lease(number, hiring, task)
        either: list[asyncio.Future[Any]] = [task, hiring.handed]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if not hiring.handed.done():
                task.cancel()
            raise
        if hiring.handed.done():
            session.abort()
            return resp.OK  # to nobody
        task.result()
        return hiring.elsewhere

    async def stop(self, crew: bytes, number: int) -> bool:
        """End a lease, with what its worker runs; True when that is dead, False if it had ended."""
        lease = self._find(crew).leases.get(number)
        if lease is None:
            return False
        lease.stopped = True
        lease.task.cancel()
        await asyncio.wait([lease.task])
        return True

    async def end(self, crew: bytes, number: int) -> bytes:
        """How a lease ended, as an outcome; waits for that. Raises VirgoError."""
        found = self._find(crew)
        lease = found.leases.get(number)
        if lease is not None:
            await asyncio.wait([lease.task])
        end = found.ends.get(number)
        if end is None:
            raise BadArgument(f"this client had no lease {number} lately", hint=_NOT_YOURS)
        if isinstance(end, VirgoError):
            raise end
        return end

    async def _hold(self, crew: _Crew, number: int, options: Options, hiring: Hiring, terms: Terms) -> bytes:
        end: bytes | VirgoError = b""
        try:
            node, end = await self._dispatcher.lease(options, hiring, terms)
            if node != self._services.number:
                hiring.elsewhere = self._place(node)
            return end
        except VirgoError as error:
            end = error
            raise
        except asyncio.CancelledError:
            end = messages.failed(
                Failure("its worker was stopped on request", cause="cancelled", node=self._services.name)
            )
            if not crew.leases[number].stopped:
                raise
            return end
        finally:
            del crew.leases[number]
            crew.ends[number] = end
            if len(crew.ends) > LEASE_ENDS_MAX:
                crew.ends.popitem(last=False)

    def _place(self, number: int) -> list[str | int]:
        member, own = self._services.member(number), self._services.member(self._services.number)
        near = member.machine == own.machine
        return [member.name, member.socket if near else "", max(1, member.load.workers)]

    def _find(self, key: bytes) -> _Crew:
        crew = self._crews.get(key)
        if crew is None or crew.owner != _identity().name:
            raise Denied("this client has no crew here, or it is another identity's", hint=_NOT_YOURS)
        return crew


def _identity() -> contexts.Identity:
    context = contexts.current()
    return NOBODY if context is None else context.identity


def _stop_all(crew: _Crew) -> None:
    for lease in crew.leases.values():
        lease.task.cancel()
