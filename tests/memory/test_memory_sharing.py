"""Shared regions on their node: made, counted, freed, swept, lost with the machine, kept over kills."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from memory.pools import Pools, pools
from virgo.errors import BadArgument, BadConfig, DiskFull, PoolFull, TooLarge, UnknownId
from virgo.limits import MiB
from virgo.memory.segments import Segment, total_bytes
from virgo.memory.shelf import Shelf

Test = Callable[[Pools], Coroutine[Any, Any, None]]
KILLS = int(os.environ.get("VIRGO_TEST_KILLS", "15"))


def run(directory: Path, test: Test, *, count: int = 2, capacity_bytes: int = 64 * MiB) -> None:
    async def main() -> None:
        async with pools(directory, count, capacity_bytes=capacity_bytes) as found:
            await test(found)

    asyncio.run(main())


def shelf(nodes: Pools, number: int = 1) -> Path:
    return nodes[number].module.shared._shelf.path


def files(nodes: Pools, number: int = 1) -> set[str]:
    place = shelf(nodes, number)
    return {path.name for path in place.iterdir()} - {"store", "mounts"} if place.exists() else set()


def made(store: Path, identity: str, base: Path) -> Shelf:
    found = Shelf(store, identity, str(base), MiB)
    found.make()
    return found


def name(identifier: int) -> str:
    return f"{identifier:016x}"


def test_any_node_serves_it_and_freeing_leaves_nothing(tmp_path: Path) -> None:
    """Made on one node, set and read from another, whole and in parts; counted as what its file takes."""

    async def test(nodes: Pools) -> None:
        identifier = await nodes[1].run("VIRGO_MALLOC", 10_000, "NODE", "n2", "SHARED")
        assert files(nodes, 2) == {name(identifier)}
        assert nodes[2].stats()["declared_bytes"] == total_bytes(10_000) == 4 * 4096
        assert await nodes[1].run("VIRGO_GET", identifier) == b""
        await nodes[1].run("VIRGO_SET", identifier, b"abc")
        await nodes[1].run("VIRGO_SET", identifier, b"z", "AT", 9_999)
        assert await nodes[2].run("VIRGO_GET", identifier) == b"abc" + bytes(9_996) + b"z"
        with pytest.raises(TooLarge):
            await nodes[1].run("VIRGO_SET", identifier, bytes(10_001))
        await nodes[1].run("VIRGO_FREE", identifier)
        assert (files(nodes, 2), nodes.total("declared_bytes"), nodes.total("segments")) == (set(), 0, 0)
        for words in (
            ["VIRGO_GET"],
            ["VIRGO_SET", b"x"],
            ["VIRGO_FREE"],
            ["MEMORY.SEGMENT"],
            ["MEMORY.REGION"],
        ):
            for node in (nodes[1], nodes[2]):
                with pytest.raises(UnknownId):
                    await node.run(words[0], identifier, *words[1:])

    run(tmp_path, test)


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    """Sizes, options and notes that are none; nothing is made."""

    async def test(nodes: Pools) -> None:
        for error, *words in (
            (BadArgument, 0, "SHARED"),
            (BadArgument, -1, "SHARED"),
            (TooLarge, 2**41, "SHARED"),
            (PoolFull, 2**39, "SHARED"),
            (BadArgument, 10, "SHARED", "NOTE"),
            (BadArgument, 10, "NOTE", "x"),
            (BadArgument, 10, "NODE"),
            (BadArgument, 10, "COMMON"),
            (TooLarge, 10, "SHARED", "NOTE", "x" * 3000),
        ):
            with pytest.raises(error) as caught:
                await nodes[1].run("VIRGO_MALLOC", *words)
            assert caught.value.hint
        assert (files(nodes), nodes.total("declared_bytes")) == (set(), 0)
        plain = await nodes[1].run("VIRGO_MALLOC", 10)
        assert await nodes[2].run("MEMORY.SEGMENT", plain) is None

    run(tmp_path, test)


def test_a_full_pool_goes_elsewhere_and_then_says_so(tmp_path: Path) -> None:
    """Without NODE it is made where there is room; with NODE it is PoolFull; nothing is half made."""

    async def test(nodes: Pools) -> None:
        made = [await nodes[1].run("VIRGO_MALLOC", 6 * MiB, "SHARED") for _ in range(4)]
        assert [len(files(nodes, number)) for number in (1, 2)] == [2, 2]
        for words in (
            (6 * MiB, "SHARED"),
            (6 * MiB, "NODE", "n2", "SHARED"),
            (6 * MiB, "NODE", ".", "SHARED"),
        ):
            with pytest.raises(PoolFull):
                await nodes[1].run("VIRGO_MALLOC", *words)
        assert nodes.total("segments") == 4
        await nodes[2].run("VIRGO_FREE", made[0])
        await nodes[1].run("VIRGO_MALLOC", 6 * MiB, "NODE", ".", "SHARED")

    run(tmp_path, test, capacity_bytes=16 * MiB)


def test_what_a_killed_node_left_between_file_and_record_is_swept(tmp_path: Path) -> None:
    """A file without a record goes at the start and with the next round; regions with records stay."""

    async def test(nodes: Pools) -> None:
        node = nodes[1]
        kept = await node.run("VIRGO_MALLOC", 5000, "SHARED")
        await node.run("VIRGO_SET", kept, b"kept")
        await node.stop()
        for orphan in (name(kept + 1), name(kept + 1) + ".redo", name(kept - 1)):
            (shelf(nodes) / orphan).write_bytes(b"x" * 5000)
        await node.start()
        assert files(nodes) == {name(kept)}
        assert node.stats()["segments_swept"] == 3 and await node.run("VIRGO_GET", kept) == b"kept"
        (shelf(nodes) / name(kept + 9)).write_bytes(b"x")
        await node.module.shared.tidy()
        assert files(nodes) == {name(kept)} and await node.run("VIRGO_GET", kept) == b"kept"
        assert node.stats()["declared_bytes"] == total_bytes(5000)

    run(tmp_path, test)


def test_a_region_in_the_making_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its file is there and its record is not yet, a round of tidying spares it."""

    async def test(nodes: Pools) -> None:
        begun, go_on = threading.Event(), threading.Event()
        really = Segment.create

        def slow(segment: Segment, *, full: bool) -> None:
            really(segment, full=full)
            begun.set()
            go_on.wait(5)

        monkeypatch.setattr(Segment, "create", slow)
        making = asyncio.create_task(nodes[1].run("VIRGO_MALLOC", 5000, "SHARED"))
        await asyncio.to_thread(begun.wait)
        await nodes[1].module.shared.tidy()
        assert len(files(nodes)) == 1
        go_on.set()
        identifier = await making
        await nodes[1].run("VIRGO_SET", identifier, b"there")
        # A client that goes away in the middle leaves nothing.
        begun.clear()
        go_on.clear()
        making = asyncio.create_task(nodes[1].run("VIRGO_MALLOC", 5000, "SHARED"))
        await asyncio.to_thread(begun.wait)
        making.cancel()
        await asyncio.gather(making, return_exceptions=True)
        go_on.set()
        deadline = time.monotonic() + 5
        while files(nodes) != {name(identifier)}:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert nodes[1].stats()["declared_bytes"] == total_bytes(5000)

    run(tmp_path, test)


