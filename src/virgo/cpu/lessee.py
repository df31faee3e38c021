"""Which way the calls of a client go: to workers that it leases, or through its node."""

from __future__ import annotations

import time
from collections.abc import Callable

from virgo.context import Identity
from virgo.cpu.calls import Book, Item, Task
from virgo.cpu.crew import Crew
from virgo.limits import EXPORT_FRESH_S
from virgo.wire.client import Client


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
        self._crew: Crew | None = None
        self._identity: Identity | None = None  # for whom workers are leased
        self._not_exported: dict[str, float] = {}  # names that workers do not know, and until when

    def __repr__(self) -> str:
        return f"<Lessee {self._crew!r}>"

    def crew_for(self, task: Task) -> Crew | None:
        """The leased workers, if they can run the task."""
        if task.name and self._not_exported.get(task.name, 0.0) > time.monotonic():
            return None
        identity = None if task.context is None else task.context.identity
        if self._crew is None or identity != self._identity:
            self._let_go()
            self._crew, self._identity = Crew(self._client, self._book, self._go_by_node), identity
        return self._crew

    def runs(self, item: Item) -> bool:
        """Whether a leased worker has a call."""
        return self._crew is not None and self._crew.runs(item)

    def end(self, items: list[Item], *, running: bool, ended: Callable[[], None]) -> None:
        """End calls, unless `running` those that do not run; `ended` is called when they have ended."""
        if self._crew is None:
            ended()
        else:
            self._crew.end(items, running=running, ended=ended)

    def cancel(self, items: list[Item], *, running: bool) -> None:
        """The same, and return when they have ended."""
        if self._crew is not None:
            self._crew.cancel(items, running=running)

    def close(self) -> None:
        """Give all workers back, once they have ended what they are at."""
        self._let_go()
        if self._own:
            self._client.close()

    def _let_go(self) -> None:
        if self._crew is not None:
            self._crew.close()
            self._crew = None

    def stats(self) -> dict[str, int]:
        """Leased workers, and calls that wait for one."""
        return {} if self._crew is None else self._crew.stats()

    def _go_by_node(self, items: list[Item]) -> None:
        for item in items:
            if item.task.name:
                self._not_exported[item.task.name] = time.monotonic() + EXPORT_FRESH_S
        self._by_node(items)
