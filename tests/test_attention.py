"""Networks whose linear maps run inside attention, or on windows: layers in sight, one row per sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as zoo
from torch import Tensor, nn

import attackroute as ar
from architectures import Function
from attackroute.core.errors import UserError
from attackroute.core.layers import LayerCall, LayerCalls
from attackroute.hardening.gradient_penalty import GradientPenalty
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.trace import trace_routes
from tracing import check, ready, state


def vit() -> nn.Module:
    return zoo.VisionTransformer(8, 4, 2, 2, 8, 12, num_classes=5)


def swin() -> nn.Module:
    return zoo.SwinTransformer([2, 2], 4, [2, 2], [1, 2], [2, 2], num_classes=5)


class Crossed(nn.Module):
    """Cross attention, positions first: queries from one map, keys and values from another."""

    def __init__(self, *, batch_first: bool = False) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 4, stride=4), nn.Conv2d(3, 6, 3, stride=3)
        self.attention = nn.MultiheadAttention(4, 2, kdim=6, vdim=6, batch_first=batch_first)
        self.batch_first = batch_first
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        order = (0, 2, 1) if self.batch_first else (2, 0, 1)
        left, right = (layer(x).flatten(2).permute(order) for layer in (self.left, self.right))
        return self.head(self.attention(left, right, right)[0].mean(1 if self.batch_first else 0))


def encoder() -> nn.Module:
    """PyTorch's own encoder, which in eval mode would run as one fused kernel."""

    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        return parts["head"](parts["encoder"](parts["embed"](x).flatten(2).transpose(1, 2)).mean(1))

    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    return Function(
        forward,
        embed=nn.Conv2d(3, 4, 4, stride=4),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        head=nn.Linear(4, 5),
    )


def folded(*, together: bool) -> nn.Module:
    """A linear map on rows of which each image has several, one after another or not."""

    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = parts["embed"](x).flatten(2)  # (n, C, T)
        samples, channels, positions = x.shape
        rows = (x.permute(0, 2, 1) if together else x.permute(2, 0, 1)).reshape(-1, channels)
        rows = F.gelu(parts["fc"](F.layer_norm(rows, (channels,))))
        rows = rows.view(*((samples, positions) if together else (positions, samples)), -1)
        return parts["head"](rows.mean(1 if together else 0))

    return Function(forward, embed=nn.Conv2d(3, 4, 4, stride=4), fc=nn.Linear(4, 6), head=nn.Linear(6, 5))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (vit, 8),
    "swin": (swin, 8),
    "cross attention": (Crossed, 8),
    "cross attention, batch first": (lambda: Crossed(batch_first=True), 8),
    "encoder": (encoder, 8),
    "folded rows": (lambda: folded(together=True), 8),
}


