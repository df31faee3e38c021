"""Which way the calls of a client go: to workers that it leases, or through its node."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from virgo.context import Identity
from virgo.cpu.calls import Book, Item, Task
from virgo.cpu.crew import Crew
from virgo.cpu.needs import PLAIN
from virgo.limits import EXPORT_FRESH_S
from virgo.wire.client import Client

_CREWS_MAX: Final = 16  # of these the idle ones are let go for another identity


class Lessee:
    """A client on the machine of its node, who may lease workers.

    Args:
        client: blocking connections to the node, by its Unix socket.
        own: whether they are of this lessee alone, to be closed with it.
        book: the calls of the client.
        by_node: takes the calls that are not for leased workers: of other machines, or programs by name.
    """

    def __init__(
        self, client: Client, book: Book, by_node: Callable[[list[Item]], None], *, own: bool = False
    ) -> None:
        self._client = client
        self._own = own
        self._book = book
        self._by_node = by_node
        self._closed = False
        self._making = threading.Lock()
        self._crews: dict[Identity | None, Crew] = {}  # by whom their workers are leased for
        self._not_exported: dict[str, float] = {}  # names that workers do not know, and until when

    def __repr__(self) -> str:
        return f"<Lessee {list(self._crews.values())}>"

    def crew_for(self, task: Task) -> Crew | None:
        """The leased workers, if they can run the task; None once this is closed.

        What needs more than a worker, or lies on another machine, is for a node to place; and of a call whose
        output is followed a node says the id.
        """
        if self._closed:
            return None
        if task.name and self._not_exported.get(task.name, 0.0) > time.monotonic():
            return None
        if task.needs != PLAIN or isinstance(task.near, str) or task.write is not None:
            return None
        crew = self._crews.get(_identity(task)) or self._new_crew(_identity(task))
        return crew if crew is None or not task.near or crew.at_hand(task.near) else None

    def _new_crew(self, identity: Identity | None) -> Crew | None:
        left: list[Crew] = []
        with self._making:  # one for all threads that come just now
            crew = self._crews.get(identity)
            if crew is None and not self._closed:
                if len(self._crews) >= _CREWS_MAX:
                    left = [self._crews.pop(one) for one, each in list(self._crews.items()) if not each.busy]
                crew = self._crews[identity] = Crew(self._client, self._book, self._go_by_node, identity)
        for each in left:
            each.close()
        return crew

    def runs(self, item: Item) -> bool:
        """Whether a leased worker has a call."""
        crew = self._crews.get(_identity(item.task))
        return crew is not None and crew.runs(item)

    def end(self, items: list[Item], *, running: bool, ended: Callable[[], None]) -> None:
        """End calls, unless `running` those that do not run; `ended` is called when they have ended."""
        shares = self._by_crew(items)
        left = len(shares)
        counting = threading.Lock()

        def one_ended() -> None:
            nonlocal left
            with counting:
                left -= 1
                last = not left
            if last:
                ended()

        for crew, share in shares:
            crew.end(share, running=running, ended=one_ended)
        if not shares:
            ended()

    def cancel(self, items: list[Item], *, running: bool) -> None:
        """The same, and return when they have ended."""
        for crew, share in self._by_crew(items):
            crew.cancel(share, running=running)

    def _by_crew(self, items: list[Item]) -> list[tuple[Crew, list[Item]]]:
        shares: dict[Identity | None, list[Item]] = {}
        for item in items:
            shares.setdefault(_identity(item.task), []).append(item)
        found = [(self._crews.get(identity), share) for identity, share in shares.items()]
        return [(crew, share) for crew, share in found if crew is not None]

    def close(self) -> None:
        """Give all workers back, once they have ended what they are at, and lease no more."""
        with self._making:
            self._closed = True
            crews = list(self._crews.values())
            self._crews.clear()
        for crew in crews:
            crew.close()
        if self._own:
            self._client.close()

    def stats(self) -> dict[str, int]:
        """Leased workers, and calls that wait for one."""
        total: Counter[str] = Counter()
        for crew in list(self._crews.values()):
            total.update(crew.stats())
        return dict(total)

    def _go_by_node(self, items: list[Item]) -> None:
        for item in items:
            if item.task.name:
                self._not_exported[item.task.name] = time.monotonic() + EXPORT_FRESH_S
        self._by_node(items)


def _identity(task: Task) -> Identity | None:
    """For whom a task is run, None for the client itself."""
    return None if task.context is None else task.context.identity
