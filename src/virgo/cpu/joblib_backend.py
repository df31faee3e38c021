"""The cloud's processors as a backend of joblib, and so of scikit-learn.

    from virgo.cpu.joblib_backend import register

    register(cloud.cpu)
    with joblib.parallel_config(backend="virgo"):
        joblib.Parallel()(joblib.delayed(work)(value) for value in values)

joblib is to be installed beside VIRGO, and on the nodes: what it sends is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from joblib.parallel import AutoBatchingMixin, ParallelBackendBase, register_parallel_backend

from virgo.cpu.client import CpuClient


def register(cpu: CpuClient, *, name: str = "virgo", default: bool = False) -> None:
    """Let joblib use these processors by that name.

    Args:
        cpu: `cloud.cpu`.
        name: of the backend.
        default: whether it is used where none is named.
    """
    register_parallel_backend(name, partial(VirgoBackend, cpu), make_default=default)


class VirgoBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs joblib's batches as calls.

    Args:
        cpu: the processors.
        options: of joblib's own.
    """

    supports_retrieve_callback = True
    default_n_jobs = -1

    def __init__(self, cpu: CpuClient, **options: Any) -> None:
        super().__init__(**options)
        self._cpu = cpu
        self._flying: set[Future[Any]] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """In a worker, whose own connection is not ours, calls of calls run one after another."""
        return self.get_nested_backend()[0].__class__, ()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Calls at once: as asked, or as many as the cloud runs."""
        if n_jobs == 0:
            raise ValueError("n_jobs is 0, which means nothing; -1 is all")
        workers = self._cpu.workers()
        if n_jobs is None:
            return workers
        return n_jobs if n_jobs > 0 else max(1, workers + 1 + n_jobs)

    def configure(self, n_jobs: int | None = -1, parallel: Any = None, **_options: Any) -> int:
        """Begin to work for `parallel`."""
        self.parallel = parallel
        return self.effective_n_jobs(n_jobs)

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], None] | None = None) -> Future[Any]:
        """Run a batch; the callback gets its future."""
        future = self._cpu.submit(func)
        self._flying.add(future)
        future.add_done_callback(self._flying.discard)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    apply_async = submit  # its name before joblib 1.5

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        """The results of a batch. Raises what a call raised."""
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """End the batches that are on their way."""
        for future in list(self._flying):
            future.cancel()
        if ensure_ready:
            self.configure(n_jobs=self.parallel.n_jobs, parallel=self.parallel)
