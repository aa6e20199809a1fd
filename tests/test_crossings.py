"""Edges through normalisation and attention, as networks spell them: closed form where that is known, always exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attackroute as ar
from architectures import Function
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.trace import trace_routes
from token_networks import TOKENS, made
from tracing import check, same_routes, worst

Between = Callable[[nn.ModuleDict, Tensor], Tensor]


def network(between: Between, width: int = 6, **parts: nn.Module) -> Callable[[], nn.Module]:
    """A patch embedding, two linear maps with something between them, and a head on the mean token."""

    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = parts["a"](parts["embed"](x).flatten(2).transpose(1, 2))
        return parts["head"](F.gelu(parts["b"](between(parts, x))).mean(1))

    embed, head = nn.Conv2d(3, 4, 4, 4), nn.Linear(5, 5)
    return lambda: Function(forward, embed=embed, a=nn.Linear(4, 6), b=nn.Linear(width, 5), head=head, **parts)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int = 2) -> Tensor:
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)


def rotated(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1]).to(x).view(-1, 1)
    left, right = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()


def in_place(x: Tensor) -> Tensor:
    y = F.layer_norm(x, (6,))
    y.mul_(torch.linspace(-1, 1, 6).to(x))
    return y


def attended_in_heads(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    q, k, v = parts["qkv"](F.gelu(x)).chunk(3, -1)
    return attend(q, k, v)


QKV: dict[str, nn.Module] = {name: nn.Linear(6, 6) for name in "qkv"}


def projected(parts: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return parts["q"](x), parts["k"](F.silu(x)), parts["v"](x)


def token_of(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    q = parts["q"](parts["query"].weight.expand(len(x), -1, -1) + 0 * x[:, :1])
    return attend(q, parts["k"](x), parts["v"](x))


CLOSED: dict[str, Callable[[], nn.Module]] = {
    "layer norm": network(lambda p, x: F.layer_norm(x, (6,))),
    "RMS norm by hand": network(lambda p, x: x * (x.pow(2).mean(-1, keepdim=True) + 0.1).rsqrt() * p["g"].weight[0],
                                g=nn.Linear(6, 1)),
    "LayerScale, shift and sign behind layer norm": network(
        lambda p, x: 2 - p["g"].weight[0] * F.layer_norm(x, (6,)) / 3, g=nn.Linear(6, 1)
    ),
    "twice the layer norm": network(lambda p, x: (y := F.layer_norm(x, (6,))) + y),
    "layer norm of some tokens, rolled": network(lambda p, x: F.layer_norm(x, (6,))[:, 1:].roll(2, 1)),
    "layer norm of layer norm": network(lambda p, x: F.layer_norm(F.layer_norm(x, (6,)) + 1, (6,))),
    "neighbours side by side, each normalised": network(
        lambda p, x: F.rms_norm(torch.cat([(y := F.layer_norm(x[:, 1:], (6,)))[:, ::2], y[:, 1::2]], 2), (12,)), 12
    ),
    "mean of normalised tokens": network(lambda p, x: F.layer_norm(x, (6,)).mean(1, keepdim=True)),
    "fused projections": network(attended_in_heads, qkv=nn.Linear(6, 18)),
    "separate projections": network(lambda p, x: attend(*projected(p, x)), **QKV),
    "fused attention": network(lambda p, x: F.scaled_dot_product_attention(*projected(p, x), scale=0.9), **QKV),
    "causal attention": network(lambda p, x: F.scaled_dot_product_attention(*projected(p, x), is_causal=True), **QKV),
    "attention read in part": network(lambda p, x: attend(*projected(p, x))[:, 1:3], **QKV),
    "cross attention": network(
        lambda p, x: attend(p["q"](x[:, :3]), p["k"](F.gelu(x[:, 3:])), p["v"](x[:, 3:])), **QKV
    ),
    "normalised queries and keys": network(
        lambda p, x: attend(F.layer_norm(p["q"](x), (6,)), F.rms_norm(p["k"](x), (6,)), p["v"](x)), **QKV
    ),
    "rotated queries and keys": network(lambda p, x: attend(rotated(p["q"](x)), rotated(p["k"](x)), p["v"](x)), **QKV),
    "keys and values shared by heads": network(
        lambda p, x: attend(p["q"](x), p["k"](x)[..., :3].repeat(1, 1, 2), p["v"](x)[..., :3].repeat(1, 1, 2)), **QKV
    ),
    "a learned query": network(token_of, query=nn.Linear(6, 1), **QKV),
}  # fmt: skip
"""What must have a closed form between ``a`` (or the projections) and the next linear map."""

OPEN: dict[str, Callable[[], nn.Module]] = {
    "queries that are keys": network(lambda p, x: attend(q := p["q"](x), q, p["v"](x)), **QKV),
    "attention to itself": network(lambda p, x: attend(x, x, x)),
    "softmax over queries": network(
        lambda p, x: (p["q"](x) @ p["k"](x).mT).softmax(-2) @ p["v"](x), **QKV
    ),
    "attention averaged": network(lambda p, x: attend(*projected(p, x)).mean(1, keepdim=True), **QKV),
    "gated attention": network(lambda p, x: attend(*projected(p, x)) * x.sigmoid(), **QKV),
    "weighed logits": network(
        lambda p, x: (p["q"](x) @ p["k"](x).mT * torch.arange(1.0, 10).to(x)).softmax(-1) @ p["v"](x), **QKV
    ),
    "logits read twice": network(
        lambda p, x: ((s := p["q"](x) @ p["k"](x).mT).softmax(-1) @ p["v"](x)) + s.mean((1, 2), keepdim=True), **QKV
    ),
    "layer norm and its input": network(lambda p, x: F.layer_norm(x, (6,)) + x),
    "layer norm squared": network(lambda p, x: (y := F.layer_norm(x, (6,))) * y),
    "layer norm, then an activation": network(lambda p, x: F.relu(F.layer_norm(x, (6,)))),
    "layer norm, channels turned": network(lambda p, x: F.layer_norm(x, (6,)).flip(2)),
    "layer norm, tokens and channels exchanged": network(lambda p, x: F.layer_norm(x, (6,)).mT, 9),
    "layer norm changed in place": network(lambda p, x: in_place(x)),
    "two layer norms": network(lambda p, x: F.layer_norm(x, (6,)) + F.layer_norm(x.exp(), (6,))),
    "layer norm over tokens and channels": network(lambda p, x: F.layer_norm(x, (9, 6))),
    "a factor for each token": network(
        lambda p, x: F.layer_norm(x, (6,)) * torch.arange(1.0, 10).to(x).view(-1, 1)
    ),
}  # fmt: skip
"""What has no closed form there, or none that is known, and must be exact all the same."""


@pytest.mark.parametrize("name", CLOSED)
def test_parts_with_a_closed_form(name: str) -> None:
    found = check(*made(CLOSED[name], samples=2, size=12), linear=True, influences=True)
    assert set(found.methods.values()) == {"closed-form"}


@pytest.mark.parametrize("name", OPEN)
def test_parts_without_one_leave_the_rest(name: str) -> None:
    found = check(*made(OPEN[name], samples=2, size=12), linear=True)
    methods = {method for (_, target), method in found.methods.items() if target == "parts.b"}
    assert "autograd" in methods
    assert found.methods["parts.embed", "parts.a"] == found.methods["parts.b", "parts.head"] == "closed-form"


@pytest.mark.parametrize("name", TOKENS)
def test_batches_and_order_change_nothing(name: str) -> None:
    model, images, labels = made(TOKENS[name])

    def traced(order: list[int], size: int) -> InstanceRoutes:
        data = images[order], labels[order]
        return trace_routes(model, data, 0.3, config=TraceConfig(linear=True), batch_size=size, keep_scores=True)

    together, apart = traced([0, 1, 2], 3), traced([2, 0, 1], 1).select(torch.tensor([1, 2, 0]))
    assert same_routes(apart, together)
    assert worst(apart, together) < 1e-12


@pytest.mark.parametrize("name", TOKENS)
def test_less_precision_is_near(name: str) -> None:
    model, images, labels = made(TOKENS[name])
    config = TraceConfig(linear=True)
    exact = trace_routes(model, (images, labels), 1.0, config=config, keep_scores=True)
    model, images = model.float(), images.float()
    assert worst(trace_routes(model, (images, labels), 1.0, config=config, keep_scores=True), exact) < 1e-4
    for dtype, most in ((torch.bfloat16, 0.3), (torch.float16, 0.05)):
        short = trace_routes(model, (images, labels), 1.0, config=config, keep_scores=True, autocast=dtype)
        assert worst(short, exact) < most


def test_sketches_are_for_what_has_no_closed_form() -> None:
    model, images, labels = made(TOKENS["vit"])
    found = trace_routes(model, (images, labels), config=ar.TraceConfig(linear=True, sketches=32))
    assert found == trace_routes(model, (images, labels), config=ar.TraceConfig(linear=True))
    assert "approximate" not in found.provenance.criterion
