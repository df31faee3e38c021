"""What every engine must do, as claims that can be run against any.

A claim is a coroutine function of two engines, connected to the same servers; its docstring says what it
shows, and it raises AssertionError if that is not so. Names are made anew in each run, so the servers may
hold other data. `CLAIMS` lists them all:

    @pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
    def test_contract(claim): ...
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Final

from virgo.engine.base import Engine, Entry
from virgo.errors import (
    BadArgument,
    Conflict,
    DeadlineExceeded,
    EngineUnavailable,
    NoNode,
    TooLarge,
    VirgoError,
)
from virgo.limits import ENGINE_NAME_BYTES_MAX, LOG_BATCH_ENTRIES_MAX, LOG_ENTRY_BYTES_MAX, REGISTER_BYTES_MAX

Claim = Callable[[Engine, Engine], Awaitable[None]]
ODD_NAMES: Final = (
    "a b",
    "a.b",
    "a.*",
    ">",
    "*",
    "=",
    "=2E",
    "a/b\\c",
    "ünï\N{SNOWMAN}",
    "\n\t\0",
    "Case",
    "case",
    "é" * (ENGINE_NAME_BYTES_MAX // 2),
    "e\u0301" + "x" * (ENGINE_NAME_BYTES_MAX - 3),
)


def _new(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(4)}"


async def _refused(work: Awaitable[object], *kinds: type[VirgoError]) -> VirgoError:
    """The error that the work must end with, of one of these kinds."""
    try:
        result = await work
    except kinds as error:
        return error
    raise AssertionError(f"expected {' or '.join(kind.__name__ for kind in kinds)}, got {result!r}")


# --- registers ------------------------------------------------------------------------------


async def register_is_read_after_it_was_written(one: Engine, two: Engine) -> None:
    """Each acknowledged value is what the other connection reads next."""
    name, version = _new("register"), 0
    assert await two.registers.get(name) is None
    for number in range(30):
        value = b"%d" % number
        changed = await one.registers.compare_and_set(name, value, version=version)
        assert changed > version, "versions rise"
        version = changed
        found = await two.registers.get(name)
        assert found is not None
        assert (found.name, found.value, found.version) == (name, value, version)


async def register_refuses_a_wrong_version(one: Engine, two: Engine) -> None:
    """A write or deletion that expects another version is a Conflict and changes nothing."""
    name = _new("register")
    version = await one.registers.compare_and_set(name, b"kept", version=0)
    for wrong in (0, version - 1, version + 1, version + 1000):
        await _refused(two.registers.compare_and_set(name, b"new", version=wrong), Conflict)
        await _refused(two.registers.delete(name, version=wrong), Conflict)
    await _refused(one.registers.compare_and_set(_new("absent"), b"", version=5), Conflict)
    await _refused(one.registers.delete(_new("absent"), version=5), Conflict)
    found = await one.registers.get(name)
    assert found is not None
    assert (found.value, found.version) == (b"kept", version)


async def register_is_deleted_and_made_anew(one: Engine, two: Engine) -> None:
    """A deleted register is absent; one made anew has a higher version and refuses the old one."""
    name = _new("register")
    first = await one.registers.compare_and_set(name, b"1", version=0)
    await two.registers.delete(name, version=first)
    assert await one.registers.get(name) is None
    await _refused(one.registers.compare_and_set(name, b"late", version=first), Conflict)
    second = await one.registers.compare_and_set(name, b"2", version=0)
    assert second > first
    await _refused(two.registers.delete(name, version=first), Conflict)
    await two.registers.delete(name, version=second)
    assert await two.registers.get(name) is None


async def register_holds_empty_and_largest_values(one: Engine, two: Engine) -> None:
    """An empty value is present, the largest comes back whole, a larger one is TooLarge."""
    name = _new("register")
    version = await one.registers.compare_and_set(name, b"", version=0)
    found = await two.registers.get(name)
    assert found is not None
    assert found.value == b""
    largest = secrets.token_bytes(REGISTER_BYTES_MAX)
    version = await one.registers.compare_and_set(name, largest, version=version)
    found = await two.registers.get(name)
    assert found is not None
    assert found.value == largest
    await _refused(one.registers.compare_and_set(name, largest + b"x", version=version), TooLarge)


async def registers_are_listed_by_prefix(one: Engine, two: Engine) -> None:
    """`names` gives present registers only, sorted, those that begin with the prefix."""
    prefix = _new("list")
    versions = {}
    for name in ("b", "a", "c/1", "c/2", "c"):
        versions[name] = await one.registers.compare_and_set(f"{prefix}/{name}", b"", version=0)
    await one.registers.delete(f"{prefix}/a", version=versions["a"])
    assert await two.registers.names(f"{prefix}/") == [
        f"{prefix}/{name}" for name in ("b", "c", "c/1", "c/2")
    ]
    assert await two.registers.names(f"{prefix}/c/") == [f"{prefix}/c/1", f"{prefix}/c/2"]
    assert await two.registers.names(f"{prefix}/d") == []
    assert set(await two.registers.names()) >= {f"{prefix}/b", f"{prefix}/c"}


async def register_race_has_one_winner(one: Engine, two: Engine) -> None:
    """Of several writers that expect the same version, on two connections, exactly one succeeds."""
    name, version = _new("race"), 0
    for _ in range(20):
        writers = [
            engine.registers.compare_and_set(name, secrets.token_bytes(8), version=version)
            for engine in (one, two, one, two)
        ]
        results = await asyncio.gather(*writers, return_exceptions=True)
        won = [result for result in results if isinstance(result, int)]
        assert len(won) == 1, results
        assert all(isinstance(result, int | Conflict) for result in results), results
        version = won[0]


async def odd_names_are_kept_apart(one: Engine, two: Engine) -> None:
    """Names with spaces, dots, wildcards, control and other characters, of 512 bytes, are all different."""
    for number, name in enumerate(ODD_NAMES):
        found = await two.registers.get(name)
        version = found.version if found is not None else 0
        await one.registers.compare_and_set(name, b"%d" % number, version=version)
    for number, name in enumerate(ODD_NAMES):
        found = await two.registers.get(name)
        assert found is not None
        assert found.value == b"%d" % number, name
    assert set(await two.registers.names()) >= set(ODD_NAMES)
    for name in ("", "x" * (ENGINE_NAME_BYTES_MAX + 1), "\ud800"):
        await _refused(one.registers.get(name), BadArgument)


# --- logs -----------------------------------------------------------------------------------


async def log_gives_back_what_was_appended(one: Engine, two: Engine) -> None:
    """Entries come back in order with rising sequences, from any start, in pages; then nothing."""
    log = _new("log")
    assert await two.logs.read(log) == []
    wanted = [b"%d" % number for number in range(250)]
    last = 0
    for first in range(0, 250, 50):
        last = await one.logs.append(log, wanted[first : first + 50])
    entries = await two.logs.read(log)
    assert [entry.data for entry in entries] == wanted
    sequences = [entry.sequence for entry in entries]
    assert sequences == sorted(set(sequences))
    assert sequences[0] >= 1
    assert sequences[-1] == last
    assert await two.logs.read(log, start=sequences[77], limit=3) == entries[77:80]
    assert await two.logs.read(log, start=last + 1) == []
    paged: list[Entry] = []
    while page := await two.logs.read(log, start=paged[-1].sequence + 1 if paged else 1, limit=60):
        assert len(page) <= 60
        paged += page
    assert paged == entries


async def log_appends_after_what_was_read(one: Engine, two: Engine) -> None:
    """`after` lets an append through only behind the log's last entry; else Conflict, and nothing added."""
    log = _new("log")
    await _refused(one.logs.append(log, [b"x"], after=7), Conflict)
    first = await one.logs.append(log, [b"a", b"b"], after=0)
    await _refused(two.logs.append(log, [b"x"], after=0), Conflict)
    await _refused(two.logs.append(log, [b"x"], after=first - 1), Conflict)
    await _refused(two.logs.append(log, [b"x"], after=first + 1), Conflict)
    second = await two.logs.append(log, [b"c"], after=first)
    await _refused(one.logs.append(log, [b"x"], after=first), Conflict)
    third = await one.logs.append(log, [b"d", b"e"], after=(await one.logs.read(log))[-1].sequence)
    assert first < second < third
    assert [entry.data for entry in await two.logs.read(log)] == [b"a", b"b", b"c", b"d", b"e"]


