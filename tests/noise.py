"""Noise routes beside their oracle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attackroute.core.loss import Loss
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.tracing import oracle
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.trace import trace_routes
from tracing import same_routes, worst


def shaken(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """An attack of random numbers that depend on the image alone."""
    rows = []
    for image in images:
        seed = int(image.double().sum().mul(1e6).item())
        rows.append(torch.randn(image.shape, generator=torch.Generator().manual_seed(seed)))
    return (images + 0.2 * torch.stack(rows).to(images)).clamp(0, 1)


def check_noise(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    width: float = 0.3,
    tolerance: float = 1e-12,
    linear: bool = False,
    loss: Loss | None = None,
) -> InstanceRoutes:
    """Trace, and compare with the oracle: layers, edges, scores and routes."""
    expected = oracle.trace(
        model, shaken(model, images, labels), labels, clean=images, width=width, linear=linear, loss=loss
    )
    found = trace_routes(
        model,
        (images, labels),
        width,
        config=TraceConfig(carrier="noise", linear=linear),
        attack=shaken,
        loss=loss,
        keep_scores=True,
    )
    assert set(found.methods) == set(expected.edges)
    assert worst(found, expected) <= tolerance
    assert same_routes(found, expected)
    return found
