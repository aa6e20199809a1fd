"""Frozen gates: the same network, with statistics and gates written out as constants, is what is traced."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures import Function, Head, Inverted, Shuffled, chain
from attackroute.tracing import oracle
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.frozen_gates import FrozenGates
from attackroute.tracing.trace import trace_routes
from tracing import deviation, ready, same_routes, worst

NORMS: dict[str, Callable[[], nn.Module]] = {
    "group": lambda: nn.GroupNorm(2, 6),
    "group without affine": lambda: nn.GroupNorm(3, 6, affine=False),
    "layer": lambda: nn.LayerNorm([6, 9, 9]),
    "instance": lambda: nn.InstanceNorm2d(6, affine=True),
}


def normed(between: Callable[[Tensor], Tensor], **modules: nn.Module) -> nn.Module:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        return parts["head"](parts["b"](F.relu(between(parts["a"](x)))))

    return Function(forward, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 8, 3), head=Head(8), **modules)


def by_hand(name: str, norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """The norm with statistics that autograd does not see, written out once more."""

    def run(x: Tensor) -> Tensor:
        fixed = x.detach()
        rows = fixed.reshape(len(x), {"layer": 1, "instance": 6}.get(name) or norm.num_groups, -1)
        mean, std = rows.mean(2, keepdim=True), (rows.var(2, correction=0, keepdim=True) + norm.eps).sqrt()
        y = ((x.reshape(rows.shape) - mean) / std).reshape(x.shape)
        if norm.weight is None:
            return y
        shape = norm.weight.shape if name == "layer" else (6, 1, 1)
        return y * norm.weight.view(shape) + norm.bias.view(shape)

    return run


@pytest.mark.parametrize("name", NORMS)
def test_normalisation_has_a_closed_form_that_is_the_oracle_of_constant_statistics(name: str) -> None:
    torch.manual_seed(1)
    norm = NORMS[name]().double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    model, images, labels = ready(lambda: normed(norm, norm=norm), size=11)
    written, _, _ = ready(lambda: normed(by_hand(name, norm)), size=11)
    written.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(written(images), model(images))
    expected = oracle.trace(written, images, labels, width=0.3)
    found = trace_routes(model, (images, labels), 0.3, keep_scores=True, config=TraceConfig(freeze_gates=True))
    assert set(found.methods.values()) == {"closed-form"}
    assert worst(found, expected) < 1e-9
    assert same_routes(found, expected)
    true = trace_routes(model, (images, labels), 0.3, keep_scores=True)
    assert set(true.methods.values()) == {"autograd"}
    assert worst(found, true) > 1e-3
    assert found.provenance.criterion == "influence with frozen gates, approximate"


def test_gates_pass_nothing_on() -> None:
    model, images, labels = ready(Inverted)
    true = trace_routes(model, (images, labels), 0.3, keep_scores=True)
    found = trace_routes(model, (images, labels), 0.3, keep_scores=True, config=TraceConfig(freeze_gates=True))
    assert ("excite", "project.0") in true.methods
    assert ("excite", "project.0") not in found.methods
    assert "excite" not in found.layers
    before = found.scores["grouped.0"]
    assert deviation(before, true.scores["grouped.0"]) < 1e-12  # nothing is frozen behind it


def test_attention_weights_are_constants() -> None:
    query, key, value = (torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    plain = F.scaled_dot_product_attention(query, key, value)
    with FrozenGates():
        frozen = F.scaled_dot_product_attention(query, key, value)
        causal = F.scaled_dot_product_attention(query, key, value, None, 0.0, True, scale=0.3)
        manual = torch.softmax(query @ key.transpose(-1, -2) / 2, -1) @ value
    torch.testing.assert_close(frozen, plain)
    torch.testing.assert_close(causal, F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3))
    for output in (frozen, manual):
        gradients = torch.autograd.grad(output.sum(), [query, key, value], allow_unused=True)
        assert gradients[0] is None and gradients[1] is None
        weights = torch.softmax(query @ key.transpose(-1, -2) / 2, -1)
        torch.testing.assert_close(gradients[2], weights.sum(-2).unsqueeze(-1).expand_as(value))


@pytest.mark.parametrize("build", [chain, Shuffled])
def test_values_stay_what_they_are(build: Callable[[], nn.Module]) -> None:
    model, images, _ = ready(build)
    plain = model(images)
    with FrozenGates():
        torch.testing.assert_close(model(images), plain)


@pytest.mark.parametrize("build", [chain, lambda: nn.Sequential(chain(), nn.Softmax(1))], ids=["chain", "softmax"])
def test_heads_are_no_gates(build: Callable[[], nn.Module]) -> None:
    model, images, labels = ready(build)
    loss = partial(F.cross_entropy, reduction="none")
    exact, frozen = (
        trace_routes(model, (images, labels), keep_scores=True, loss=loss, config=TraceConfig(freeze_gates=on))
        for on in (False, True)
    )
    assert worst(frozen, exact) == 0