def test_what_a_killed_writer_left_is_finished(tmp_path: Path) -> None:
    """A round of tidying finishes a write that was begun, and removes what lies beside the value."""

    async def test(nodes: Pools) -> None:
        identifier = await nodes[1].run("VIRGO_MALLOC", 50_000, "SHARED")
        await nodes[1].run("VIRGO_SET", identifier, b"old" * 9000)
        segment = nodes[1].module.shared._segment(identifier, 50_000)
        child = os.fork()
        if child == 0:
            really = segment._change
            # Killed once the write is sure to take place, and before anything of it has.
            Segment._change = lambda *arguments: (really(*arguments[1:]), os.kill(os.getpid(), 9))  # type: ignore[assignment,return-value]
            segment.write(b"new" * 12_000)
        os.waitpid(child, 0)
        assert files(nodes) == {name(identifier), name(identifier) + ".redo"}
        await nodes[1].module.shared.tidy()
        assert files(nodes) == {name(identifier)}
        assert await nodes[2].run("VIRGO_GET", identifier) == b"new" * 12_000

    run(tmp_path, test)


def test_what_the_machine_has_lost_is_forgotten_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a reboot the pool may be there, and shared memory not: the regions are gone, with a word."""

    monkeypatch.setattr("virgo.memory.shelf.is_memory", lambda _path: True)

    async def test(nodes: Pools) -> None:
        plain = await nodes[1].run("VIRGO_MALLOC", 100)
        await nodes[1].run("VIRGO_SET", plain, b"kept")
        lost = await nodes[1].run("VIRGO_MALLOC", 5000, "SHARED")
        await nodes[1].stop()
        shutil.rmtree(shelf(nodes))
        await nodes[1].start()
        assert f"{lost:#x}" in caplog.text
        for node in (nodes[1], nodes[2]):
            with pytest.raises(UnknownId):
                await node.run("VIRGO_GET", lost)
            assert await node.run("VIRGO_GET", plain) == b"kept"
        assert (nodes[1].stats()["declared_bytes"], nodes[1].stats()["segments_lost"]) == (100, 1)
        again = await nodes[1].run("VIRGO_MALLOC", 5000, "SHARED")
        assert again > lost, "an id is never given again"
        # And while it runs, as systemd does at the end of a session.
        (shelf(nodes) / name(again)).unlink()
        with pytest.raises(UnknownId, match="gone"):
            await nodes[2].run("VIRGO_GET", again)
        await nodes[1].module.shared.tidy()
        assert nodes[1].stats()["declared_bytes"] == 100
        shutil.rmtree(shelf(nodes))
        await nodes[1].run("VIRGO_MALLOC", 5000, "SHARED")

    run(tmp_path, test)


def test_a_disk_that_is_out_of_reach_loses_nothing(tmp_path: Path) -> None:
    """While it is not mounted its regions say so; when it is again they are there."""

    async def test(nodes: Pools) -> None:
        identifier = await nodes[1].run("VIRGO_MALLOC", 5000, "SHARED")
        await nodes[1].run("VIRGO_SET", identifier, b"kept")
        place, away = shelf(nodes), tmp_path / "away"
        for restart in (False, True):
            place.rename(away)
            if restart:
                await nodes[1].stop()
                await nodes[1].start()
            await nodes[1].module.shared.tidy()
            with pytest.raises(UnknownId, match="gone"):
                await nodes[2].run("VIRGO_GET", identifier)
            if place.exists():
                shutil.rmtree(place)
            away.rename(place)
            assert await nodes[2].run("VIRGO_GET", identifier) == b"kept"

    run(tmp_path, test)


def test_they_outlast_a_restart_wherever_they_are(tmp_path: Path) -> None:
    """Also when the setting names another place by then: there they are made once the old ones are freed."""

    async def test(nodes: Pools) -> None:
        node, before = nodes[1], shelf(nodes)
        identifier = await node.run("VIRGO_MALLOC", 5000, "SHARED", "NOTE", "a note")
        await node.run("VIRGO_SET", identifier, b"x" * 5000)
        node.config = _elsewhere(node.config, tmp_path / "elsewhere")
        for _ in range(2):
            await node.stop()
            await node.start()
            assert shelf(nodes) == before
            assert await node.run("VIRGO_GET", identifier) == b"x" * 5000
        await node.run("VIRGO_FREE", identifier)
        await node.stop()
        await node.start()
        assert shelf(nodes).is_relative_to(tmp_path / "elsewhere") and not before.exists()
        await node.run("VIRGO_MALLOC", 5000, "SHARED")

    (tmp_path / "elsewhere").mkdir()
    run(tmp_path, test)


def _elsewhere(config: Any, place: Path) -> Any:
    import msgspec

    memory = msgspec.structs.replace(config.memory, shared_directory=str(place))
    return msgspec.structs.replace(config, memory=memory)


def test_directories_of_pools_that_are_gone_are_removed(tmp_path: Path) -> None:
    """A removed pool's segments go with the next start of another one; those of live and moved ones stay."""
    base = tmp_path / "shm"
    base.mkdir()
    stores = {}
    for number in range(3):
        stores[number] = tmp_path / f"store{number}"
        stores[number].mkdir()
        made(stores[number], f"{number:032x}", base)
    home = base / f"virgo-{os.geteuid()}"
    (home / f"{1:032x}" / name(7)).write_bytes(b"segment")
    shutil.rmtree(stores[0])
    moved = stores[1].rename(tmp_path / "moved")
    again = made(moved, f"{1:032x}", base)
    assert again.names() == [name(7)] and not again.emptied
    assert sorted(path.name for path in home.iterdir()) == [f"{1:032x}", f"{2:032x}"]


