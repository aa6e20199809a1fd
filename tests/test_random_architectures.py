"""Random networks against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from attackroute.core.errors import UserError
from attackroute.tracing import oracle
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.influence import influence
from attackroute.tracing.trace import trace_routes
from random_networks import networks, segments, steady, thorough
from random_transformers import transformers
from tracing import agree_up_to_ties, deviation

Network = tuple[nn.Module, Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def check(network: Network, *, linear: bool = False, influences: bool = True) -> set[str]:
    """Trace as the oracle does, with the influence along an edge of each kind; gives how the edges were computed."""
    model, images = network
    labels = torch.tensor([0, 2])
    expected = oracle.trace(model, images, labels, width=0.4, linear=linear)
    try:
        found = trace_routes(model, (images, labels), 0.4, config=TraceConfig(linear=linear), keep_scores=True)
    except UserError as error:  # the network is dead
        sinks = set(expected.layers) - {source for source, _ in expected.edges}
        assert "nothing is left" in str(error) and all(expected.scores[sink].abs().max() < 1e-12 for sink in sinks)
        return set()
    agree_up_to_ties(found, expected)
    for edge in {how: edge for edge, how in found.methods.items()}.values() if influences else ():
        assert deviation(influence(model, images, *edge, linear=linear), expected.influence[edge]) <= 1e-9, edge
    return set(found.methods.values())


def check_closed_form(network: Network) -> None:
    assert check(network, linear=True, influences=False) == {"closed-form"}


def check_with_and_without_linear_maps(network: Network) -> None:
    check(network, linear=True)
    check(network, influences=False)


PARTLY = transformers(supported=False)
"""Transformers with a part that has no closed form."""


@pytest.mark.parametrize(
    ("drawn", "how", "checked"),
    [
        pytest.param(networks(), settings(steady, max_examples=40), check, id="networks"),
        pytest.param(segments(), settings(steady, max_examples=110), check, id="segments"),
        pytest.param(transformers(), settings(steady, max_examples=30), check_closed_form, id="transformers"),
        pytest.param(PARTLY, settings(steady, max_examples=12), check_with_and_without_linear_maps, id="partly closed"),
        pytest.param(networks(), thorough, check, id="many networks", marks=pytest.mark.slow),
        pytest.param(segments(), thorough, check, id="many segments", marks=pytest.mark.slow),
        pytest.param(
            PARTLY, thorough, check_with_and_without_linear_maps, id="many transformers", marks=pytest.mark.slow
        ),
    ],
)
def test_random_networks(drawn: SearchStrategy[Network], how: settings, checked: Callable[[Network], object]) -> None:
    def holds(network: Network) -> None:
        checked(network)

    how(given(drawn)(holds))()