async def log_race_has_one_winner(one: Engine, two: Engine) -> None:
    """Of several appends after the same entry exactly one succeeds."""
    log, last = _new("log"), 0
    for _ in range(10):
        appends = [engine.logs.append(log, [b"x", b"y"], after=last) for engine in (one, two, one, two)]
        results = await asyncio.gather(*appends, return_exceptions=True)
        won = [result for result in results if isinstance(result, int)]
        assert len(won) == 1, results
        last = won[0]
    assert len(await one.logs.read(log)) == 20


async def log_keeps_concurrent_appends_whole(one: Engine, two: Engine) -> None:
    """Many appends at once are each whole, in place and once, at the sequence that was returned."""
    log = _new("log")

    async def write(engine: Engine, writer: int) -> dict[int, bytes]:
        returned = {}
        for number in range(5):
            entries = [b"%d.%d.%d" % (writer, number, part) for part in range(3)]
            returned[await engine.logs.append(log, entries)] = entries[-1]
        return returned

    written = await asyncio.gather(*(write((one, two)[writer % 2], writer) for writer in range(20)))
    entries = await one.logs.read(log)
    assert len(entries) == len({entry.data for entry in entries}) == 20 * 5 * 3
    found = {entry.sequence: entry.data for entry in entries}
    for returned in written:
        assert list(returned) == sorted(returned), "a writer's own appends are in order"
        assert all(found[sequence] == data for sequence, data in returned.items())
    for group in range(0, len(entries), 3):
        stems = {entry.data.rpartition(b".")[0] for entry in entries[group : group + 3]}
        assert len(stems) == 1, "the entries of one append stand together"


