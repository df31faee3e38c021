"""Pools of workers: how a program makes each, or joins one that runs, with the same two calls on all.

A function here takes the stack that is to close what it makes, and can be sent to another process. `peers`
and `servers` start what runs apart from the program: a node of ours, Ray, a Dask scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks import peers, servers
from benchmarks.harness import Comparison, Hosted, Need
from benchmarks.servers import WORKERS


@dataclass(frozen=True, slots=True)
class Calls:
    """How a program calls the workers of a pool.

    Attributes:
        one: make a call, wait, give the result: `one(function, *arguments)`.
        many: make a call for each value before waiting for any; the results in order.
        root: a process that the pool's others descend from, if it does not descend from this one; else 0.
    """

    one: Callable[..., Any]
    many: Callable[[Any, Iterable[Any]], list[Any]]
    root: int = 0


Opener = Callable[[ExitStack], Calls]


@dataclass(frozen=True, slots=True)
class Pool:
    """A kind of pool.

    Attributes:
        name: in the tables.
        promises: what an answer means.
        libraries: what a program imports to use it.
        make: makes one from nothing, for this program.
        serve: starts what several programs can use at once, and gives how another one joins it. Where there
            is no such thing, what it gives makes a pool of that program's own.
        shared: whether there is such a thing.
        needs: what must be installed.
    """

    name: str
    promises: str
    libraries: tuple[str, ...]
    make: Opener
    serve: Callable[[ExitStack], Opener]
    shared: bool = True
    needs: tuple[Need, ...] = ()


class Pooled(Hosted):
    """A contender that calls the workers of a pool.

    Args:
        pool: which.
        quick: see Hosted.
    """

    def __init__(self, pool: Pool, quick: bool) -> None:
        super().__init__(quick)
        self.name, self.promises, self.needs = pool.name, pool.promises, pool.needs
        self.pool = pool
        self.calls: Calls

    def start(self) -> None:
        self.calls = self.pool.make(self.running)


def comparisons(names: Iterable[str], peers: Iterable[str] = ()) -> tuple[Comparison, ...]:
    """Ours beside every peer, or some by name, in these measures, for the record."""
    measures = tuple(names)
    chosen = tuple(peers) or tuple(pool.name for pool in POOLS if pool is not OURS)
    return tuple(Comparison(OURS.name, peer, measures) for peer in chosen)


def _join_virgo(running: ExitStack, home: Path, root: int) -> Calls:
    import virgo

    cpu = running.enter_context(virgo.connect(home=home, embedded=False)).cpu
    return Calls(cpu.clone, lambda function, values: list(cpu.map(function, values)), root)


def _serve_virgo(running: ExitStack) -> Opener:
    place = running.enter_context(servers.virgo_cloud())
    return partial(_join_virgo, home=place.home, root=place.supervisor().pid)


def _make_virgo(running: ExitStack) -> Calls:
    return _serve_virgo(running)(running)


def _of_executor(executor: Executor) -> Calls:
    def many(function: Any, values: Iterable[Any]) -> list[Any]:
        return [one.result() for one in [executor.submit(function, value) for value in values]]

    return Calls(lambda function, *arguments: executor.submit(function, *arguments).result(), many)


def _make_process_pool(running: ExitStack) -> Calls:
    from concurrent.futures import ProcessPoolExecutor

    return _of_executor(running.enter_context(ProcessPoolExecutor(WORKERS)))


def _make_loky(running: ExitStack) -> Calls:
    from loky import get_reusable_executor

    return _of_executor(running.enter_context(get_reusable_executor(max_workers=WORKERS)))


def _of_ray(ray: Any) -> Calls:
    remote = cache(ray.remote)
    return Calls(
        lambda function, *arguments: ray.get(remote(function).remote(*arguments)),
        lambda function, values: ray.get([remote(function).remote(value) for value in values]),
    )


def _make_ray(running: ExitStack) -> Calls:
    return _of_ray(running.enter_context(peers.ray_session()))


def _join_ray(running: ExitStack, address: str) -> Calls:
    return _of_ray(running.enter_context(peers.ray_driver(address)))


def _serve_ray(running: ExitStack) -> Opener:
    ray = running.enter_context(peers.ray_session())
    return partial(_join_ray, address=ray.get_runtime_context().gcs_address)


def _of_dask(client: Any) -> Calls:
    return Calls(
        lambda function, *arguments: client.submit(function, *arguments, pure=False).result(),
        lambda function, values: client.gather(client.map(function, values, pure=False)),
    )


def _make_dask(running: ExitStack) -> Calls:
    return _of_dask(running.enter_context(peers.dask_client()))


def _join_dask(running: ExitStack, address: str) -> Calls:
    import distributed

    return _of_dask(running.enter_context(distributed.Client(address)))


def _serve_dask(running: ExitStack) -> Opener:
    client = running.enter_context(peers.dask_client())
    return partial(_join_dask, address=client.scheduler.address)


OURS = Pool(
    name="virgo",
    promises=f"any callable; process per slot ({WORKERS} workers); at most once, every loss named",
    libraries=("virgo",),
    make=_make_virgo,
    serve=_serve_virgo,
)
PROCESS_POOL = Pool(
    name="ProcessPoolExecutor",
    promises=f"function by reference; {WORKERS} worker processes of this program; one death breaks the pool",
    libraries=("concurrent.futures.process",),
    make=_make_process_pool,
    serve=lambda _: _make_process_pool,
    shared=False,
)
LOKY = Pool(
    name="loky",
    promises=(
        f"any callable; reusable executor, {WORKERS} worker processes of this program, each an interpreter "
        "begun afresh; one death breaks it, the next is made anew"
    ),
    libraries=("loky",),
    make=_make_loky,
    serve=lambda _: _make_loky,
    shared=False,
    needs=(servers.module("loky"),),
)
RAY = Pool(
    name="Ray",
    promises=f"any callable; num_cpus={WORKERS}, no dashboard; system failures retried (at least once)",
    libraries=("ray",),
    make=_make_ray,
    serve=_serve_ray,
    needs=(servers.module("ray"),),
)
DASK = Pool(
    name="Dask",
    promises=f"any callable; {WORKERS} worker processes of one thread, no dashboard; recomputed on loss",
    libraries=("distributed",),
    make=_make_dask,
    serve=_serve_dask,
    needs=(servers.module("distributed"),),
)
POOLS = (OURS, PROCESS_POOL, LOKY, RAY, DASK)
