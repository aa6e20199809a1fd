"""The tracer beside the oracle, and what a trace must leave as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from architectures import randomised
from attackroute.core.loss import Loss
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.route import Route
from attackroute.tracing import oracle
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.influence import influence
from attackroute.tracing.trace import trace_routes


def ready(
    build: Callable[[], nn.Module], *, dtype: torch.dtype = torch.float64, samples: int = 3, size: int = 13
) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in eval mode, always the same, with images and labels for it."""
    torch.manual_seed(0)
    model, images = build().to(dtype).eval(), torch.rand(samples, 3, size, size).to(dtype)
    with torch.no_grad():
        model(images.clone())  # lazy layers learn their sizes
    return randomised(model), images, torch.arange(samples) % 5


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the largest expected value; 0 only if zeros are found where all is zero."""
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).abs().max().item()
    return difference / max(expected.double().abs().max().item(), 1e-30)


def worst(found: InstanceRoutes, expected: InstanceRoutes | oracle.OracleTrace) -> float:
    """The largest deviation of any layer's scores."""
    assert tuple(found.layers) == tuple(expected.layers)
    return max(deviation(found.scores[layer], expected.scores[layer]) for layer in expected.layers)


def same_routes(found: InstanceRoutes, expected: InstanceRoutes | oracle.OracleTrace) -> bool:
    return all(torch.equal(found.masks[layer], expected.masks[layer]) for layer in expected.layers)


def agree_up_to_ties(found: InstanceRoutes, expected: oracle.OracleTrace, floor: float = 1e-30) -> None:
    """The oracle's layers, edges, scores (below ``floor`` is rounding), and routes but for ties that rounding broke."""
    assert tuple(found.layers) == expected.layers
    assert set(found.methods) == set(expected.edges)
    for layer in reversed(found.layers):
        scores = expected.scores[layer]
        largest = scores.abs().max().clamp(min=floor)
        assert (found.scores[layer] - scores).abs().max() <= 1e-9 * largest, layer
        ranked = scores.sort(dim=1, descending=True).values
        count = int(expected.masks[layer][0].sum())
        gap = ranked[:, count - 1] - ranked[:, count] if count < ranked.shape[1] else torch.ones(len(ranked))
        if (gap <= 1e-12 * largest).any() and not torch.equal(found.masks[layer], expected.masks[layer]):
            return  # what follows rests on other neurons
        assert torch.equal(found.masks[layer], expected.masks[layer]), layer


def shaken(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """An attack of random numbers that depend on the image alone."""
    rows = []
    for image in images:
        seed = int(image.double().sum().mul(1e6).item())
        rows.append(torch.randn(image.shape, generator=torch.Generator().manual_seed(seed)))
    return (images + 0.2 * torch.stack(rows).to(images)).clamp(0, 1)


def check(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    *,
    width: float = 0.3,
    tolerance: float = 1e-9,
    influences: bool = False,
    linear: bool = False,
    loss: Loss | None = None,
    noise: bool = False,
) -> InstanceRoutes:
    """Trace, and compare with the oracle: layers, edges, scores, routes, and on request the influence of every edge.

    With ``noise``, what is traced is how the images are :func:`shaken`.
    """
    traced, clean = (shaken(model, images, labels), images) if noise else (images, None)
    expected = oracle.trace(model, traced, labels, clean=clean, width=width, linear=linear, loss=loss)
    data = images if labels is None else (images, labels)
    attack, config = (shaken, TraceConfig(carrier="noise", linear=linear)) if noise else (None, TraceConfig(linear))
    found = trace_routes(model, data, width, attack=attack, config=config, loss=loss, keep_scores=True)
    assert set(found.methods) == set(expected.edges)
    assert worst(found, expected) <= tolerance
    assert same_routes(found, expected)
    for edge in expected.edges if influences else ():
        matrix = influence(model, images, *edge, linear=linear)
        assert deviation(matrix, expected.influence[edge]) <= tolerance, edge
    return found


def state(model: nn.Module) -> list[Any]:
    """All that a trace could leave behind in a model, in a form that compares with ``==``."""
    modules: list[Any] = [
        (
            module.training,
            list(module._forward_pre_hooks),
            list(module._forward_hooks),
            list(module._forward_hooks_always_called),
            list(module._backward_hooks),
        )
        for module in model.modules()
    ]
    parameters = [
        (name, id(value), value.requires_grad, value.grad is None, value.detach().tolist())
        for name, value in model.named_parameters()
    ]
    everywhere = torch.nn.modules.module
    modules.append((list(everywhere._global_forward_pre_hooks), list(everywhere._global_forward_hooks)))
    return [modules, parameters, [(name, id(value), value.tolist()) for name, value in model.named_buffers()]]


def untidy() -> nn.Sequential:
    """A small network in training mode, with mixed flags, a user's hook and some gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Dropout(0.9),
        nn.Softmax(dim=1), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5),
    )  # fmt: skip
    model.train()
    model[4].eval()
    model[0].weight.requires_grad_(False)
    model[3].bias.grad = torch.ones(4)
    model[2].register_forward_hook(lambda *_: None)
    return model


def small(channels: Sequence[int] = (3, 4, 4), classes: int = 5) -> nn.Module:
    """Two convolutions, ReLU between them, and a linear head."""
    first, second, third = channels
    return nn.Sequential(
        nn.Conv2d(first, second, 3), nn.ReLU(), nn.Conv2d(second, third, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(third, classes),
    )  # fmt: skip


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal in float64 but for rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def every_other(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Conv2d,)) -> Route:
    """About half of the channels of every layer."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    counts = {name: module.weight.shape[0] for name, module in modules.items()}
    return Route({name: range(index % 2, count, 2) for index, (name, count) in enumerate(counts.items())}, counts)


def require_slopes(model: nn.Module, gradients: Iterable[Tensor], value: Callable[[], Tensor]) -> None:
    """Require that these are a value's gradients with respect to the parameters, by difference quotients."""
    torch.manual_seed(1)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        for step in (1e-7, -2e-7):
            parameter.data.add_(direction, alpha=step)
            values.append(value())
        parameter.data.add_(direction, alpha=1e-7)
        torch.testing.assert_close((values[0] - values[1]) / 2e-7, (gradient * direction).sum(), rtol=1e-4, atol=1e-6)


def conv_outputs(model: nn.Module, x: Tensor, y: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Of every convolution module's call: Z and, with labels, the gradient of the summed cross entropy at it."""
    model = copy.deepcopy(model).eval()
    calls: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., Tensor]:
        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            count = sum(call.partition("#")[0] == name for call in calls) + 1
            output.retain_grad()
            calls[name if count == 1 else f"{name}#{count}"] = output
            return output.clone()

        return keep

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(hook(name))
    logits = model(x.clone())
    if y is not None:
        functional.cross_entropy(logits, y, reduction="sum").backward()
    return {name: (z.detach(), z.grad) for name, z in calls.items()}
