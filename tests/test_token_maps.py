"""Edges through rotated, normalised and shared queries, keys and values: closed form, and the oracle's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.tracing.attention import Heads, pulled_sums
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.trace import trace_routes
from test_crossings import network
from token_networks import made
from tracing import check, worst

Map = Callable[[Tensor], Tensor]
WIDTH, HEADS = 4, 2  # features of a head


def angles(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines for each token, (T, count)."""
    turns = (torch.arange(x.shape[-2]).to(x) + 1).view(-1, 1) * torch.linspace(0.3, 2, count).to(x)
    return turns.cos(), turns.sin()


def half(x: Tensor) -> Tensor:
    cos, sin = (torch.cat([each, each], -1) for each in angles(x, x.shape[-1] // 2))
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def interleaved(x: Tensor) -> Tensor:
    cos, sin = (each.repeat_interleave(2, -1) for each in angles(x, x.shape[-1] // 2))
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape) * sin


def pairs(x: Tensor) -> Tensor:
    cos, sin = angles(x, x.shape[-1] // 2)
    left, right = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([left * cos - right * sin, left * sin + right * cos], -1).flatten(-2)


def by_complex(x: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous()) * torch.complex(*angles(x, 2))
    return torch.view_as_real(turned).flatten(-2)


def normalised(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) * (torch.arange(x.shape[1]).to(x) + 1).view(-1, 1, 1)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], torch.linspace(0.5, 2, x.shape[-1]).to(x), eps=0.1)


MAPS: dict[str, Map] = {
    "halves": half,
    "interleaved": interleaved,
    "pairs": pairs,
    "complex numbers": by_complex,
    "halves, not of the first token": lambda x: torch.cat([x[:, :, :1], half(x[:, :, 1:])], 2),
    "pairs, not of all features": lambda x: torch.cat([pairs(x[..., :2]), x[..., 2:]], -1),
    "normalised": normalised,
    "layer norm": layer_norm,
    "RMS norm": lambda x: F.rms_norm(x, x.shape[-1:], torch.linspace(0.5, 2, x.shape[-1]).to(x)),
    "standardised": lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True),
    "layer norm, then halves": lambda x: half(layer_norm(x)),
    "complex numbers, then normalised": lambda x: normalised(by_complex(x)),
    "softplus of halves": lambda x: F.softplus(half(F.silu(x))),
}
"""Of each token and head by itself, ``(n, heads, T, features)``."""


def written_over(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 1:] = half(x[:, :, 1:])
    return x


def heads_of(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined((q @ k.transpose(-2, -1) * 0.7).softmax(-1) @ v)


def fused(turn: Map) -> Callable[[], nn.Module]:
    """Both queries and keys mapped, from one projection."""

    def between(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        q, k, v = parts["qkv"](x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        return joined(F.scaled_dot_product_attention(turn(q), turn(k), v))

    return network(between, HEADS * WIDTH, qkv=nn.Linear(6, 3 * HEADS * WIDTH))


def chunked(turn: Map) -> Callable[[], nn.Module]:
    """The keys alone mapped, from one projection cut otherwise, for windows of three tokens."""

    def between(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        windows = x.reshape(-1, 3, x.shape[-1])
        q, k, v = (heads_of(each) for each in parts["qkv"](windows).chunk(3, -1))
        return attend(q, turn(k), v).reshape(len(x), -1, HEADS * WIDTH)

    return network(between, HEADS * WIDTH, qkv=nn.Linear(6, 3 * HEADS * WIDTH))


def three(between: Callable[[Tensor, Tensor, Tensor], Tensor], shared: int = HEADS) -> Callable[[], nn.Module]:
    """Three projections, of which those of keys and values have fewer features; keys see other tokens than queries."""
    sizes = {"q": HEADS * WIDTH, "k": shared * WIDTH, "v": shared * WIDTH}
    parts = {name: nn.Linear(6, size) for name, size in sizes.items()}
    return network(lambda p, x: between(p["q"](x[:, :4]), p["k"](x[:, 4:]), p["v"](x[:, 4:])), HEADS * WIDTH, **parts)


def shared(repeat: Map, turn: Map = lambda x: x, after: Map = lambda x: x) -> Callable[[], nn.Module]:
    """Keys and values of one head for all."""
    return three(
        lambda q, k, v: attend(turn(heads_of(q)), after(repeat(turn(heads_of(k, 1)))), repeat(heads_of(v, 1))), 1
    )


FEW = ("halves, not of the first token", "complex numbers", "layer norm, then halves")

CLOSED: dict[str, Callable[[], nn.Module]] = {
    **{f"fused, {name}": fused(turn) for name, turn in MAPS.items()},
    **{f"windows, {name}": chunked(MAPS[name]) for name in FEW},
    "norm of all heads": three(lambda q, k, v: attend(*map(heads_of, (layer_norm(q), F.rms_norm(k, k.shape[-1:]), v)))),
    "values turned too": three(lambda q, k, v: attend(half(heads_of(q)), half(heads_of(k)), pairs(heads_of(v)))),
    "read in part": three(lambda q, k, v: attend(half(heads_of(q)), half(heads_of(k)), heads_of(v))[:, 1:3]),
    "in place": three(lambda q, k, v: attend(heads_of(q), half(heads_of(k)).mul_(2).clamp_(-1, 1), heads_of(v))),
    "shared heads of fused attention": three(
        lambda q, k, v: joined(
            F.scaled_dot_product_attention(half(heads_of(q)), half(heads_of(k, 1)), heads_of(v, 1), enable_gqa=True)
        ),
        1,
    ),
    "shared heads, expanded": shared(lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)),
    "shared heads, repeated, turned": shared(lambda x: x.repeat(1, 2, 1, 1), normalised),
    "shared heads, turned behind": shared(lambda x: x.repeat_interleave(2, 1), after=normalised),
}
"""What has a closed form throughout."""

OPEN: dict[str, Callable[[], nn.Module]] = {
    "queries that are keys": three(lambda q, k, v: attend(turned := half(heads_of(q)), turned, heads_of(q))),
    "less the mean token": three(lambda q, k, v: attend(heads_of(q), half(heads_of(k - k.mean(1, True))), heads_of(v))),
    "turned by other tokens": three(
        lambda q, k, v: attend(half(heads_of(q)) * q[:, :1, :1, None], heads_of(k), heads_of(v))
    ),
    "sums of tokens": three(lambda q, k, v: attend(half(heads_of(q)), half(heads_of(k.cumsum(1))), heads_of(v))),
    "tokens of their neighbours": three(
        lambda q, k, v: attend(heads_of(q), half(heads_of(torch.cat([k[:, 1:], k[:, :1]], 1) + k)), heads_of(v))
    ),
    "a part written over": three(lambda q, k, v: attend(heads_of(q), written_over(heads_of(k)), heads_of(v))),
}
"""What has none, or none that is known."""


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name: str) -> None:
    found = check(*made(CLOSED[name], samples=2, size=12), linear=True, influences=not name.startswith("fused"))
    assert set(found.methods.values()) == {"closed-form"}


@pytest.mark.parametrize("name", OPEN)
def test_others_stay_exact_beside_closed_forms(name: str) -> None:
    found = check(*made(OPEN[name], samples=2, size=12), linear=True)
    assert "autograd" in found.methods.values()
    assert found.methods["parts.embed", "parts.a"] == found.methods["parts.b", "parts.head"] == "closed-form"


@pytest.mark.parametrize("name", ["windows, layer norm, then halves", "shared heads, repeated, turned"])
def test_samples_alone_and_less_precision(name: str) -> None:
    model, images, labels = made(CLOSED[name], samples=3, size=12)
    config = TraceConfig(linear=True)

    def traced(size: int, **options: Any) -> InstanceRoutes:
        data = images.to(next(model.parameters()).dtype), labels
        return trace_routes(model, data, 1.0, config=config, batch_size=size, keep_scores=True, **options)

    together = traced(3)
    assert worst(traced(1), together) < 1e-12
    model.float()
    assert worst(traced(3), together) < 1e-4
    assert worst(traced(3, autocast=torch.bfloat16), together) < 0.3


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("side", [0, 1, 2])
def test_formulas(side: int, copies: int) -> None:
    torch.manual_seed(0)
    samples, count, width, critical = 2, 2, 5, 3
    sizes = {0: (4, 3), 1: (6, 3), 2: (6, 2)}  # tokens and features of queries, keys and values
    read = [torch.randn(samples * count, *sizes[each]).double() for each in sizes]
    rows, scale = torch.randn(samples, critical, count, sizes[2][1]).double(), torch.randn(samples * count).double()
    factors = torch.rand(samples * count, sizes[0][0]).double()
    groups = torch.arange(samples * count).view(-1, copies)
    maps = torch.randn(len(groups), copies, *sizes[side], width).double()
    weights = (read[0] @ read[1].mT * scale.view(-1, 1, 1)).softmax(-1)
    found = pulled_sums(side, Heads(*read, weights, scale), rows, factors, groups, maps)
    for number, group in enumerate(groups):

        def attended(x: Tensor, number: int = number, group: Tensor = group) -> Tensor:
            moved = [each[group] for each in read]
            moved[side] = moved[side] + torch.einsum("tm,gtem->gte", x, maps[number])
            attention = (moved[0] @ moved[1].mT * scale[group].view(-1, 1, 1)).softmax(-1) @ moved[2]
            kernels = rows[group[0] // count][:, group % count]
            return torch.einsum("gtd,kgd,gt->tk", attention, kernels, factors[group])

        expected = jacobian(attended, torch.zeros(sizes[side][0], width).double()).abs().sum((0, 1))
        torch.testing.assert_close(found[number], expected, rtol=1e-10, atol=1e-12)
