"""Kernel slices between route neurons, beside what autograd says each input channel carries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from architectures import CLOSED, Perceptron
from attackroute.core.layers import LayerCall, LayerCalls
from attackroute.core.model_state import frozen
from attackroute.routes.route import Route
from attackroute.tracing.connections import Connections
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
    layers = Connections.find(model, images, linear=linear).layers
    with frozen(model):
        carried = carried_channels(model, images, linear=linear)
    route = half_of({layer.name: layer.channels for layer in layers})
    connections = Connections(layers)
    for layer in layers:
        per_group = layer.weight[0].numel() // (layer.weight.shape[2] * layer.weight.shape[3])
        inputs = layer.weight.shape[2] if layer.kind == "linear" else 1
        expected = torch.zeros(layer.channels, per_group * inputs, dtype=torch.bool)
        for m in route[layer.name].tolist():
            group = m // (layer.channels // layer.groups)
            for c in range(per_group * inputs):
                for source, joined in carried[layer.name].items():
                    expected[m, c] |= joined[group * per_group + c, route[source]].any()
        assert torch.equal(connections.between(route, layer.name), expected), layer.name