def test_directories_of_other_views_are_left_alone(tmp_path: Path) -> None:
    """In a container that shares /dev/shm stores lie where we do not see them: their segments stay."""
    store = tmp_path / "store"
    store.mkdir()
    there = made(store, "1" * 32, tmp_path)
    (there.path / "mounts").unlink()
    (there.path / "mounts").symlink_to("mnt:[1]")
    shutil.rmtree(store)
    (tmp_path / "other").mkdir()
    made(tmp_path / "other", "2" * 32, tmp_path)
    assert there.path.exists()


def test_a_pool_by_another_name_is_the_same_one(tmp_path: Path) -> None:
    """Reached through a link, a store has the segments that it had."""
    store = tmp_path / "store"
    store.mkdir()
    first = made(store, "1" * 32, tmp_path)
    (first.path / name(7)).write_bytes(b"segment")
    (tmp_path / "link").symlink_to(store)
    again = made(tmp_path / "link", "1" * 32, tmp_path)
    assert again.path == first.path and again.names() == [name(7)] and not again.emptied


def test_a_copy_of_a_pool_gets_a_directory_of_its_own(tmp_path: Path) -> None:
    """Copied with its identity, a pool does not touch the files of the one that it is a copy of."""
    store = tmp_path / "store"
    store.mkdir()
    first = made(store, "1" * 32, tmp_path)
    (first.path / name(7)).write_bytes(b"segment")
    shutil.copytree(store, tmp_path / "copy", symlinks=True)
    copy = made(tmp_path / "copy", "1" * 32, tmp_path)
    assert copy.path != first.path and copy.names() == [] and copy.emptied
    again = made(store, "1" * 32, tmp_path)
    assert again.names() == [name(7)] and not again.emptied
    assert made(tmp_path / "copy", "1" * 32, tmp_path).path == copy.path


