"""Peers that run workers: a Ray session and a Dask cluster, bounded to two processors."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks.servers import WORKERS

_OBJECT_STORE_BYTES = 1024**3


@contextlib.contextmanager
def ray_session(object_store_bytes: int = _OBJECT_STORE_BYTES) -> Iterator[Any]:
    """Ray on two processors, no dashboard, nothing reported anywhere; an object store of 1 GiB by default."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        ray.init(
            num_cpus=WORKERS,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=object_store_bytes,
            _temp_dir=directory,
        )
        try:
            yield ray
        finally:
            ray.shutdown()


@contextlib.contextmanager
def ray_driver(address: str) -> Iterator[Any]:
    """Another program of a Ray session that runs."""
    import ray

    ray.init(address=address, log_to_driver=False)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def dask_client() -> Iterator[Any]:
    """A client of a Dask scheduler in this process with two worker processes of one thread."""
    import distributed

    with (
        tempfile.TemporaryDirectory(prefix="dask-") as directory,
        distributed.LocalCluster(
            n_workers=WORKERS,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            scheduler_port=0,
            local_directory=directory,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client
