"""How a crew comes by workers: whom it asks for one, and when."""

from __future__ import annotations

import select
import time
from collections import deque
from typing import Final

from virgo.context import Identity
from virgo.cpu.bench import Bench, errand, taken
from virgo.cpu.calls import Item, may_go_again, pause_s
from virgo.cpu.contact import Contact, Hire, NotHired
from virgo.cpu.lane import Lane
from virgo.errors import NodeLost, NotRunning, VirgoError
from virgo.limits import (
    LEASE_AWAY_S,
    LEASE_LOOK_S,
    LEASE_TURN_S,
    LEASE_WORTH_S,
    LEASES_MAX,
    LIFE_QUIET_S,
)
from virgo.wire.address import Address
from virgo.wire.client import Client
from virgo.wire.pool import not_connected

_AGAIN_S: Final = 0.05  # after a node refused a worker


class Hires:
    """The workers that are asked for, at most one at a time for each node that calls must run on.

    Args:
        bench: where they go, and the calls for which they are wanted.
        client: connections to the node that says who has a worker.
        identity: for whom they are, None for who the connections are.
    """

    def __init__(self, bench: Bench, client: Client, identity: Identity | None) -> None:
        self._bench = bench
        self._identity = identity
        self._home = Contact(client, identity)
        self._contacts = {"": self._home}
        self._open: dict[str, Hire] = {}
        self._meeting: set[str] = set()  # calls of which wait until we know the node to be asked
        self._refused_at = 0.0
        self._short_since = 0.0  # since when calls have found no worker with room

    def __repr__(self) -> str:
        return f"<Hires {len(self._open)} open>"

    def __bool__(self) -> bool:
        return bool(self._open or self._meeting)

    def at_hand(self, number: int) -> bool:
        """Whether a node is of this machine, as far as is known."""
        machine = self._home.machine
        return not machine or number in machine

    def enough(self) -> None:
        """A call has found a worker with room."""
        self._short_since = 0.0

    def want(self, node: str, queue: deque[Item]) -> None:
        """Calls have found no worker: ask for one, if it would have something to do."""
        bench, now = self._bench, time.monotonic()
        self._short_since = self._short_since or now
        took_s = bench.durations.expect(queue[0].task.key)
        worth = took_s is None or not bench.busy or len(queue) * took_s > LEASE_WORTH_S
        if node in self._open or node in self._meeting or not worth or len(bench.lanes) >= LEASES_MAX:
            return
        if now < self._refused_at + _AGAIN_S:
            return
        quick = took_s is not None and took_s < LEASE_AWAY_S and bool(bench.lanes)
        near = not node and (quick or now - self._short_since < LEASE_AWAY_S)
        self._ask(self._home, node, near=near)

    def on_event(self, descriptor: int) -> None:
        """A node has answered."""
        for node, hire in list(self._open.items()):
            if hire.fileno() == descriptor:
                self._on_answer(node, hire)

    def look(self, now: float) -> None:
        """What is due: drop what is not needed, or asked for too narrowly; look after silent nodes."""
        for node, hire in list(self._open.items()):
            needed = bool(self._bench.queues.get(node))
            if now - hire.since > (hire.patience_s if needed else LEASE_LOOK_S):
                self._drop(node)
            elif not hire.extra and not self._bench.lanes:
                # The last worker was recalled meanwhile: what waits now may be what all others wait for.
                self._drop(node)
            elif now - hire.asked > LIFE_QUIET_S:
                hire.asked = now
                errand(self._look_for_life, node, hire)

    def close(self) -> None:
        """Ask for no more, and give everything back."""
        for node in list(self._open):
            self._drop(node)
        for contact in self._contacts.values():
            contact.close()

    def _ask(self, contact: Contact, node: str, *, near: bool, name: str = "") -> None:
        if not contact.known:
            self._meeting.add(node)
            errand(self._meet, contact, node, near, name)
            return
        try:
            hire = contact.hire(node=name or node, extra=not self._bench.lanes, near=near)
        except VirgoError as error:
            self._refuse(node, error)
            return
        if near:
            hire.patience_s = LEASE_LOOK_S
        elif name:  # meanwhile another one may have become free; but this one may have to make the worker
            hire.patience_s = 3 * LEASE_TURN_S
        self._open[node] = hire
        self._bench.epoll.register(hire.fileno(), select.EPOLLIN)

    def _meet(self, contact: Contact, node: str, near: bool, name: str) -> None:
        """Beside the thread: get to know a node, then ask it."""
        refusal: VirgoError | None = None
        try:
            contact.introduce()
        except VirgoError as error:
            refusal = error
        except OSError as error:
            refusal = not_connected(contact.address, error)

        def go_on() -> None:
            self._meeting.discard(node)
            if refusal is not None and name:  # it was named to us, but cannot be reached from here
                self._send_elsewhere(node, 1)
            elif refusal is not None:
                self._refuse(node, refusal)
            elif not self._bench.closed:
                self._ask(contact, node, near=near, name=name)
            else:
                contact.close()

        self._bench.tell(go_on)

    def _drop(self, node: str) -> None:
        hire = self._open.pop(node)
        self._bench.epoll.unregister(hire.fileno())
        hire.close()

    def _on_answer(self, node: str, hire: Hire) -> None:
        try:
            answer = hire.answer()
        except NotHired as error:
            self._drop(node)
            if hire.contact.known:  # the worker died while it was handed over
                self._refused_at = time.monotonic()
            else:
                self._refuse(node, error)
            return
        except VirgoError as error:
            self._drop(node)
            self._refuse(node, error)
            return
        if isinstance(answer, Lane):
            del self._open[node]
            self._bench.epoll.unregister(answer.fileno())
            self._bench.lanes[answer] = hire.contact
            self._bench.idle.append(answer)
        elif answer is not None:
            self._drop(node)
            self._go_elsewhere(node, *answer)

    def _go_elsewhere(self, node: str, name: str, path: str, places: int) -> None:
        """Another node has workers: ask it, if it is on this machine, else send it calls."""
        if path:
            contact = self._contacts.get(path)
            if contact is None:
                contact = self._contacts[path] = Contact(Client(Address(path=path)), self._identity, own=True)
            self._ask(contact, node, near=False, name=name)
        else:
            self._send_elsewhere(node, places)

    def _send_elsewhere(self, node: str, places: int) -> None:
        """Have calls run through the node: so many, or all that must run on one."""
        queue = self._bench.queues[node]
        count = len(queue) if node else places
        moved = [queue.popleft() for _ in range(min(count, len(queue)))]
        self._bench.elsewhere([item for item in moved if item.open])

    def _refuse(self, node: str, error: VirgoError) -> None:
        """A worker could not be had; without any, the calls have failed, or wait for the node to be back."""
        self._refused_at = time.monotonic()
        if node or not self._bench.lanes:
            queue = self._bench.queues[node]
            again = []
            for item in taken(queue):
                if may_go_again(item.task, error, item.lost):
                    item.lost += 1
                    again.append(item)
                else:
                    item.fail(error)
            self._bench.put_back(again)
            self._refused_at += pause_s(max((item.lost for item in again), default=0))

    def _look_for_life(self, node: str, hire: Hire) -> None:
        """Beside the thread: a node that lets us wait may be stopped, or just have no worker free."""
        try:
            hire.contact.ping()
        except (NodeLost, NotRunning) as error:
            lost = error
            self._bench.tell(lambda: self._give_up(node, hire, lost))

    def _give_up(self, node: str, hire: Hire, error: VirgoError) -> None:
        if self._open.get(node) is hire:
            self._drop(node)
            self._refuse(node, error)
