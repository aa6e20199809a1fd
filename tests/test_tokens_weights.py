"""Weakened kernels and the weight penalty on networks of attention and gates, against surgery and sums by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import attackroute as ar
from attackroute.core.errors import UserError
from attackroute.tracing.connections import Connections
from token_networks import GATED, TOKENS, Encoder, made
from tracing import state

PAIRS = {  # maps over tokens with nothing but an activation before them, and the maps before that
    "vit": {f"encoder.layers.encoder_layer_{i}.mlp.3": f"encoder.layers.encoder_layer_{i}.mlp.0" for i in (0, 1)},
    "swin": {f"features.1.{i}.mlp.3": f"features.1.{i}.mlp.0" for i in (0, 1)},
    "attentive": {"excite": "squeeze", "fc2": "fc1"},
    "encoder": {"encoder.layers.0.self_attn": "embed"}
    | {f"encoder.layers.{i}.linear2": f"encoder.layers.{i}.linear1" for i in (0, 1)},
    "convnext": {
        "features.1.0.block.5": "features.1.0.block.3",
        "features.3.0.block.0": "features.2.1",
        "features.3.0.block.5": "features.3.0.block.3",
    },
}


def weight_of(model: nn.Module, layer: str) -> Tensor:
    module = model.get_submodule(layer)
    return module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight


def slices(model: nn.Module, route: ar.Route, target: str, source: str) -> Tensor:
    """Entries of the target's weight between route neurons; a depthwise kernel has but its own channel."""
    weight = weight_of(model, target)
    on = torch.zeros(weight.shape[:2], dtype=torch.bool)
    for j in route.indices[target]:
        for i in route.indices[source]:
            if weight.shape[1] > 1:
                on[j, i] = True
            elif i == j:
                on[j, 0] = True
    return on


@pytest.mark.parametrize("name", PAIRS)
def test_weakening_is_surgery_on_the_kernels_that_join_neurons(name: str) -> None:
    model, x, y = made({**TOKENS, **GATED}[name])
    route = ar.rank_channels(model, (x, y), "gradient", 0.5, linear=True)
    pairs, before = PAIRS[name], state(model)
    assert Connections.find(model, x, linear=True).joined(route) == [layer for layer in route if layer in pairs]
    other = copy.deepcopy(model)
    with torch.no_grad():
        for target, source in pairs.items():
            on = slices(other, route, target, source)
            assert on.any() and not on.all()
            weight_of(other, target)[on] *= 0.3
        with ar.weaken(model, route, 0.3, list(pairs)):
            weakened = model(x)
            torch.testing.assert_close(weakened, other(x))
        assert not torch.allclose(weakened, model(x))
    assert state(model) == before


@pytest.mark.parametrize("name", [*TOKENS, "convnext"])
def test_a_slice_that_belongs_to_no_neuron_is_an_error_that_says_what_to_take(name: str) -> None:
    model, x, y = made({**TOKENS, **GATED}[name])
    route = ar.rank_channels(model, (x, y), "gradient", 0.5, linear=True)
    with (
        pytest.raises(UserError, match=r"no kernel slice of layer .* mixes channels") as error,
        ar.weaken(model, route, 0),
    ):
        model(x)
    message = str(error.value)
    assert "\n" not in message and f"take layers={[layer for layer in route if layer in PAIRS[name]]}" in message
    with pytest.raises(UserError, match="no kernel slice"):
        ar.WeightPenalty(model, route, x)


@pytest.mark.parametrize("name", PAIRS)
def test_the_weight_penalty_is_the_sum_over_the_slices(name: str) -> None:
    model, x, y = made({**TOKENS, **GATED}[name])
    route = ar.rank_channels(model, (x, y), "gradient", 0.5, linear=True)
    penalty = ar.WeightPenalty(model, route, x, layers=list(PAIRS[name]))
    expected = sum(
        float(weight_of(model, target)[slices(model, route, target, source)].abs().sum().detach())
        for target, source in PAIRS[name].items()
    )
    assert float(penalty().detach()) == pytest.approx(expected, rel=1e-12)


def test_a_rearranged_feature_is_found_and_a_mixed_one_is_not() -> None:
    class Rolled(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            return self.head(torch.tanh(tokens).roll(3, -1).flip(1)).mean(1)

    class Doubled(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            return self.head(tokens.relu() + tokens.neg().relu().roll(1, -1)).mean(1)

    model, x, _ = made(Rolled)
    found = Connections.find(model, x, linear=True).tokens["embed", "head"]
    assert found.tolist() == [3, 4, 5, 6, 7, 0, 1, 2]
    model, x, _ = made(Doubled)
    assert not Connections.find(model, x, linear=True).tokens
