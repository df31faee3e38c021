"""Clients connected directly to a node that is stopped or that takes long: named in time, or waited for."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from conftest import RunningCloud
from virgo import aio
from virgo.cloud import connect
from virgo.errors import NodeLost, VirgoError
from virgo.wire.aclient import AsyncClient
from virgo.wire.address import Address
from virgo.wire.client import Client

# What a request to a stopped node took before the node was asked whether it lives; the promise is 5 s, and
# a loaded machine may be late.
DEADLINE_S = 30.0


def ways(running: RunningCloud, name: str) -> list[dict[str, Any]]:
    """The two ways from this machine to a node."""
    port = running.ports(name)["memory"]
    return [
        {"address": Address(path=running.socket(name))},
        {"address": Address(host="127.0.0.1", port=port), "token": running.token},
    ]


def blocking(way: dict[str, Any], between: Callable[[], None], *request: Any) -> Any:
    """A blocking client's second request, on a connection that has served before."""
    with Client(**way, timeout_s=DEADLINE_S) as client:
        assert client.execute("PING") == b"PONG"
        between()
        return timed(lambda: client.execute(*request))


def waiting(way: dict[str, Any], between: Callable[[], None], *request: Any) -> Any:
    """The same of an asyncio client."""

    async def main() -> Any:
        async with AsyncClient(**way, timeout_s=DEADLINE_S) as client:
            assert await client.execute("PING") == b"PONG"
            await asyncio.to_thread(between)
            started = time.monotonic()
            try:
                return await client.execute(*request), time.monotonic() - started
            except VirgoError as error:
                return error, time.monotonic() - started

    return asyncio.run(main())


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.monotonic()
    try:
        return work(), time.monotonic() - started
    except VirgoError as error:
        return error, time.monotonic() - started


def test_a_stopped_node_is_lost_for_its_own_clients_and_serves_them_afterwards(
    make_cloud: Callable[..., RunningCloud],
) -> None:
    """SIGSTOP: NodeLost with a hint, by either client, over Unix socket and TCP; SIGCONT brings it back."""
    running = make_cloud(1)
    pid = running.node("n1")["pid"]
    all_ways = ways(running, "n1")
    ready = threading.Barrier(5)

    def between() -> None:
        ready.wait(DEADLINE_S)  # all are connected
        ready.wait(DEADLINE_S)  # the node is stopped

    with ThreadPoolExecutor(4) as threads:
        work = [
            threads.submit(kind, way, between, "WHOAMI") for kind in (blocking, waiting) for way in all_ways
        ]
        ready.wait(DEADLINE_S)
        os.kill(pid, signal.SIGSTOP)
        try:
            ready.wait(DEADLINE_S)
            outcomes = [one.result() for one in work]
        finally:
            os.kill(pid, signal.SIGCONT)
    for loss, took_s in outcomes:
        assert isinstance(loss, NodeLost), loss
        assert took_s < DEADLINE_S / 2
        assert "unknown" in loss.hint
    for loss, _took in outcomes[::2]:
        assert f"{pid} is stopped" in loss.message
        assert f"kill -CONT {pid}" in loss.hint
    for way in all_ways:
        with Client(**way) as client:
            assert client.execute("PING") == b"PONG"


def test_a_long_call_of_a_healthy_node_is_waited_for(cloud3: RunningCloud) -> None:
    """A clone that is silent for 8 s returns, by either client, over Unix socket and TCP."""

    async def sleep(target: str) -> Any:
        async with await aio.connect(target, home=cloud3.home) as cloud:
            return await cloud.cpu.clone("sleep", 8.0)

    def sleep_blocking(target: str) -> Any:
        with connect(target, home=cloud3.home) as cloud:
            return cloud.cpu.clone("sleep", 8.0)

    targets = [str(way["address"]) for way in ways(cloud3, "n1")]
    with ThreadPoolExecutor(4) as threads:
        work = [threads.submit(sleep_blocking, target) for target in targets]
        work += [threads.submit(lambda target=target: asyncio.run(sleep(target))) for target in targets]
        assert [one.result() for one in work] == [8.0] * 4


def test_a_program_finds_another_node_when_the_first_is_stopped(
    make_cloud: Callable[..., RunningCloud],
) -> None:
    """Either connect() without a place goes on to the next node of this machine when one is silent."""

    async def find() -> str:
        async with await aio.connect(home=running.home, embedded=False) as cloud:
            return cloud.client.address.path

    running = make_cloud(2)
    with connect(home=running.home, embedded=False) as cloud:
        assert cloud.client.address.path == running.socket("n1")
    pid = running.node("n1")["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        with connect(home=running.home, embedded=False) as cloud:
            assert cloud.client.address.path == running.socket("n2")
        assert asyncio.run(find()) == running.socket("n2")
    finally:
        os.kill(pid, signal.SIGCONT)
