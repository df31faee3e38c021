"""A small cloud for calls; files that need another one have a `running` of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.conftest import RunningCloud, a_cloud

from virgo.cloud import Cloud


@pytest.fixture(scope="module")
def running() -> Iterator[RunningCloud]:
    """A node that runs two calls at once."""
    with a_cloud(environment={"VIRGO_CPU_WORKERS": "2"}) as started:
        yield started


@pytest.fixture
def cloud(running: RunningCloud) -> Iterator[Cloud]:
    """A client of its node."""
    with running.connect() as connected:
        yield connected


@pytest.fixture(params=[{}, {"priority": 1, "cpus": 2}], ids=["leased", "by node"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Of calls that a worker which the client leases runs, and of others that go through the node."""
    return dict(request.param)
