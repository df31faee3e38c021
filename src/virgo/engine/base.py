"""What modules need of an engine, and what it promises.

- A **log** is a named sequence of entries. An acknowledged append is on disk (on a majority of servers
  in a cluster); entries have strictly rising sequences, with gaps, and are never changed.
- A **register** is a named value with a version. `compare_and_set` is linearizable, and `get` returns the
  last acknowledged value (read-after-write, also from another node).
- A **lease** is a register that goes away by itself when its owner stops renewing it. Its `token` rises
  with every grant and fences what the owner writes elsewhere. A lease gives liveness, the token safety.
- A **signal** is a small message to whoever listens now: fast, bounded, and possibly lost.

Names are any text of 1 to 512 UTF-8 bytes. Every call ends within ENGINE_REQUEST_S; an
EngineUnavailable after a write means that its outcome is unknown. Bulk data does not belong here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a log."""

    sequence: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Register:
    """A register's value and the version to expect when changing it."""

    name: str
    value: bytes
    version: int


@dataclass(frozen=True, slots=True)
class Lease:
    """A held lease: renew it well before `deadline` (local monotonic time), or it is lost."""

    name: str
    owner: str
    token: int
    ttl_s: float
    deadline: float


class Logs(Protocol):
    """Durable, totally ordered logs."""

    async def append(self, log: str, entries: Sequence[bytes], *, after: int | None = None) -> int:
        """Append all or none in one fsync; returns the last entry's sequence.

        With `after`, only if the log's last sequence is that (0: empty). Raises Conflict, TooLarge,
        EngineUnavailable.
        """

    async def read(self, log: str, *, start: int = 1, limit: int = 1000) -> list[Entry]:
        """Entries from sequence `start` on, at most `limit`; an empty list at the end."""

    def follow(self, log: str, *, start: int = 1) -> AsyncIterator[Entry]:
        """Entries from `start` on, without end, across reconnects and without gap or duplicate."""


class Registers(Protocol):
    """Compare-and-set registers."""

    async def get(self, name: str, *, fresh: bool = True) -> Register | None:
        """The register as last acknowledged, or None.

        With `fresh=False` it costs less in a cluster, and may be some seconds old while leaders change.
        """

    async def compare_and_set(self, name: str, value: bytes, *, version: int) -> int:
        """Set if the version is still that (0: absent); returns the new version. Raises Conflict."""

    async def delete(self, name: str, *, version: int) -> None:
        """Delete if the version is still that. Raises Conflict."""

    async def names(self, prefix: str = "") -> list[str]:
        """Names of the present registers that begin so, sorted."""


class Leases(Protocol):
    """Leases with fencing tokens."""

    async def acquire(self, name: str, owner: str, *, ttl_s: float) -> Lease | None:
        """The lease if it is free, or already this owner's; None if another holds it.

        Each grant has a new token: the same owner's earlier grant is lost by it.
        """

    async def renew(self, lease: Lease) -> Lease:
        """The lease with a later deadline. Raises Conflict if it is lost."""

    async def release(self, lease: Lease) -> None:
        """Give it up; a lost lease is not an error."""

    async def holder(self, name: str) -> str | None:
        """The owner that holds it now, or None."""


class Signals(Protocol):
    """Fire-and-forget messages, and requests to whoever serves a subject."""

    async def publish(self, subject: str, data: bytes) -> None:
        """Send to all current listeners. Raises EngineUnavailable when not connected."""

    async def subscribe(
        self, subject: str, handler: Callable[[bytes], None]
    ) -> Callable[[], Awaitable[None]]:
        """Call `handler` for each message, across reconnects; returns what ends it."""

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        """Ask whoever serves the subject. Raises EngineUnavailable, DeadlineExceeded."""

    async def serve(
        self, subject: str, handler: Callable[[bytes], Awaitable[bytes]]
    ) -> Callable[[], Awaitable[None]]:
        """Answer requests on the subject; several servers share the work. Returns what ends it."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """The engine as seen from here."""

    url: str
    connected: bool
    version: str = ""
    servers: tuple[str, ...] = ()
    replicas: int = 1
    reconnects: int = 0
    unsafe: tuple[str, ...] = ()  # settings that can lose acknowledged data, accepted on request
    notes: tuple[str, ...] = ()  # what the audit could not see


class Engine(Protocol):
    """The engine of a cloud."""

    logs: Logs
    registers: Registers
    leases: Leases
    signals: Signals

    def status(self) -> EngineStatus:
        """Where it is and how it is; no I/O."""

    async def close(self) -> None:
        """Disconnect."""
