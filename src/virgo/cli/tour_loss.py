"""The last step of the tour: a node is killed in the middle of it all.

While calls run on all nodes and regions are read without pause, n2 gets SIGKILL. What must hold: the calls
of the other nodes complete; every call that n2 had is named as lost; who reads from n2 is told within
NODE_LOST_S and never hangs; regions elsewhere can be read all the time; and when the supervisor has
started n2 again, what was acknowledged is there.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from virgo.cli.tour_show import CheckFailed
from virgo.cli.tour_steps import Tour
from virgo.cli.tour_words import merged, word_counter
from virgo.errors import NodeLost, VirgoError
from virgo.home import socket_path
from virgo.kernel.process import ProcessMark
from virgo.limits import NODE_LOST_S, NODE_START_S, MiB
from virgo.members import Member
from virgo.wire.address import Address
from virgo.wire.client import Client

_VICTIM: Final = "n2"
# Results that have come when the victim is killed, with a call in hand.
_RESULTS_MIN: Final = 4
# Batches of texts in one call here: long enough that the call in hand does not end just before the kill.
_BATCHES_PER_CALL: Final = 3
_KILL_S: Final = 20.0
_POLL_S: Final = 0.02

Result = tuple[str, dict[bytes, int]]


@dataclass(slots=True)
class Kept:
    """What n2 and n3 hold before the loss."""

    path: str
    text: bytes
    descriptor: int
    regions: dict[str, int]
    values: dict[str, bytes]
    spread: int
    spread_value: bytes


@dataclass(slots=True)
class Reader:
    """Reads a region of every node through n1, without pause, until told to stop.

    Attributes:
        good: reads that gave the right value, by node.
        refusals: the errors of the others, with their time and how long they took, by node.
        wrong: reads that gave something else.
    """

    client: Client
    kept: Kept
    good: Counter[str] = field(default_factory=Counter)
    refusals: dict[str, list[tuple[float, float, VirgoError]]] = field(default_factory=dict)
    last_good: dict[str, float] = field(default_factory=dict)
    longest_s: float = 0.0
    wrong: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Read until `stopping` is set."""
        while not self.stopping.is_set():
            for name, identifier in self.kept.regions.items():
                self._read(name, identifier)

    def _read(self, name: str, identifier: int) -> None:
        started = time.monotonic()
        try:
            value = self.client.execute("VIRGO_GET", identifier)
        except VirgoError as error:
            now = time.monotonic()
            self.refusals.setdefault(name, []).append((now, now - started, error))
        else:
            now = time.monotonic()
            self.good[name] += 1
            self.last_good[name] = now
            self.wrong += value != self.kept.values[name]
        self.longest_s = max(self.longest_s, now - started)


def lose_a_node(tour: Tour) -> dict[str, Any]:
    """Kill n2 with SIGKILL while everything runs."""
    show = tour.show
    with show.step("Loss: n2 is killed with kill -9 in the middle of it all"):
        kept = _keep(tour)
        reader = Reader(Client(tour.clouds["n1"].client.address), kept)
        thread = threading.Thread(target=reader.run, name="reader", daemon=True)
        thread.start()
        try:
            batches = tour.library.batches
            work = [
                [text for batch in batches[start : start + _BATCHES_PER_CALL] for text in batch]
                for start in range(0, len(batches), _BATCHES_PER_CALL)
            ]
            futures, killed = _kill_amid_calls(tour, work)
            figures = _calls(tour, work, futures, killed)
            figures |= _named(tour, reader, killed)
            figures |= _back(tour, kept, reader, killed)
        finally:
            reader.stopping.set()
            thread.join()
            reader.client.close()
        figures |= _went_on(tour, reader)
    return figures


def _keep(tour: Tour) -> Kept:
    """Put something of value on n2 and n3, and over all nodes."""
    cloud = tour.clouds["n1"]
    values = {name: os.urandom(2000) for name in (_VICTIM, "n3")}
    regions = {}
    for name, value in values.items():
        regions[name] = int(cloud.client.execute("VIRGO_MALLOC", len(value), "NODE", name))
        cloud.client.execute("VIRGO_SET", regions[name], value)
    spread_value = os.urandom(24 * MiB)
    spread = int(cloud.client.execute("VIRGO_MALLOC", len(spread_value)))
    cloud.client.execute("VIRGO_SET", spread, spread_value)
    path, text = f"/{_VICTIM}/tour/kept.txt", b"still here\n"
    cloud.files.write_bytes(path, text)
    descriptor = int(cloud.client.execute("VIRGO_OPEN", path, "r"))
    return Kept(path, text, descriptor, regions, values, spread, spread_value)


# --- the kill -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Killed:
    """When n2 was killed (monotonic), which process it was, and what it had in hand."""

    when: float
    pid: int
    in_hand: int


def _kill_amid_calls(tour: Tour, work: Sequence[Sequence[bytes]]) -> tuple[list[Future[Result]], Killed]:
    """Have all nodes count words, and kill n2 when it has calls in hand and others have ended."""
    count, cloud = word_counter(), tour.clouds["n1"]
    victim = tour.clouds[_VICTIM].client
    deadline = time.monotonic() + _KILL_S
    while time.monotonic() < deadline:
        futures: list[Future[Result]] = [cloud.cpu.submit(count, texts) for texts in work]
        while not all(future.done() for future in futures):
            member = _own(victim)
            ended = sum(future.done() for future in futures)
            if member.load.outstanding and ended >= _RESULTS_MIN:
                ProcessMark.of(member.pid).signal(signal.SIGKILL)
                killed = Killed(time.monotonic(), member.pid, member.load.outstanding)
                tour.show.say(
                    f"kill -9 {member.pid}: {ended} of {len(futures)} calls have ended,"
                    f" n2 has {member.load.outstanding} in hand",
                    style="yellow",
                )
                return futures, killed
    raise CheckFailed(f"n2 has a call in hand while others have ended: not within {_KILL_S:g} s.")