async def log_takes_large_appends_and_refuses_larger(one: Engine, two: Engine) -> None:
    """The longest entry and an append of many megabytes come back whole; more is TooLarge, none is bad."""
    log = _new("log")
    large = [secrets.token_bytes(LOG_ENTRY_BYTES_MAX) for _ in range(4)]
    last = await one.logs.append(log, [*large, b"end"])
    entries = await two.logs.read(log)
    assert [entry.data for entry in entries] == [*large, b"end"]
    assert entries[-1].sequence == last
    many = [b"%d" % number for number in range(LOG_BATCH_ENTRIES_MAX)]
    last = await one.logs.append(log, many, after=last)
    assert [entry.data for entry in await two.logs.read(log, start=entries[-1].sequence + 1)] == many
    await _refused(one.logs.append(log, [bytes(LOG_ENTRY_BYTES_MAX + 1)]), TooLarge)
    await _refused(one.logs.append(log, [*many, b"one more"]), TooLarge)
    await _refused(one.logs.append(log, []), BadArgument)
    assert (await two.logs.read(log, start=last))[-1].sequence == last


async def log_is_followed(one: Engine, two: Engine) -> None:
    """A follower gets what was there and what comes, each entry once and in order, from its start."""
    log = _new("log")
    await one.logs.append(log, [b"old 1", b"old 2"])
    start = (await one.logs.read(log))[1].sequence
    seen: list[bytes] = []

    async def follow() -> None:
        async for entry in two.logs.follow(log, start=start):
            seen.append(entry.data)
            if len(seen) == 21:
                return

    follower = asyncio.create_task(follow())
    for number in range(20):
        await one.logs.append(log, [b"new %d" % number])
    async with asyncio.timeout(10):
        await follower
    assert seen == [b"old 2", *(b"new %d" % number for number in range(20))]


