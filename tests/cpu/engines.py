"""Who can run calls, for tests: a Dask cluster, a Ray cluster; two calls at once each."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.waiting import until

_UP_S = 30.0
Cluster = tuple[str, subprocess.Popen[bytes]]  # its address, and who leads its processes


def settings(engine: str, address: str) -> dict[str, str]:
    """The environment in which `virgo.connect()` has calls run there."""
    return {"VIRGO_CPU_BACKEND": engine, "VIRGO_CPU_BACKEND_ADDRESS": address}


_DASK = """
import distributed, sys
if __name__ == "__main__":
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", host="127.0.0.1",
        silence_logs=50, resources={"CPU": 2},
    ) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


@contextmanager
def dask_cluster() -> Iterator[Cluster]:
    """A Dask cluster of two processes that run a call each."""
    with tempfile.TemporaryDirectory(prefix="virgo-") as directory:
        program = Path(directory) / "cluster.py"
        program.write_text(_DASK)
        process = subprocess.Popen(
            [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, cwd=directory, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            yield process.stdout.readline().decode().strip(), process
        finally:
            process.stdin.close()
            _end(process)
            process.stdout.close()


def ray_environment() -> dict[str, str]:
    """What a Ray cluster, and who connects to it, must have: a secret of their own."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


@contextmanager
def ray_cluster(environment: dict[str, str]) -> Iterator[Cluster]:
    """A Ray cluster for two calls at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="vr-", ignore_cleanup_errors=True) as directory:
        log = Path(directory) / "out"
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
        command += [f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--disable-usage-stats"]
        command += ["--include-dashboard=false", "--object-store-memory=80000000", f"--temp-dir={directory}"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, **environment},
                start_new_session=True,
            )  # fmt: skip
        try:
            until(lambda: b"Ray runtime started" in log.read_bytes(), within_s=_UP_S, what="Ray")
            yield f"127.0.0.1:{port}", process
        finally:
            process.terminate()
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a cluster that was told to, but not for calls that it may be at."""
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
