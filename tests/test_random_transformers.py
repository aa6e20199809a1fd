"""Random small transformers against the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from attackroute.tracing import oracle
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.influence import influence
from attackroute.tracing.trace import trace_routes
from random_transformers import transformers
from test_random_architectures import steady, thorough
from tracing import agree_up_to_ties, deviation

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def check(
    network: tuple[nn.Module, Tensor], *, linear: bool = True, influences: bool = False
) -> dict[tuple[str, str], str]:
    model, images = network
    labels = torch.tensor([0, 2])
    expected = oracle.trace(model, images, labels, width=0.4, linear=linear)
    found = trace_routes(model, (images, labels), 0.4, config=TraceConfig(linear=linear), keep_scores=True)
    agree_up_to_ties(found, expected)
    for edge in expected.edges if influences else ():
        assert deviation(influence(model, images, *edge, linear=linear), expected.influence[edge]) <= 1e-9, edge
    return dict(found.methods)


@given(transformers())
@settings(steady, max_examples=60)
def test_random_transformers_have_a_closed_form(network: tuple[nn.Module, Tensor]) -> None:
    assert set(check(network).values()) == {"closed-form"}


@given(transformers(supported=False))
@settings(steady, max_examples=40)
def test_parts_without_a_closed_form_leave_the_rest_exact(network: tuple[nn.Module, Tensor]) -> None:
    check(network, influences=True)
    check(network, linear=False)


@pytest.mark.slow
@given(transformers(supported=False))
@settings(thorough)
def test_many_random_transformers(network: tuple[nn.Module, Tensor]) -> None:
    check(network, influences=True)