async def logs_of_odd_names_are_kept_apart(one: Engine, two: Engine) -> None:
    """Logs have any names too, and do not mix."""
    unique = secrets.token_hex(4)
    names = [f"{unique}{name}"[:300] for name in ODD_NAMES[:-2]] + [unique + "é" * 200, unique + "é" * 201]
    for name in names:
        await one.logs.append(name, [name.encode()])
    for name in names:
        assert [entry.data for entry in await two.logs.read(name)] == [name.encode()]


# --- leases ---------------------------------------------------------------------------------


async def lease_has_one_holder(one: Engine, two: Engine) -> None:
    """While one holds it, others get None; released, the next gets it at once with a higher token."""
    name = _new("lease")
    assert await one.leases.holder(name) is None
    before = time.monotonic()
    lease = await one.leases.acquire(name, "one", ttl_s=30)
    assert lease is not None
    assert (lease.name, lease.owner) == (name, "one")
    assert before < lease.deadline <= before + 31
    assert await two.leases.acquire(name, "two", ttl_s=30) is None
    assert await two.leases.holder(name) == "one"
    renewed = await one.leases.renew(lease)
    assert (renewed.token, renewed.owner) == (lease.token, "one")
    assert renewed.deadline > lease.deadline
    await one.leases.release(renewed)
    assert await two.leases.holder(name) is None
    taken = await two.leases.acquire(name, "two", ttl_s=30)
    assert taken is not None
    assert taken.token > lease.token
    await _refused(one.leases.renew(renewed), Conflict)
    await one.leases.release(renewed)  # lost: no error, and no harm to the new holder
    assert await one.leases.holder(name) == "two"
    await two.leases.release(taken)


async def lease_runs_out(one: Engine, two: Engine) -> None:
    """An owner that stops renewing loses the lease after its time, not before; the next token is higher."""
    name = _new("lease")
    lease = await one.leases.acquire(name, "one", ttl_s=3)
    assert lease is not None
    begun = time.monotonic()
    lease = await one.leases.renew(lease)
    taken = None
    while taken is None:
        assert time.monotonic() < begun + 6, "a dead owner's lease is free soon after its time"
        await asyncio.sleep(0.05)
        taken = await two.leases.acquire(name, "two", ttl_s=3)
    assert time.monotonic() > lease.deadline, "the holder's own deadline comes first"
    assert taken.token > lease.token
    assert await one.leases.holder(name) == "two"
    await _refused(one.leases.renew(lease), Conflict)
    await one.leases.release(lease)
    assert await two.leases.renew(taken)
    await two.leases.release(taken)


async def lease_is_renewed_by_its_owner_alone(one: Engine, two: Engine) -> None:
    """Acquiring again as the same owner is a new grant: the earlier one cannot be renewed any more."""
    name = _new("lease")
    first = await one.leases.acquire(name, "owner", ttl_s=30)
    second = await two.leases.acquire(name, "owner", ttl_s=30)
    assert first is not None
    assert second is not None
    assert second.token > first.token
    await _refused(one.leases.renew(first), Conflict)
    assert (await two.leases.renew(second)).token == second.token
    await two.leases.release(second)


async def lease_race_has_one_winner(one: Engine, two: Engine) -> None:
    """Of several that want a free lease at the same time exactly one gets it, with a rising token."""
    name, token = _new("lease"), 0
    for _ in range(8):
        wanted = [
            engine.leases.acquire(name, f"owner {number}", ttl_s=30)
            for number, engine in enumerate((one, two, one, two))
        ]
        won = [lease for lease in await asyncio.gather(*wanted) if lease is not None]
        assert len(won) == 1, won
        assert won[0].token > token
        token = won[0].token
        await (one, two)[int(won[0].owner[-1]) % 2].leases.release(won[0])


async def lease_refuses_impossible_times(one: Engine, two: Engine) -> None:
    """A time to live too short to be kept, or absurd, is a BadArgument."""
    for ttl_s in (0.5, -1, float("nan"), 1e9):
        await _refused(one.leases.acquire(_new("lease"), "one", ttl_s=ttl_s), BadArgument)


