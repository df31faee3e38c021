"""Membership: registration in the engine, beats over its signals, the view they give.

A node registers once: its name and number stay its own for the life of the cloud, kept in its state
directory and in the engine's registers `node/NAME` and `numbers`. While it runs it beats.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec

from virgo.engine.base import Engine
from virgo.errors import Conflict, EngineUnavailable, NoNode, PortTaken
from virgo.home import read_record, write_record
from virgo.limits import ENGINE_REQUEST_S, MEMBER_BEAT_S, NODE_START_S, NODES_MAX
from virgo.members import Member
from virgo.node.heart import Heart
from virgo.node.view import View

log = logging.getLogger("virgo.node")
_SUBJECT: Final = "virgo/beat"
_ASKED_S: Final = 0.02  # before a beat that was asked for: several nodes often begin together
# Between beats for the sake of the load, at least so long, and so long for each node: all hear all of them.
_ANNOUNCED_S: Final = 0.1
_ANNOUNCED_EACH_S: Final = 0.01
_decode = msgspec.json.Decoder(Member).decode


async def register(engine: Engine, directory: Path, name: str) -> tuple[int, str]:
    """The node's number and id, given by the cloud on first use.

    Raises:
        PortTaken: another state directory has the name.
    """
    record = read_record(directory / "node.json")
    own = str(record["id"]) if record else _new_id()
    if record is None:
        write_record(directory / "node.json", {"id": own, "name": name})
    while True:
        found = await engine.registers.get(f"node/{name}")
        if found is not None:
            known = msgspec.json.decode(found.value)
            if known["id"] != own:
                raise PortTaken(
                    f"the name {name} belongs to another node of this cloud", hint="Choose one with --name."
                )
            return int(known["number"]), own
        number = await _take_number(engine, own)
        value = msgspec.json.encode({"id": own, "number": number, "name": name})
        try:
            await engine.registers.compare_and_set(f"node/{name}", value, version=0)
        except Conflict:
            continue


async def register_patiently(engine: Engine, directory: Path, name: str) -> tuple[int, str]:
    """As `register`, but patient: a cluster of engines that has just started may still elect."""
    deadline = time.monotonic() + NODE_START_S - ENGINE_REQUEST_S
    while True:
        try:
            return await register(engine, directory, name)
        except EngineUnavailable as error:
            if time.monotonic() > deadline:
                raise
            log.warning("%s is not registered yet: %s", name, error)


async def registered(engine: Engine) -> list[Member]:
    """All nodes that ever registered."""
    members = []
    for register_name in await engine.registers.names("node/"):
        found = await engine.registers.get(register_name)
        if found is not None:
            known = msgspec.json.decode(found.value)
            members.append(Member(name=known["name"], number=known["number"], id=known["id"]))
    return members


async def _take_number(engine: Engine, own: str) -> int:
    """The next number, never given to two state directories."""
    while True:
        found = await engine.registers.get("numbers")
        given: dict[str, int] = msgspec.json.decode(found.value) if found else {}
        if own in given:
            return given[own]
        number = max(given.values(), default=0) + 1
        if number > NODES_MAX:
            raise NoNode(f"all {NODES_MAX} node numbers of this cloud are given")
        value = msgspec.json.encode({**given, own: number})
        try:
            await engine.registers.compare_and_set("numbers", value, version=found.version if found else 0)
        except Conflict:
            continue
        return number


def _new_id() -> str:
    return Path("/proc/sys/kernel/random/uuid").read_text().strip()


class Membership:
    """Beats out, beats in, and who is up.

    Args:
        describe: gives the node's own current member record.
        on_lost: called with each member whose lease ran out or that was suspected.
        connect: gives a second connection to the engine, for the beats while the event loop is busy.
    """

    def __init__(
        self,
        engine: Engine,
        describe: Callable[[], Member],
        on_lost: Callable[[Member], None],
        *,
        connect: Callable[[], Awaitable[Engine]],
    ) -> None:
        self._engine = engine
        self._heart = Heart(connect, _SUBJECT)
        self._describe = describe
        self._on_lost = on_lost
        self._unsubscribe: Callable[[], Awaitable[None]] | None = None
        self._heard = asyncio.Event()
        self._was_silent = False
        self._asked = asyncio.Event()  # a node has begun to live, and wants to hear who is up
        self._beat_at = 0.0
        self._announcing: asyncio.TimerHandle | None = None
        self.view = View(describe(), now=time.monotonic())

    def __repr__(self) -> str:
        return f"<Membership {self.view!r}>"

    async def start(self) -> None:
        """Know all registered nodes, hear the others and be heard."""
        for member in await registered(self._engine):
            self.view.register(member)
        self._unsubscribe = await self._engine.signals.subscribe(_SUBJECT, self._hear)
        await self.beat()
        async with asyncio.timeout(10):
            await self._heard.wait()
        self._heart.start()

    async def beat(self, *, leaving: bool = False) -> None:
        """Say that this node lives, or that it leaves."""
        member = self._describe()
        if leaving:
            member = msgspec.structs.replace(member, state="leaving")
        beat = msgspec.json.encode(member)
        self._heart.turned(beat)
        self._beat_at = time.monotonic()
        try:
            await self._engine.signals.publish(_SUBJECT, beat)
        except EngineUnavailable as error:
            log.warning("no beat: %s", error)

    async def run(self) -> None:
        """Beat and let leases run out, until cancelled."""
        while True:
            await self._rest()
            await self.beat()
            now = time.monotonic()
            silent = self.view.silent(now=now)
            if self._was_silent and not silent:
                self.view.resume(now=now)
            self._was_silent = silent
            for member in self.view.expire(now=now):
                log.warning("node %s is lost: no beat", member.name)
                self._on_lost(member)

    async def _rest(self) -> None:
        """Until the next beat is due, or a new node wants to hear one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MEMBER_BEAT_S):
                await self._asked.wait()
                await asyncio.sleep(_ASKED_S)
        self._asked.clear()

    def announce(self) -> None:
        """Beat soon: the load has changed."""
        if self._announcing is None:
            gap_s = max(_ANNOUNCED_S, _ANNOUNCED_EACH_S * len(self.view.up()))
            wait_s = max(0.0, self._beat_at + gap_s - time.monotonic())
            self._announcing = asyncio.get_running_loop().call_later(wait_s, self._announce)

    def _announce(self) -> None:
        self._announcing = None
        self._asked.set()

    async def stop(self) -> None:
        """Say farewell."""
        if self._announcing is not None:
            self._announcing.cancel()
        await self._heart.stop()
        await self.beat(leaving=True)
        if self._unsubscribe is not None:
            await self._unsubscribe()

    def suspect(self, number: int) -> None:
        """A peer did not answer."""
        member = self.view.get(number)
        if member is not None and self.view.suspect(number):
            log.warning("node %s does not answer", member.name)
            self._on_lost(member)

    def _hear(self, data: bytes) -> None:
        try:
            member = _decode(data)
        except msgspec.DecodeError as error:
            log.warning("a beat that is none: %s", error)
            return
        if member.number == self.view.own.number:
            self._heard.set()
        known = self.view.get(member.number)
        if known is None or known.started_ms != member.started_ms:
            self._asked.set()
        was_up = self.view.is_up(member.number)
        if self.view.beat(member, now=time.monotonic()):
            log.info("node %s is up", member.name)
        elif was_up and member.state == "leaving" and member.number != self.view.own.number:
            log.info("node %s leaves", member.name)
            self._on_lost(member)