def _own(client: Client) -> Member:
    """A node's record of itself, with its load of this moment."""
    return msgspec.convert(msgspec.json.decode(client.execute("STATUS"))["member"], Member)


# --- what must hold -------------------------------------------------------------------------


def _calls(
    tour: Tour, work: Sequence[Sequence[bytes]], futures: list[Future[Result]], killed: Killed
) -> dict[str, Any]:
    """Every call ends: with its result, or with NodeLost; the lost ones are sent again."""
    show = tour.show
    with show.progress("the other nodes go on", len(futures)) as done:
        for finished, _ in enumerate(as_completed(futures, timeout=60), 1):
            done(finished)
    errors = {index: error for index, future in enumerate(futures) if (error := future.exception())}
    lost = {index: error for index, error in errors.items() if isinstance(error, NodeLost)}
    strange = [error for error in errors.values() if not isinstance(error, NodeLost)]
    show.check(
        f"all {len(futures)} calls ended: {len(futures) - len(lost)} with their result, {len(lost)} with"
        " NodeLost, none otherwise",
        not strange,
        otherwise=f"{len(strange)} ended so: {strange[:1]!r}",
    )
    if lost:
        show.say(f"a lost call says: {next(iter(lost.values())).message}", style="dim")
    cloud, count = tour.clouds["n1"], word_counter()
    again = [cloud.cpu.submit_to(count, (work[index],), retries=2) for index in lost]
    results = [future.result() for index, future in enumerate(futures) if index not in lost]
    found = merged([counts for _, counts in [*results, *(future.result() for future in again)]])
    show.check(
        f"with the lost calls sent again ({len(lost)}) the sum is right: {found.total():,} words",
        found == tour.words,
        otherwise=f"it should be {tour.words.total():,}",
    )
    return {
        "calls": len(futures),
        "calls_lost": len(lost),
        "calls_in_hand": killed.in_hand,
        "calls_s_after_kill": round(time.monotonic() - killed.when, 3),
    }


def _named(tour: Tour, reader: Reader, killed: Killed) -> dict[str, Any]:
    """Readers of n2 were told in time."""
    _await("a read from n2 is refused", lambda: bool(reader.refusals.get(_VICTIM)), NODE_LOST_S)
    when, _, error = reader.refusals[_VICTIM][0]
    seconds = when - killed.when
    tour.show.check(
        f"who reads from n2 was told {error.code} after {seconds:.3f} s (promised: {NODE_LOST_S:g} s)",
        isinstance(error, NodeLost) and seconds <= NODE_LOST_S,
        otherwise=f"told {error!r}",
    )
    return {"named_s": round(seconds, 4)}


def _back(tour: Tour, kept: Kept, reader: Reader, killed: Killed) -> dict[str, Any]:
    """The supervisor starts n2 again, and everything is there."""
    show, client = tour.show, tour.clouds["n3"].client

    def served() -> bool:
        found = [member for member in tour.clouds["n1"].nodes if member.name == _VICTIM]
        serves = bool(found) and found[0].pid != killed.pid
        return serves and reader.last_good[_VICTIM] > killed.when

    with show.progress("n2 is started again"):
        _await("n2 is back", served, NODE_START_S)
        seconds = reader.last_good[_VICTIM] - killed.when
        with Client(Address(path=str(socket_path(tour.home, _VICTIM)))) as direct:
            pid = _own(direct).pid
    show.check(
        f"n2 serves again {seconds:.1f} s after the kill, as process {pid}", pid not in (0, killed.pid)
    )
    show.check(
        "its region is as it was set",
        client.execute("VIRGO_GET", kept.regions[_VICTIM]) == kept.values[_VICTIM],
    )
    show.check(
        "a region of 24 MiB over all nodes is whole again",
        client.execute("VIRGO_GET", kept.spread) == kept.spread_value,
    )
    show.check(
        f"{kept.path} is there, and the descriptor from before the kill still reads it",
        tour.clouds["n3"].files.read_bytes(kept.path) == kept.text
        and client.execute("VIRGO_READ", kept.descriptor, 100, 0) == kept.text,
    )
    return {"back_s": round(seconds, 3)}


def _went_on(tour: Tour, reader: Reader) -> dict[str, Any]:
    """Reads of what did not lie on n2 were never refused, and none gave anything wrong."""
    refused = {name: len(errors) for name, errors in reader.refusals.items()}
    tour.show.check(
        f"meanwhile n3's region was read {reader.good['n3']:,} times, never refused and never wrong;"
        f" no read took longer than {reader.longest_s:.2f} s",
        reader.good["n3"] > 0
        and not reader.wrong
        and not refused.get("n3")
        and reader.longest_s <= NODE_LOST_S,
        otherwise=f"{reader.wrong} were wrong, refused were {refused}",
    )
    return {
        "reads": dict(reader.good),
        "reads_refused": refused,
        "longest_read_s": round(reader.longest_s, 4),
    }


def _await(what: str, condition: Any, limit_s: float) -> None:
    """Wait until the condition holds. Raises CheckFailed."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise CheckFailed(f"{what}: not within {limit_s:g} s.")
        time.sleep(_POLL_S)
