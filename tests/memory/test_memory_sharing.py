"""Shared regions on their node: made, counted, freed, swept, lost with the machine, kept over kills."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from memory.pools import Pools, pools
from virgo.errors import BadArgument, BadConfig, DiskFull, PoolFull, TooLarge, UnknownId, VirgoError
from virgo.limits import MiB
from virgo.memory.segments import Segment, total_bytes
from virgo.memory.shelf import Shelf

if TYPE_CHECKING:
    from conftest import RunningCloud

Test = Callable[[Pools], Coroutine[Any, Any, None]]
KILLS = int(os.environ.get("VIRGO_TEST_KILLS", "3"))


def run(directory: Path, test: Test, *, count: int = 2, capacity_bytes: int = 64 * MiB) -> None:
    async def main() -> None:
        async with pools(directory, count, capacity_bytes=capacity_bytes) as found:
            await test(found)

    asyncio.run(main())


def shelf(nodes: Pools, number: int = 1) -> Path:
    return nodes[number].module.shared._shelf.path


def files(nodes: Pools, number: int = 1) -> set[str]:
    return {path.name for path in shelf(nodes, number).iterdir()} - {"store"}


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
            go_on.wait()

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
        Shelf(stores[number], f"{number:032x}", str(base), MiB)
    home = base / f"virgo-{os.geteuid()}"
    (home / f"{1:032x}" / name(7)).write_bytes(b"segment")
    shutil.rmtree(stores[0])
    moved = stores[1].rename(tmp_path / "moved")
    again = Shelf(moved, f"{1:032x}", str(base), MiB)
    assert again.names() == [name(7)] and not again.emptied
    assert sorted(path.name for path in home.iterdir()) == [f"{1:032x}", f"{2:032x}"]


def test_a_copy_of_a_pool_gets_a_directory_of_its_own(tmp_path: Path) -> None:
    """Copied with its identity, a pool does not touch the files of the one that it is a copy of."""
    store = tmp_path / "store"
    store.mkdir()
    first = Shelf(store, "1" * 32, str(tmp_path), MiB)
    (first.path / name(7)).write_bytes(b"segment")
    shutil.copytree(store, tmp_path / "copy", symlinks=True)
    copy = Shelf(tmp_path / "copy", "1" * 32, str(tmp_path), MiB)
    assert copy.path != first.path and copy.names() == []
    assert Shelf(store, "1" * 32, str(tmp_path), MiB).names() == [name(7)]
    assert Shelf(tmp_path / "copy", "1" * 32, str(tmp_path), MiB).path == copy.path


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


def test_kill_9_of_the_node_loses_no_region_and_leaks_no_file(
    make_cloud: Callable[..., RunningCloud],
) -> None:
    """Killed at random while regions are made, set and freed: what was acknowledged is there, and no more."""
    own = make_cloud(1)
    chance = random.Random(7)
    alive: dict[int, bytes] = {}
    unsure: set[int] = set()
    with own.connect() as cloud:
        place = Path(cloud.memory.stats()["segments_directory"])
        for _ in range(KILLS):
            pid = own.node("n1")["pid"]
            killer = threading.Timer(chance.random() * 0.2, os.kill, (pid, signal.SIGKILL))
            killer.start()
            with contextlib.suppress(VirgoError):
                while True:
                    region = cloud.memory.malloc(chance.randrange(1, 300_000), shared=True)
                    alive[region.id] = b""
                    value = b"%d" % region.id * chance.randrange(1, 15)
                    unsure.add(region.id)
                    cloud.client.execute("VIRGO_SET", region.id, value[: region.size])
                    unsure.discard(region.id)
                    alive[region.id] = value[: region.size]
                    if len(alive) > 5:
                        victim = chance.choice(list(alive))
                        del alive[victim]
                        cloud.client.execute("VIRGO_FREE", victim)
            killer.join()
            deadline = time.monotonic() + 30
            while own.node("n1")["state"] != "up" or own.node("n1")["pid"] == pid:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            for identifier, value in alive.items():
                found = cloud.client.execute("VIRGO_GET", identifier)
                assert found == value or identifier in unsure, identifier
            stats = cloud.memory.stats()
            names = {path.name for path in place.iterdir()} - {"store"}
            assert stats["segments"] == stats["regions"] == len({one[:16] for one in names})
            assert {f"{identifier:016x}" for identifier in alive} <= names
            declared = sum(
                total_bytes(cloud.memory.region(int(one, 16)).size) for one in names if len(one) == 16
            )
            assert stats["declared_bytes"] == declared
