"""A call, or a lease, as the pool of a node has it; and as it is shown to people."""

from __future__ import annotations

import asyncio
import time

from virgo import context as contexts
from virgo.context import Context
from virgo.cpu import messages
from virgo.cpu.hiring import Hiring
from virgo.cpu.messages import Terms, Work
from virgo.cpu.needs import Grant
from virgo.cpu.processes import WorkerProcess
from virgo.cpu.seen import TaskInfo
from virgo.cpu.slate import BEGUN


class Call:
    """One call on its way, or a lease.

    Args:
        number: of the pool.
        work: what is to be done.
        hiring: the lease.
        grant: what it may use.

    Attributes:
        future: its outcome.
        killed: its outcome if somebody else ends it; b"" while nobody does.
        output_from: where the output begins, among its worker's, of what a lease is at.
        since, began: when it came, and when a worker got it, in monotonic time; 0.0 before.
    """

    __slots__ = (
        "_context", "began", "future", "grant", "hiring", "killed", "number", "output_from", "since", "work",
    )  # fmt: skip

    def __init__(self, number: int, work: Work, hiring: Hiring | None, grant: Grant) -> None:
        self.number = number
        self.work = work
        self.hiring = hiring
        self.grant = grant
        self.since = time.monotonic()
        self.began = 0.0
        self.output_from = 0
        self.killed = b""
        self.future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._context: Context | Terms | None = None

    def __repr__(self) -> str:
        return f"<Call {self.number} {self.label}>"

    @property
    def label(self) -> str:
        """Of what its worker is at."""
        slate = None if self.hiring is None else self.hiring.slate
        return self.work.label if slate is None else slate.label or self.work.label

    @property
    def context(self) -> Context | Terms:
        """On whose behalf; the terms of a lease."""
        if self._context is None:
            if self.hiring is not None:
                self._context = messages.decode_terms(self.work.context)
            elif self.work.context:
                self._context = contexts.decode(self.work.context, speaker=contexts.NODE)
            else:
                self._context = Context(id=contexts.new_id())
        return self._context

    @property
    def owner(self) -> str:
        """On whose behalf it runs."""
        return self.context.identity.name

    @property
    def task(self) -> str:
        """Its id; of a lease, that of the call that its worker is at, or was last."""
        if isinstance(self.context, Context):
            return self.context.id
        slate = None if self.hiring is None else self.hiring.slate
        return self.task_of(max(0, slate.words[BEGUN] - 1) if slate is not None else 0)

    def task_of(self, number: int) -> str:
        """The id of that call of a lease."""
        terms = self.context
        assert isinstance(terms, Terms)
        return terms.task(number)

    def describe(self, node: str, worker: WorkerProcess | None, now: float) -> TaskInfo:
        """As it is shown; without a worker it waits."""
        state, since, calls = "waiting", self.since, 0
        if worker is not None:
            state, since = "running", self.began or self.since
            if self.hiring is not None and self.hiring.slate is not None:
                state = "leased" if self.hiring.resting else "running"
                since = self.hiring.doing_since
                calls = self.hiring.slate.words[BEGUN]
        return TaskInfo(
            task=self.task,
            node=node,
            label=self.label,
            state=state,
            seconds=max(0.0, now - since),
            calls=calls,
            pid=0 if worker is None else worker.pid,
            owner=self.owner,
            cpus=self.grant.cpus,
            gpus=len(self.grant.gpus),
            memory=self.grant.memory,
        )