# --- signals --------------------------------------------------------------------------------


async def signal_reaches_all_listeners(one: Engine, two: Engine) -> None:
    """Each listener hears each message of its subject, in order, until it stops listening."""
    subject = _new("signal.*")
    first: list[bytes] = []
    second: list[bytes] = []
    done = asyncio.Event()

    def hear(data: bytes) -> None:
        second.append(data)
        if data == b"end":
            done.set()

    end_first = await one.signals.subscribe(subject, first.append)
    end_second = await two.signals.subscribe(subject, hear)
    for number in range(10):
        await two.signals.publish(subject, b"%d" % number)
    await one.signals.publish(subject + "x", b"not for us")
    await _until(lambda: len(first) == len(second) == 10)
    assert first == second == [b"%d" % number for number in range(10)]
    await end_first()
    await two.signals.publish(subject, b"end")
    async with asyncio.timeout(5):
        await done.wait()
    await end_second()
    assert b"end" not in first


async def request_is_answered(one: Engine, two: Engine) -> None:
    """A request gets its answer; several servers share the requests; an error arrives as itself."""
    subject = _new("service")
    served = {"one": 0, "two": 0}

    def server(name: str) -> Callable[[bytes], Awaitable[bytes]]:
        async def serve(data: bytes) -> bytes:
            served[name] += 1
            if data == b"fail":
                raise NoNode("not here", hint="Look elsewhere.")
            return data[::-1]

        return serve

    ends = [
        await engine.signals.serve(subject, server(name)) for engine, name in ((one, "one"), (two, "two"))
    ]
    requests = [two.signals.request(subject, b"%03d" % number, timeout_s=5) for number in range(100)]
    assert await asyncio.gather(*requests) == [(b"%03d" % number)[::-1] for number in range(100)]
    assert min(served.values()) > 0, served
    assert sum(served.values()) == 100, "each request is served once"
    failure = await _refused(one.signals.request(subject, b"fail", timeout_s=5), NoNode)
    assert (failure.message, failure.hint) == ("not here", "Look elsewhere.")
    for end in ends:
        await end()
    # The other's end may reach the engine just behind the request, which then goes to nobody.
    await _refused(one.signals.request(subject, b"", timeout_s=1), EngineUnavailable, DeadlineExceeded)


async def request_ends_at_its_deadline(one: Engine, two: Engine) -> None:
    """A request that is not answered ends with DeadlineExceeded in its time."""
    subject = _new("service")
    release = asyncio.Event()

    async def wait(_: bytes) -> bytes:
        await release.wait()
        return b"late"

    end = await one.signals.serve(subject, wait)
    begun = time.monotonic()
    await _refused(two.signals.request(subject, b"", timeout_s=0.3), DeadlineExceeded)
    assert time.monotonic() - begun < 3
    release.set()
    await end()


async def _until(condition: Callable[[], bool], timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what was awaited did not come about"
        await asyncio.sleep(0.005)


CLAIMS: Final[tuple[Claim, ...]] = (
    register_is_read_after_it_was_written,
    register_refuses_a_wrong_version,
    register_is_deleted_and_made_anew,
    register_holds_empty_and_largest_values,
    registers_are_listed_by_prefix,
    register_race_has_one_winner,
    odd_names_are_kept_apart,
    log_gives_back_what_was_appended,
    log_appends_after_what_was_read,
    log_race_has_one_winner,
    log_keeps_concurrent_appends_whole,
    log_takes_large_appends_and_refuses_larger,
    log_is_followed,
    logs_of_odd_names_are_kept_apart,
    lease_has_one_holder,
    lease_runs_out,
    lease_is_renewed_by_its_owner_alone,
    lease_race_has_one_winner,
    lease_refuses_impossible_times,
    signal_reaches_all_listeners,
    request_is_answered,
    request_ends_at_its_deadline,
)
