"""Penalties on tokens, gates and attention, against gradients of one image at a time and against differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attackroute as ar
from attackroute.hardening.settings import APPROXIMATE, EXACT
from token_networks import GATED, TOKENS, made, readings
from tracing import state

ALL = {**TOKENS, **GATED}


def ranked(model: nn.Module, x: Tensor, y: Tensor) -> ar.Route:
    return ar.rank_channels(model, (x, y), "gradient", 0.4, linear=True)


def by_hand(model: nn.Module, route: ar.Route, x: Tensor, y: Tensor) -> float:
    """Eq. (10), one image at a time."""
    total = 0.0
    for image, label in zip(x, y, strict=True):
        for layer, (_, slope) in zip(route, readings(model, image, label), strict=True):
            total += float(slope[:, route[layer]].abs().sum())
    return total / len(x)


@pytest.mark.parametrize("name", ALL)
def test_gradient_penalty_is_the_mean_over_images_and_its_gradient_is_that_of_differences(name: str) -> None:
    model, x, y = made(ALL[name])
    route, before = ranked(model, x, y), state(model)
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
    sizes = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, step in zip(parameters, way, strict=True):
                parameter.add_(step, alpha=sign * 1e-7)
        sizes.append(by_hand(model, route, x, y))
        with torch.no_grad():
            for parameter, step in zip(parameters, way, strict=True):
                parameter.sub_(step, alpha=sign * 1e-7)
    assert (sizes[0] - sizes[1]) / 2e-7 == pytest.approx(expected, rel=1e-4)
    assert state(model) == before


@pytest.mark.parametrize("name", ALL)
def test_the_approximation_comes_near_the_exact_gradient(name: str) -> None:
    model, x, y = made(ALL[name])
    route, outcomes = ranked(model, x, y), {}
    for method in (EXACT, APPROXIMATE):
        penalty = ar.GradientPenalty(model, route, method=method, eps=1e-7)
        with penalty.watch():
            logits = model(x)
        value = penalty(logits, y)
        slopes = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
        outcomes[method] = float(value.detach()), torch.cat([slope.flatten() for slope in slopes])
    assert outcomes[APPROXIMATE][0] == pytest.approx(outcomes[EXACT][0], rel=1e-9)
    exact = outcomes[EXACT][1]
    assert (outcomes[APPROXIMATE][1] - exact).norm() < 1e-4 * exact.norm()


def test_attention_keeps_its_fused_kernels_afterwards() -> None:
    model, x, y = made(TOKENS["attentive"])
    enabled = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    penalty = ar.GradientPenalty(model, ranked(model, x, y))
    with pytest.raises(ZeroDivisionError), penalty.watch():
        model(x)
        raise ZeroDivisionError
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == enabled
    with pytest.raises(RuntimeError, match="not implemented"):  # what the exact method must avoid
        q = torch.rand(1, 1, 4, 4, requires_grad=True)
        (slope,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).sum(), q, create_graph=True)
        slope.sum().backward()
