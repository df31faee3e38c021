"""The engine on NATS JetStream keeps the contract of `virgo.engine.base`."""

import pytest

from virgo.testing.engine_contract import CLAIMS


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_contract(claim, with_engines):
    """The claim in the function's docstring holds on one embedded server."""
    with_engines(claim)
