"""The contract of executors: ours beside the standard library's, by the same claims."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from tests.conftest import RunningCloud, a_cloud

from virgo.testing.executor_contract import CLAIMS, Claim


@pytest.fixture(scope="module")
def two_workers() -> Iterator[RunningCloud]:
    """A node that runs two calls at once."""
    with a_cloud(environment={"VIRGO_CPU_WORKERS": "2"}) as running:
        yield running


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
@pytest.mark.parametrize("whose", ["ours", "threads"])
def test_contract(claim: Claim, whose: str, two_workers: RunningCloud) -> None:
    """Each claim holds for the cloud's processors as for ThreadPoolExecutor."""
    with ExitStack() as stack:

        def make() -> Executor:
            if whose == "threads":
                return ThreadPoolExecutor(2)
            return stack.enter_context(two_workers.connect()).cpu

        claim(make)
