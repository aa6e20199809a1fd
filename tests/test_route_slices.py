"""Kernel entries between route neurons, beside what autograd says each input channel carries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from architectures import CLOSED, Perceptron, Shuffled
from attackroute.errors import UserError
from attackroute.layers import LayerCall, LayerCalls, frozen
from attackroute.recorder import record_first
from attackroute.route_slices import route_slices
from attackroute.routes import Route
from tracing import ready


def carried_channels(model: nn.Module, images: Tensor, *, linear: bool) -> dict[str, dict[str, Tensor]]:
    """For each layer and each layer before it, bool (input channel, source channel): does a derivative join them?"""
    leaves: dict[str, Tensor] = {}
    found: dict[str, dict[str, Tensor]] = {}

    def visit(call: LayerCall) -> Tensor:
        channels = call.input.shape[1]
        joined = {name: torch.zeros(channels, leaf.shape[1], dtype=torch.bool) for name, leaf in leaves.items()}
        weights = torch.rand_like(call.input)  # so that derivatives do not cancel in the sum
        for channel in range(channels if call.input.requires_grad else 0):
            total = (call.input * weights)[:, channel].sum()
            for (name, leaf), gradient in zip(
                leaves.items(),
                torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True),
                strict=True,
            ):
                if gradient is not None:
                    joined[name][channel] = gradient.reshape(*leaf.shape[:2], -1).abs().sum((0, 2)) > 0
        found[call.name] = joined
        output = call.run().detach()
        scales = torch.logspace(-2, 1, len(images)).view(-1, *(1,) * (output.ndim - 1))
        leaves[call.name] = (torch.randn_like(output) * scales).requires_grad_()  # so that no channel is dead
        return leaves[call.name].clone()

    with torch.enable_grad(), LayerCalls(model, visit, linear=linear):
        model(images.clone())
    return found


def half_of(channels: dict[str, int]) -> Route:
    """About half of each layer's neurons, drawn."""
    source = torch.Generator().manual_seed(3)
    indices = {
        name: torch.randperm(count, generator=source)[: (count + 1) // 2].tolist() for name, count in channels.items()
    }
    return Route(indices, channels)


@pytest.mark.parametrize("name", [*CLOSED, "perceptron"])
def test_entries_join_route_neurons_and_nothing_else(name: str) -> None:
    build, linear = (Perceptron, True) if name == "perceptron" else (CLOSED[name], False)
    model, images, _ = ready(build, samples=32)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.data.abs_()  # a negative gain behind a ReLU could make a channel dead
    with frozen(model):
        layers = record_first(model, images, linear=linear).layers
        carried = carried_channels(model, images, linear=linear)
    route = half_of({layer.name: layer.channels for layer in layers})
    masks = route_slices(layers, route)
    for layer in layers:
        per_group = layer.weight[0].numel() // (layer.weight.shape[2] * layer.weight.shape[3])
        inputs = layer.weight.shape[2] if layer.kind == "linear" else 1
        expected = torch.zeros(layer.channels, per_group * inputs, dtype=torch.bool)
        for m in route[layer.name].tolist():
            group = m // (layer.channels // layer.groups)
            for c in range(per_group * inputs):
                for source, joined in carried[layer.name].items():
                    expected[m, c] |= joined[group * per_group + c, route[source]].any()
        found = masks.get(layer.name, torch.zeros(1, dtype=torch.bool))
        assert torch.equal(found.flatten(1) if found.ndim > 1 else found.expand_as(expected), expected), layer.name


def test_layers_off_the_route_take_no_part() -> None:
    model, images, _ = ready(CLOSED["chain"])
    with frozen(model):
        layers = record_first(model, images, linear=False).layers
    whole = half_of({layer.name: layer.channels for layer in layers})
    first, second, third, fourth = whole.layers
    assert list(route_slices(layers, whole)) == [second, third, fourth]
    assert list(route_slices(layers, whole.restrict([first, second, fourth]))) == [second]
    assert route_slices(layers, whole.restrict([first, third])) == {}


def test_layers_between_which_channels_mix_are_refused_by_name() -> None:
    model, images, _ = ready(Shuffled)
    with frozen(model):
        layers = record_first(model, images, linear=False).layers
    route = half_of({layer.name: layer.channels for layer in layers})
    with pytest.raises(UserError, match=r"'conv2'.*'conv1'"):
        route_slices(layers, route)
    with pytest.raises(UserError, match=r"layer 'conv1'.*in the model"):
        route_slices(layers, Route({"conv1": [0]}, {"conv1": 9}))
