"""Penalties and weakened kernels on tokens, gates and attention, against sums by hand, differences and surgery."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attackroute as ar
from attackroute.core.errors import UserError
from attackroute.tracing.connections import Connections
from token_networks import GATED, TOKENS, Encoder, made, readings
from tracing import state

ALL = {**TOKENS, **GATED}


def ranked(name: str, width: float = 0.5) -> tuple[nn.Module, Tensor, Tensor, ar.Route]:
    model, x, y = made(ALL[name])
    return model, x, y, ar.rank_channels(model, (x, y), "gradient", width, linear=True)


def by_hand(model: nn.Module, route: ar.Route, x: Tensor, y: Tensor) -> float:
    """Eq. (10), one image at a time."""
    total = 0.0
    for image, label in zip(x, y, strict=True):
        for layer, (_, slope) in zip(route, readings(model, image, label), strict=True):
            total += float(slope[:, route[layer]].abs().sum())
    return total / len(x)


@pytest.mark.parametrize("name", ALL)
def test_gradient_penalty_is_the_mean_over_images_and_its_gradient_is_that_of_differences(name: str) -> None:
    model, x, y, route = ranked(name, 0.4)
    before = state(model)
    penalty = ar.GradientPenalty(model, route)
    with penalty.watch():
        logits = model(x)
    torch.testing.assert_close(logits, model(x))
    value = penalty(logits, y)
    assert float(value.detach()) == pytest.approx(by_hand(model, route, x, y), rel=1e-9)
    parameters = list(model.parameters())
    slopes = torch.autograd.grad(value, parameters, materialize_grads=True)
    torch.manual_seed(1)
    way = [torch.randn_like(parameter) for parameter in parameters]
    expected = sum(float((slope * step).sum()) for slope, step in zip(slopes, way, strict=True))
    sizes, values = [], [parameter.data for parameter in parameters]
    for alpha in (1e-7, -1e-7):
        torch._foreach_add_(values, way, alpha=alpha)
        sizes.append(by_hand(model, route, x, y))
        torch._foreach_sub_(values, way, alpha=alpha)
    assert (sizes[0] - sizes[1]) / 2e-7 == pytest.approx(expected, rel=1e-4)
    assert state(model) == before


def test_attention_keeps_its_fused_kernels_afterwards() -> None:
    model, x, _, route = ranked("attentive", 0.4)
    enabled = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    penalty = ar.GradientPenalty(model, route)
    with pytest.raises(ZeroDivisionError), penalty.watch():
        model(x)
        raise ZeroDivisionError
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == enabled
    with pytest.raises(RuntimeError, match="not implemented"):  # what the penalty must avoid
        q = torch.rand(1, 1, 4, 4, requires_grad=True)
        (slope,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).sum(), q, create_graph=True)
        slope.sum().backward()


# The weights that join neurons

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
    on = route.mask(target)[:, None] & route.mask(source)
    return on if weight_of(model, target).shape[1] > 1 else on.diagonal()[:, None]


@pytest.mark.parametrize("name", PAIRS)
def test_weakening_is_surgery_on_the_kernels_that_join_neurons(name: str) -> None:
    model, x, _, route = ranked(name)
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
    model, x, _, route = ranked(name)
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
    model, x, _, route = ranked(name)
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
