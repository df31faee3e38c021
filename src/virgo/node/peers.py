"""Calls to other nodes, each on a connection of its own, and their bounded failure.

A peer on this machine is reached by its Unix socket, any other by TLS. When membership loses a node, all
calls in flight to it fail with NodeLost at once, so that a stopped or partitioned node is an error in
bounded time and never a hang.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections.abc import Callable
from typing import Any

from virgo import context as contexts
from virgo.errors import DeadlineExceeded, NodeLost, NoNode, NotRunning
from virgo.limits import REQUEST_DEADLINE_S
from virgo.members import Member
from virgo.wire.aclient import AsyncClient, AsyncConnection
from virgo.wire.address import Address, of_member
from virgo.wire.client import failure, pack


class Peers:
    """Clients of the other nodes.

    Args:
        find: the member of a number, or None.
        is_up: whether it is up.
        suspect: told of a peer that did not answer.
        machine: this machine's id.
        tls: context for peers on other machines.
    """

    def __init__(
        self,
        *,
        find: Callable[[int], Member | None],
        is_up: Callable[[int], bool],
        suspect: Callable[[int], None],
        machine: str,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._find = find
        self._is_up = is_up
        self._suspect = suspect
        self._machine = machine
        self._tls = tls
        self._clients: dict[int, AsyncClient] = {}
        self._flying: dict[int, set[AsyncConnection]] = {}

    def __repr__(self) -> str:
        return f"<Peers {len(self._clients)} known, {sum(map(len, self._flying.values()))} calls>"

    async def call(self, number: int, *request: bytes | str | int, timeout_s: float | None = None) -> Any:
        """See `virgo.module.NodeServices.call`."""
        member = self._find(number)
        if member is None:
            raise NoNode(f"no node has the number {number}")
        if not self._is_up(number):
            raise NodeLost(f"{_name(request[0])}: node {member.name} is lost")
        limit = _limit(timeout_s)
        client = self._client(member)
        try:
            connection = await client.take()
        except NotRunning as error:
            self._suspect(number)
            raise NodeLost(f"{_name(request[0])}: node {member.name} does not answer") from error
        flying = self._flying.setdefault(number, set())
        flying.add(connection)
        try:
            async with asyncio.timeout(limit):
                reply = await connection.request(pack(request, limit))
        except TimeoutError:
            connection.close()
            raise DeadlineExceeded(
                f"{_name(request[0])}: node {member.name} did not answer within {limit:g} s"
            ) from None
        except NodeLost as error:
            self._suspect(number)
            raise NodeLost(f"{_name(request[0])}: node {member.name} was lost during the call") from error
        except BaseException:
            connection.close()
            raise
        finally:
            flying.discard(connection)
        client.give(connection)
        refusal = failure(reply)
        if refusal is not None:
            raise refusal
        return reply

    def lose(self, member: Member) -> None:
        """The member is lost: fail what is in flight to it and forget how to reach it."""
        for connection in list(self._flying.get(member.number, ())):
            connection.close()
        self._clients.pop(member.number, None)

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.close()
        self._clients.clear()

    def _client(self, member: Member) -> AsyncClient:
        address = self._address(member)
        client = self._clients.get(member.number)
        if client is None or client.address != address:
            client = self._clients[member.number] = AsyncClient(address, tls=self._tls)
        return client

    def _address(self, member: Member) -> Address:
        address = of_member(member, self._machine)
        if address is None:
            raise NodeLost(
                f"node {member.name} cannot be reached from this machine",
                hint="Start it with --bind ADDRESS and certificates from `virgo ca issue`.",
            )
        return address


def _limit(timeout_s: float | None) -> float | None:
    """Seconds that a call may take: what was asked, within what the context has left."""
    context = contexts.current()
    left = None if context is None or context.deadline is None else context.deadline - time.monotonic()
    if timeout_s is None:
        return left if left is not None else REQUEST_DEADLINE_S
    if math.isinf(timeout_s):
        return left
    return timeout_s if left is None else min(left, timeout_s)


def _name(word: bytes | str | int) -> str:
    return word.decode("utf-8", "replace") if isinstance(word, bytes) else str(word)