def test_a_node_that_stops_in_order_leaves_nothing_that_is_empty(tmp_path: Path) -> None:
    """Without shared regions no directory is made; freed ones leave none; with one it stays."""

    async def test(nodes: Pools) -> None:
        home = shelf(nodes).parent
        assert not home.exists()
        identifier = await nodes[1].run("VIRGO_MALLOC", 5000, "SHARED")
        await nodes[1].stop()
        assert [path.name for path in shelf(nodes).iterdir()] != []
        await nodes[1].start()
        await nodes[1].run("VIRGO_FREE", identifier)
        await nodes[1].stop()
        assert not home.exists() and not (nodes[1].directory / "memory" / "segments").is_symlink()
        await nodes[1].start()
        assert await nodes[1].run("VIRGO_MALLOC", 5000, "SHARED") > identifier

    run(tmp_path, test)


def test_a_place_that_is_not_ours_alone_is_refused(tmp_path: Path) -> None:
    """Somebody may have made the directory first, to look in or to lead us elsewhere."""
    mine = f"virgo-{os.geteuid()}"
    for number, make in enumerate((
        lambda place: (place / mine).symlink_to(tmp_path),
        lambda place: (place / mine).mkdir(mode=0o755),
        lambda place: (place / mine).write_bytes(b""),
    )):  # fmt: skip
        place = tmp_path / str(number)
        place.mkdir()
        make(place)
        with pytest.raises(BadConfig) as caught:
            Shelf(tmp_path, "1" * 32, str(place), MiB)
        assert caught.value.hint
    for wrong in ("relative", str(tmp_path / "absent")):
        with pytest.raises(BadConfig):
            Shelf(tmp_path, "1" * 32, wrong, MiB)