def livened(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Parameters at random, since new attention layers have projections without bias and heads of zeros."""

    def built() -> nn.Module:
        model = build()
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0, 0.4)
        return model

    return built


@pytest.mark.parametrize("name", NETWORKS)
def test_traces_are_the_oracle(name: str) -> None:
    build, size = NETWORKS[name]
    model, images, labels = ready(livened(build), samples=2, size=size)
    plain = model(images)
    before = state(model)
    check(model, images, labels, linear=True, influences=name in ("vit", "folded rows"))
    assert state(model) == before
    torch.testing.assert_close(model(images), plain)


def test_layers_inside_attention_are_named() -> None:
    model, images, _ = ready(livened(vit), samples=2, size=8)
    found = trace_routes(model, images, config=TraceConfig(linear=True, sketches=32))
    block = "encoder.layers.encoder_layer_0."
    names = [f"{block}self_attention", f"{block}self_attention#2", f"{block}mlp.0", f"{block}mlp.3"]
    assert list(found.layers)[1:5] == names
    assert [found.channels[name] for name in names] == [24, 8, 12, 8]
    windows, images, _ = ready(livened(swin), samples=2, size=8)
    found = trace_routes(windows, images, config=TraceConfig(linear=True, sketches=32))
    assert {"features.1.0.attn", "features.1.0.attn#2", "features.1.0.mlp.0", "features.1.0.mlp.3"} < set(found.layers)


@pytest.mark.parametrize("name", NETWORKS)
def test_looking_on_changes_no_output(name: str) -> None:
    build, size = NETWORKS[name]
    model, images, _ = ready(livened(build), samples=3, size=size)
    shapes = {}

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        shapes[call.name] = output.shape
        return output

    with torch.no_grad():
        plain = model(images)
        with LayerCalls(model, visit, linear=True):
            watched = model(images)
    torch.testing.assert_close(watched, plain)
    assert all(shape[0] == 3 for shape in shapes.values())


def test_positions_first_are_refused_even_where_there_are_as_many_as_images() -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = parts["fc"](F.layer_norm(parts["embed"](x).flatten(2).permute(2, 0, 1), (4,)))  # (T, n, C)
        return parts["head"](x.mean(0))

    def build() -> nn.Module:
        return Function(forward, embed=nn.Conv2d(3, 4, (8, 4), stride=4), fc=nn.Linear(4, 6), head=nn.Linear(6, 5))

    model, images, labels = ready(build, samples=2, size=8)
    with pytest.raises(UserError, match="batch_first=True"):
        trace_routes(model, (images, labels), config=TraceConfig(linear=True))


def test_rows_that_are_not_together_are_refused() -> None:
    model, images, labels = ready(lambda: folded(together=False), samples=2, size=8)
    with pytest.raises(UserError, match="batch_first=True"):
        trace_routes(model, (images, labels), config=TraceConfig(linear=True))
    with pytest.raises(UserError, match="batch_first=True"):
        trace_routes(model, images[:1], config=TraceConfig(linear=True))


# Interventions, tokens included

BLOCK = "encoder.layers.encoder_layer_1."


@pytest.fixture(scope="module")
def traced() -> tuple[nn.Module, Tensor, ar.Route]:
    model, images, labels = ready(livened(vit), samples=3, size=8)
    return (
        model,
        images,
        trace_routes(model, (images, labels), 0.3, config=TraceConfig(linear=True, sketches=64)).aggregate(0.3),
    )


def outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Every layer's output as an outer observer sees it."""
    seen: dict[str, Tensor] = {}

    def visit(call: LayerCall) -> Tensor:
        seen[call.name] = call.run().clone()
        return seen[call.name]

    with torch.no_grad(), LayerCalls(model, visit, linear=True):
        model(images)
    return seen


@pytest.mark.parametrize("layer", [f"{BLOCK}self_attention", f"{BLOCK}self_attention#2", f"{BLOCK}mlp.0", "conv_proj"])
def test_transplants_reach_every_token(traced: tuple[nn.Module, Tensor, ar.Route], layer: str) -> None:
    model, images, route = traced
    other = images.flip(0)
    everything = ar.Route({layer: range(route.channels[layer])}, {layer: route.channels[layer]})
    with torch.no_grad():
        clean, noisy = model(images), model(other)
        with ar.transplant(model, clean=images, route=everything, layers=[layer]):
            mixed = model(other)
        with ar.transplant(model, clean=other, route=everything, layers=[layer]):
            same = model(other)
    torch.testing.assert_close(same, noisy)
    assert not torch.allclose(mixed, noisy)
    if layer == "conv_proj":  # all that the network knows of its images passes here
        torch.testing.assert_close(mixed, clean)


def test_zeros_reach_every_token(traced: tuple[nn.Module, Tensor, ar.Route]) -> None:
    model, images, route = traced
    layer = f"{BLOCK}mlp.0"
    plain = outputs(model, images)
    with ar.deactivate(model, route, layers=[layer]):
        seen = outputs(model, images)
    mask = route.mask(layer)
    assert (seen[layer][..., mask] == 0).all()
    assert torch.equal(seen[layer][..., ~mask], plain[layer][..., ~mask])
    # behind the GELU, silence is the same as no column of the next weight
    with torch.no_grad():
        with ar.deactivate(model, route, layers=[layer], at="activation"):
            found = model(images)
        following = model.get_submodule(f"{BLOCK}mlp.3").weight
        kept = following.clone()
        following[:, mask] = 0
        expected = model(images)
        following.copy_(kept)
    torch.testing.assert_close(found, expected)


def test_projections_inside_attention_can_be_silenced(traced: tuple[nn.Module, Tensor, ar.Route]) -> None:
    model, images, route = traced
    layer = f"{BLOCK}self_attention"
    attention = model.get_submodule(layer)
    mask = route.mask(layer)
    with torch.no_grad():
        with ar.deactivate(model, route, layers=[layer]):
            found = model(images)
        kept = attention.in_proj_weight.clone(), attention.in_proj_bias.clone()
        attention.in_proj_weight[mask] = 0
        attention.in_proj_bias[mask] = 0
        expected = model(images)
        attention.in_proj_weight.copy_(kept[0])
        attention.in_proj_bias.copy_(kept[1])
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, model(images))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_gradients_of_tokens_add_up(name: str) -> None:
    build, size = NETWORKS[name]
    model, images, labels = ready(livened(build), samples=3, size=size)
    found = ar.loss_gradient(model, (images, labels), linear=True)
    held: dict[str, Tensor] = {}

    def visit(call: LayerCall) -> Tensor:
        held[call.name] = call.run().detach().requires_grad_()
        return held[call.name].clone()

    for layer in found:  # one leaf at a time, so that the derivative is of the whole rest

        def one(call: LayerCall, layer: str = layer) -> Tensor:
            return visit(call) if call.name == layer else call.run()

        with LayerCalls(model, one, linear=True):
            loss = F.cross_entropy(model(images), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, held[layer])
        sized = gradient.abs() if layer in ("conv_proj", "features.0.0") else gradient.abs().movedim(-1, 1)
        torch.testing.assert_close(
            found[layer].to(sized), sized.flatten(2).sum(2).mean(0) if sized.ndim > 2 else sized.mean(0)
        )


def test_gradient_penalties_reach_tokens(traced: tuple[nn.Module, Tensor, ar.Route]) -> None:
    model, images, route = traced
    layer = f"{BLOCK}mlp.0"
    labels = torch.tensor([0, 1, 2])
    penalty = GradientPenalty(model, route.restrict([layer]))
    with penalty.watch():
        logits = model(images)
    value = penalty(logits, labels)
    held: list[Tensor] = []

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        if call.name == layer:
            held.append(output)
        return output

    with LayerCalls(model, visit, linear=True):
        loss = F.cross_entropy(model(images), labels)
    (gradient,) = torch.autograd.grad(loss, held)
    torch.testing.assert_close(value.detach(), gradient[..., route.mask(layer)].abs().sum())
    assert torch.autograd.grad(value, model.get_submodule(layer).weight)[0].abs().sum() > 0


def test_hardness_ranks_samples_of_transformers(traced: tuple[nn.Module, Tensor, ar.Route]) -> None:
    model, images, route = traced
    labels = torch.tensor([0, 1, 2])
    together = ar.hardness(model, route, (images, labels))
    order = torch.tensor([2, 0, 1])
    assert torch.equal(ar.hardness(model, route, (images[order], labels[order])).votes, together.votes[order])
