"""Leases: one subject each, whose last message is the grant or its latest renewal and goes away by itself.

- A grant is a guarded write on the subject's last sequence, with a time to live; the sequence that the
  server gives it is the token. Sequences of a stream rise for ever, so tokens do.
- A renewal is a guarded write on the sequence of the owner's own last one. A lease that has run out has
  a marker there, one that another took has the other's grant: either way the renewal is refused.
- A release puts an empty message there, which goes away too: a name that is not used leaves nothing.

The holder's deadline is counted from before the sending, and a renewal whose answer comes after the
deadline of the one before is a loss, whatever it says: so the holder knows of its loss before the server
lets anyone else in. That needs clocks that run at the same rate, not that show the same time; where a
clock jumps, the token protects what the lease was for.

The engine counts whole seconds: a time to live is rounded down. In a cluster it should exceed an
election and a request, 20 s, or an election looks like the owner's death.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections import OrderedDict
from typing import Final, TypeVar

import msgspec

from virgo.engine import naming
from virgo.engine.base import Lease
from virgo.engine.jetstream import EXPECT_SUBJECT_LAST, TTL, JetStream, Message, Refused, Stored
from virgo.engine.link import Unanswered, expired
from virgo.errors import BadArgument, Conflict, EngineUnavailable
from virgo.limits import ENGINE_REQUEST_S, LEASE_MARGIN_S, LEASE_TTL_S_MAX, LEASE_TTL_S_MIN

# The server lets a message with this header go without a marker of its own in its place.
_RELEASED: Final = {"KV-Operation": "PURGE", TTL: "60"}
_MARKER_S: Final = 60
_SECOND_NS: Final = 1_000_000_000
_REMEMBERED_MAX: Final = 10_000
_Key = TypeVar("_Key")


class _Grant(msgspec.Struct, frozen=True, omit_defaults=True):
    """A grant (token 0: its own sequence) or a renewal."""

    owner: str
    write: str
    token: int = 0


_decode = msgspec.json.Decoder(_Grant).decode


class NatsLeases:
    """Leases in JetStream."""

    def __init__(self, jetstream: JetStream) -> None:
        self._jetstream = jetstream
        # Last sequences of subjects, to write without asking first; a stale one costs a refusal. Of held
        # leases by name and token, for another owner in this process must not lend its sequence ...
        self._held: OrderedDict[tuple[str, int], int] = OrderedDict()
        # ... and of released ones by name.
        self._free: OrderedDict[str, int] = OrderedDict()

    def __repr__(self) -> str:
        return f"<NatsLeases {self._jetstream!r}>"

    async def acquire(self, name: str, owner: str, *, ttl_s: float) -> Lease | None:
        """The lease if it is free, or already this owner's; None if another holds it.

        An owner that acquires again gets a new token; the one it had is lost.

        Raises:
            BadArgument: `ttl_s` is not between LEASE_TTL_S_MIN and LEASE_TTL_S_MAX.
            EngineUnavailable: the outcome is unknown; if it was granted, it runs out.
        """
        subject = naming.LEASE_PREFIX + naming.encode(name)
        ttl = _whole_seconds(name, ttl_s)
        deadline = time.monotonic() + ENGINE_REQUEST_S
        await self._ensure(deadline)
        grant = _Grant(owner, secrets.token_hex(8))
        last = self._free.pop(name, None)
        first_sent = time.monotonic()
        while True:
            if last is None:
                found = await self._jetstream.last(naming.LEASES_STREAM, subject, deadline=deadline)
                held = _held(found)
                if found is not None and held is not None and held.write == grant.write:
                    # One of our attempts: we cannot tell which, so count from the first.
                    return self._granted(name, owner, found.sequence, ttl, first_sent)
                if held is not None and held.owner != owner:
                    return None
                last = found.sequence if found is not None else 0
            sent = time.monotonic()
            try:
                token = await self._put(subject, grant, ttl, last, deadline)
            except (Refused, Unanswered):
                if expired(deadline):
                    raise EngineUnavailable(f"acquire lease {name!r}: no clear answer in time") from None
                last = None
            else:
                return self._granted(name, owner, token, ttl, sent)

    async def renew(self, lease: Lease) -> Lease:
        """The lease with a later deadline.

        Raises:
            Conflict: it is lost: run out, taken or released.
            EngineUnavailable: the engine is away; the lease is still held until its deadline.
        """
        subject = naming.LEASE_PREFIX + naming.encode(lease.name)
        ttl = int(lease.ttl_s)
        bound = min(lease.deadline, time.monotonic() + ENGINE_REQUEST_S)
        renewal = _Grant(lease.owner, secrets.token_hex(8), lease.token)
        last = self._held.get((lease.name, lease.token))
        while True:
            _refuse_late(lease)
            sent = time.monotonic()
            try:
                if last is None:
                    last = await self._own_last(subject, lease, bound)
                last = await self._put(subject, renewal, ttl, last, bound)
                break
            except Refused:
                last = None
            except EngineUnavailable:
                _refuse_late(lease)
                if expired(bound):
                    raise
                last = None
        _refuse_late(lease)
        _remember(self._held, (lease.name, lease.token), last)
        return dataclasses.replace(lease, deadline=sent + ttl - LEASE_MARGIN_S)

    async def release(self, lease: Lease) -> None:
        """Give it up; a lost lease is not an error. Raises EngineUnavailable; then it runs out."""
        subject = naming.LEASE_PREFIX + naming.encode(lease.name)
        deadline = time.monotonic() + ENGINE_REQUEST_S
        last = self._held.pop((lease.name, lease.token), None)
        while True:
            try:
                if last is None:
                    last = await self._own_last(subject, lease, deadline)
                message = Message(subject, b"", {**_RELEASED, EXPECT_SUBJECT_LAST: str(last)})
                last = await self._jetstream.store([message], deadline=deadline, what="release a lease")
            except Conflict:
                return
            except (Refused, Unanswered):
                if expired(deadline):
                    raise EngineUnavailable(
                        f"release lease {lease.name!r}: no clear answer in time"
                    ) from None
                last = None
            else:
                _remember(self._free, lease.name, last)
                return

    async def holder(self, name: str) -> str | None:
        """The owner that holds it now, or None."""
        subject = naming.LEASE_PREFIX + naming.encode(name)
        deadline = time.monotonic() + ENGINE_REQUEST_S
        held = _held(await self._jetstream.last(naming.LEASES_STREAM, subject, deadline=deadline))
        return held.owner if held is not None else None

    # --- how --------------------------------------------------------------------------------

    async def _ensure(self, deadline: float) -> None:
        await self._jetstream.ensure(
            naming.LEASES_STREAM,
            (naming.LEASE_PREFIX + ">",),
            deadline=deadline,
            max_msgs_per_subject=1,
            allow_msg_ttl=True,
            # With markers the end of a message is itself a write, in the same order for everyone.
            subject_delete_marker_ttl=_MARKER_S * _SECOND_NS,
            allow_rollup_hdrs=True,
        )

    async def _put(self, subject: str, grant: _Grant, ttl: int, last: int, deadline: float) -> int:
        headers = {TTL: str(ttl), EXPECT_SUBJECT_LAST: str(last)}
        message = Message(subject, msgspec.json.encode(grant), headers)
        return await self._jetstream.store([message], deadline=deadline, what="write a lease")

    async def _own_last(self, subject: str, lease: Lease, deadline: float) -> int:
        """The sequence of the lease's latest message. Raises Conflict if it is no longer ours."""
        found = await self._jetstream.last(naming.LEASES_STREAM, subject, deadline=deadline)
        held = _held(found)
        if found is None or held is None:
            raise Conflict(f"lease {lease.name!r} of {lease.owner!r} has run out")
        if (held.token or found.sequence) != lease.token:
            raise Conflict(f"lease {lease.name!r} is held by {held.owner!r} now, with a later token")
        return found.sequence

    def _granted(self, name: str, owner: str, token: int, ttl: int, sent: float) -> Lease:
        lease = Lease(name, owner, token, float(ttl), sent + ttl - LEASE_MARGIN_S)
        if time.monotonic() >= lease.deadline:
            raise EngineUnavailable(f"acquire lease {name!r}: it ran out before its grant arrived")
        _remember(self._held, (name, token), token)
        return lease


def _remember(sequences: OrderedDict[_Key, int], key: _Key, last: int) -> None:
    sequences[key] = last
    sequences.move_to_end(key)
    while len(sequences) > _REMEMBERED_MAX:
        sequences.popitem(last=False)


def _held(found: Stored | None) -> _Grant | None:
    """Who holds a lease whose subject ends with that message."""
    if found is None or found.marker or not found.data:
        return None
    return _decode(found.data)


def _refuse_late(lease: Lease) -> None:
    if time.monotonic() >= lease.deadline:
        raise Conflict(
            f"lease {lease.name!r} of {lease.owner!r} ran out before it was renewed",
            hint="Renew at a third of its time; what it protected may be another's now.",
        )


def _whole_seconds(name: str, ttl_s: float) -> int:
    if not LEASE_TTL_S_MIN <= ttl_s <= LEASE_TTL_S_MAX:
        raise BadArgument(
            f"lease {name!r}: {ttl_s:g} s to live",
            hint=f"Between {LEASE_TTL_S_MIN:g} and {LEASE_TTL_S_MAX:g} s.",
        )
    return int(ttl_s)