@pytest.mark.skipif(os.getuid() != 0 and not os.environ.get("CI"), reason="mounting needs root")
def test_a_full_tmpfs_leaves_all_as_it_was(tmp_path: Path) -> None:
    """What does not fit is DiskFull and leaves nothing; the rest is intact; freeing makes room again."""
    mount = tmp_path / "tiny"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", mount], check=True)

    async def test(nodes: Pools) -> None:
        nodes[1].config = _elsewhere(nodes[1].config, mount)
        await nodes[1].stop()
        await nodes[1].start()
        first = await nodes[1].run("VIRGO_MALLOC", 3 * MiB, "SHARED")
        await nodes[1].run("VIRGO_SET", first, b"first" * 600_000)
        for _ in range(3):
            with pytest.raises(DiskFull):
                await nodes[1].run("VIRGO_MALLOC", 6 * MiB, "SHARED")
        assert files(nodes) == {name(first)}
        assert nodes[1].stats()["declared_bytes"] == total_bytes(3 * MiB)
        second = await nodes[1].run("VIRGO_MALLOC", 4 * MiB, "SHARED")
        with pytest.raises(DiskFull):
            await nodes[2].run("VIRGO_SET", first, b"other" * 600_000)
        assert await nodes[2].run("VIRGO_GET", first) == b"first" * 600_000
        await nodes[1].run("VIRGO_FREE", second)
        await nodes[2].run("VIRGO_SET", first, b"other" * 600_000)
        assert await nodes[2].run("VIRGO_GET", first) == b"other" * 600_000

    try:
        run(tmp_path, test)
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)


def work(directory: Path, seed: int, report: int) -> None:
    """A node that makes, sets and frees shared regions until it is killed, and says what is done."""
    chance = random.Random(seed)

    def say(*words: object) -> None:
        os.write(report, f"{' '.join(map(str, words))}\n".encode())

    async def main() -> None:
        async with pools(directory, 1) as nodes:
            run, alive = nodes[1].run, []
            while True:
                size = chance.randrange(1, 200_000)
                identifier = await run("VIRGO_MALLOC", size, "SHARED")
                say("made", identifier, size)
                for length in (size, size // 2):
                    say("setting", identifier, length)
                    await run("VIRGO_SET", identifier, value_of(identifier, length))
                    say("set", identifier, length)
                alive.append(identifier)
                if len(alive) > 3:
                    identifier = alive.pop(chance.randrange(len(alive)))
                    say("freeing", identifier, 0)
                    await run("VIRGO_FREE", identifier)
                    say("freed", identifier, 0)

    asyncio.run(main())


def value_of(identifier: int, length: int) -> bytes:
    return (b"%d %d," % (identifier, length) * (length // 10 + 1))[:length]


def test_kill_9_of_the_node_loses_no_region_and_leaks_no_file(tmp_path: Path) -> None:
    """Killed at random while regions are made, set and freed: what was acknowledged is there, and no more."""
    chance = random.Random(7)
    total = 0
    for seed in range(KILLS):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            work(tmp_path, seed, write)
        os.close(write)
        with os.fdopen(read, "rb") as report:
            first = report.readline()
            time.sleep(chance.random() * 0.1)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            said = [line.split() for line in (first + report.read()).decode().splitlines()]
        total += len(said)
        run(tmp_path, lambda nodes, said=said: check(nodes, said), count=1)  # type: ignore[misc]
    assert total > 5 * KILLS


async def check(nodes: Pools, said: list[list[str]]) -> None:
    """What the killed node has said is so; then free all."""
    told: dict[int, list[str]] = {}
    sizes: dict[int, int] = {}
    for what, identifier, number in said:
        told.setdefault(int(identifier), []).append(f"{what} {number}")
        if what == "made":
            sizes[int(identifier)] = int(number)
    names, node = files(nodes), nodes[1]
    assert all("." not in one for one in names), "a redo is left"
    for identifier, words in told.items():
        what, length = words[-1].split()
        there = name(identifier) in names
        assert there or what in ("freeing", "freed")
        assert not (there and what == "freed")
        if there and what != "freeing":
            found = await node.run("VIRGO_GET", identifier)
            last = next((int(one.split()[1]) for one in reversed(words) if one.startswith("set ")), 0)
            known = [value_of(identifier, last)] + [value_of(identifier, int(length))] * (what == "setting")
            assert found in known, "torn or lost"
    unheard = names - {name(identifier) for identifier in told}
    assert len(unheard) <= 1, "at most the one whose making was not acknowledged yet"
    stats = node.stats()
    assert stats["segments"] == stats["regions"] == len(names)
    for one in names:
        await node.run("VIRGO_FREE", int(one, 16))
    assert (node.stats()["declared_bytes"], files(nodes)) == (0, set())
