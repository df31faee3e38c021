"""Writes whose acknowledgement is lost on its way: each is found out, and takes effect once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from engine.engines import CuttingProxy, connected
from virgo.engine.base import Engine
from virgo.engine.server import EmbeddedServer
from virgo.errors import Conflict, EngineUnavailable
from virgo.limits import LOG_ENTRY_BYTES_MAX

Work = Callable[[Engine, Callable[[], None]], Awaitable[None]]


def through_proxy(server: EmbeddedServer, work: Work, *, cuts: int) -> None:
    """Run the work with an engine and what loses its next acknowledgement."""

    async def main() -> None:
        proxy = CuttingProxy(server)

        def arm() -> None:
            proxy.armed = True

        async with proxy.running() as engine:
            await work(engine, arm)
        assert proxy.cuts == cuts

    asyncio.run(main())


def test_set_register(server: EmbeddedServer) -> None:
    """A compare-and-set that took effect is told so: no Conflict with itself."""

    async def work(engine: Engine, arm: Callable[[], None]) -> None:
        version = await engine.registers.compare_and_set("lost", b"0", version=0)
        arm()
        changed = await engine.registers.compare_and_set("lost", b"1", version=version)
        found = await engine.registers.get("lost")
        assert found is not None
        assert (found.value, found.version) == (b"1", changed)
        with pytest.raises(Conflict):
            await engine.registers.compare_and_set("lost", b"2", version=version)
        arm()
        await engine.registers.delete("lost", version=changed)
        assert await engine.registers.get("lost") is None

    through_proxy(server, work, cuts=2)


def test_set_register_that_was_overwritten(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another has written since, whether ours took effect is unknown, and never told as a Conflict."""

    async def work(engine: Engine, arm: Callable[[], None]) -> None:
        version = await engine.registers.compare_and_set("over", b"0", version=0)
        async with connected(server) as other:
            jetstream = engine._jetstream
            last = jetstream.last

            async def overwritten_first(*arguments, **options):
                found = await last(*arguments, **options)
                assert found.headers.get("Virgo-Write"), "ours took effect"
                await other.registers.compare_and_set("over", b"theirs", version=found.sequence)
                monkeypatch.setattr(jetstream, "last", last)
                return await last(*arguments, **options)

            monkeypatch.setattr(jetstream, "last", overwritten_first)
            arm()
            with pytest.raises(EngineUnavailable, match="unknown"):
                await engine.registers.compare_and_set("over", b"ours", version=version)

    through_proxy(server, work, cuts=1)


@pytest.mark.parametrize("entries", [[b"one"], [b"%d" % number for number in range(500)]])
def test_append(server: EmbeddedServer, entries: list[bytes]) -> None:
    """An append that took effect is not made twice, and its sequence is told."""
    log = f"lost {len(entries)}"

    async def work(engine: Engine, arm: Callable[[], None]) -> None:
        await engine.logs.append(log, [b"before"])
        arm()
        last = await engine.logs.append(log, entries)
        found = await engine.logs.read(log)
        assert [entry.data for entry in found] == [b"before", *entries]
        assert found[-1].sequence == last

    through_proxy(server, work, cuts=1)


def test_append_of_several_messages(server: EmbeddedServer) -> None:
    """An atomic batch that took effect is found again behind what others have appended."""
    large = [bytes([number]) * LOG_ENTRY_BYTES_MAX for number in range(3)]

    async def work(engine: Engine, arm: Callable[[], None]) -> None:
        async with connected(server) as other:
            await engine.logs.append("lost large", [b"before"])
            await other.logs.append("lost large", [b"other"])
            arm()
            last = await engine.logs.append("lost large", large)
            found = await engine.logs.read("lost large")
            assert [entry.data for entry in found] == [b"before", b"other", *large]
            assert found[-1].sequence == last

    through_proxy(server, work, cuts=1)


@pytest.mark.parametrize("large", [False, True])
def test_append_after(server: EmbeddedServer, large: bool) -> None:
    """A guarded append that took effect is told so: no Conflict with itself."""
    log = f"lost after {large}"
    entries = [b"x" * (LOG_ENTRY_BYTES_MAX if large else 1)] * 3

    async def work(engine: Engine, arm: Callable[[], None]) -> None:
        last = await engine.logs.append(log, [b"before"], after=0)
        arm()
        last = await engine.logs.append(log, entries, after=last)
        last = await engine.logs.append(log, [b"after"], after=last)
        found = await engine.logs.read(log)
        assert [entry.data for entry in found] == [b"before", *entries, b"after"]
        assert found[-1].sequence == last

    through_proxy(server, work, cuts=1)


def test_lease(server: EmbeddedServer) -> None:
    """A grant, a renewal and a release whose answers are lost are each found out."""

    async def work(engine: Engine, arm: Callable[[], None]) -> None:
        arm()
        lease = await engine.leases.acquire("lost", "me", ttl_s=30)
        assert lease is not None
        assert await engine.leases.holder("lost") == "me"
        for _ in range(2):
            arm()
            renewed = await engine.leases.renew(lease)
            assert renewed.token == lease.token
            assert renewed.deadline > lease.deadline
            lease = renewed
        arm()
        await engine.leases.release(lease)
        assert await engine.leases.holder("lost") is None

    through_proxy(server, work, cuts=4)
