"""Random networks against the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from attackroute.core.errors import UserError
from attackroute.tracing import oracle
from attackroute.tracing.influence import influence
from attackroute.tracing.trace import trace_routes
from random_networks import networks, segments
from tracing import agree_up_to_ties, deviation

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
steady = settings(deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS)
thorough = settings(deadline=None, max_examples=1000, database=None, suppress_health_check=CHECKS)


def check_against_oracle(network: tuple[nn.Module, Tensor]) -> None:
    model, images = network
    labels = torch.tensor([0, 2])
    expected = oracle.trace(model, images, labels, width=0.4)
    try:
        found = trace_routes(model, (images, labels), 0.4, keep_scores=True)
    except UserError as error:  # the network is dead
        sinks = set(expected.layers) - {source for source, _ in expected.edges}
        assert "nothing is left" in str(error) and all(expected.scores[sink].abs().max() < 1e-12 for sink in sinks)
        return
    agree_up_to_ties(found, expected)
    for edge in expected.edges:
        assert deviation(influence(model, images, *edge), expected.influence[edge]) <= 1e-9, edge


@given(networks())
@settings(steady, max_examples=60)
def test_random_networks(network: tuple[nn.Module, Tensor]) -> None:
    check_against_oracle(network)


@given(segments())
@settings(steady, max_examples=400)
def test_random_segments(network: tuple[nn.Module, Tensor]) -> None:
    check_against_oracle(network)


@pytest.mark.slow
@given(networks())
@settings(thorough)
def test_many_random_networks(network: tuple[nn.Module, Tensor]) -> None:
    check_against_oracle(network)


@pytest.mark.slow
@given(segments())
@settings(thorough)
def test_many_random_segments(network: tuple[nn.Module, Tensor]) -> None:
    check_against_oracle(network)
