"""What must not change the routes: how samples are batched, ordered, stored and repeated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from architectures import CLOSED, MIXED, Head, Residual, activations, chain
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.tracing.influence import influence
from attackroute.tracing.trace import trace_routes
from tracing import deviation, ready, worst

NAMES = ["residual", "dense", "overlapping pools", "inverted", "shuffled", "aliased"]
MODELS = {name: {**CLOSED, **MIXED}[name] for name in NAMES}


def traced(name: str, *, samples: int = 5) -> tuple[nn.Module, torch.Tensor, torch.Tensor, InstanceRoutes]:
    model, images, labels = ready(MODELS[name], samples=samples)
    return model, images, labels, trace_routes(model, (images, labels), 0.3, keep_scores=True)


def rows(found: InstanceRoutes, expected: InstanceRoutes, index: torch.Tensor, tolerance: float) -> None:
    """The samples ``index`` of ``expected`` are those of ``found``."""
    assert found.methods == expected.methods
    for layer in expected.layers:
        assert torch.equal(found.masks[layer], expected.masks[layer][index])
        assert deviation(found.scores[layer], expected.scores[layer][index]) <= tolerance
    assert torch.equal(found.labels, expected.labels[index])
    assert torch.equal(found.predictions, expected.predictions[index])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("name", NAMES)
def test_batch_size(name: str, size: int) -> None:
    model, images, labels, expected = traced(name)
    found = trace_routes(model, (images, labels), 0.3, keep_scores=True, batch_size=size)
    rows(found, expected, torch.arange(5), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_order_and_duplicates(name: str) -> None:
    model, images, labels, expected = traced(name)
    order = torch.tensor([3, 3, 0, 4, 1, 3, 2])
    found = trace_routes(model, (images[order], labels[order]), 0.3, keep_scores=True)
    rows(found, expected, order, 1e-12)


def test_a_first_batch_of_one() -> None:
    # instance norm with statistics works on (1, N * C): a layout that only a batch of one shares with the map
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    model, images, labels = ready(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 4, 3), Head(4)))
    expected = trace_routes(model, (images, labels), keep_scores=True)
    for sizes in ([2, 1], [1, 2]):
        found = trace_routes(model, zip(images.split(sizes), labels.split(sizes), strict=True), keep_scores=True)
        assert worst(found, expected) <= 1e-12


@pytest.mark.parametrize("build", [chain, activations, Residual], ids=["chain", "activations", "residual"])
def test_in_place_operations(build: Callable[..., nn.Module]) -> None:
    results = []
    for inplace in (False, True):
        model, images, labels = ready(lambda inplace=inplace: build(inplace=inplace))
        results.append(trace_routes(model, (images, labels), 0.3, keep_scores=True))
    assert results[0].methods == results[1].methods
    assert worst(*results) == 0
    assert results[0] == results[1]


@pytest.mark.parametrize("name", NAMES)
def test_channels_last(name: str) -> None:
    model, images, labels, expected = traced(name)
    model = model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    found = trace_routes(model, (images, labels), 0.3, keep_scores=True)
    rows(found, expected, torch.arange(5), 1e-11)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)


def test_channels_last_reaches_the_layers() -> None:
    model, images, _ = ready(CLOSED["residual"], dtype=torch.float32)
    model = model.to(memory_format=torch.channels_last)
    seen = []
    model.a1[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trace_routes(model, images.contiguous(memory_format=torch.channels_last))
    assert seen
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_the_layout_of_the_images_in_memory() -> None:
    model, images, labels, expected = traced("residual")
    wide = torch.zeros(5, 3, 26, 13, dtype=torch.float64)
    wide[:, :, ::2] = images
    for stored in (wide[:, :, ::2], images.flip(3).flip(3), images.transpose(2, 3).contiguous().transpose(2, 3)):
        rows(trace_routes(model, (stored, labels), 0.3, keep_scores=True), expected, torch.arange(5), 1e-12)
    same = trace_routes(model, (images[:1].expand(5, -1, -1, -1), labels[:1].expand(5)), 0.3, keep_scores=True)
    rows(same, expected, torch.zeros(5, dtype=torch.int64), 1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", ["residual", "shuffled"])
def test_gradient_modes_of_the_caller(name: str, mode: Callable[[], torch.no_grad]) -> None:
    model, images, labels, expected = traced(name)
    edge = next(iter(expected.methods))
    matrix = influence(model, images, *edge)
    with mode():
        found = trace_routes(model, (images.clone(), labels.clone()), 0.3, keep_scores=True)
        assert torch.equal(influence(model, images.clone(), *edge), matrix)
    assert worst(found, expected) == 0
    assert not any(found.scores[layer].requires_grad for layer in found.layers)


def test_gradients_of_images_and_parameters_do_not_matter() -> None:
    model, images, labels, expected = traced("shuffled")
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 == 0)
    found = trace_routes(model, (images.clone().requires_grad_(), labels), 0.3, keep_scores=True)
    assert worst(found, expected) == 0
    assert [p.requires_grad for p in model.parameters()] == [n % 3 == 0 for n in range(len(list(model.parameters())))]


def test_training_mode_does_not_matter() -> None:
    model, images, labels, expected = traced("inverted")
    assert worst(trace_routes(model.train(), (images, labels), 0.3, keep_scores=True), expected) == 0
    assert model.training


def test_global_generators_and_settings_are_left_alone() -> None:
    model, images, labels, _ = traced("shuffled")
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()
    trace_routes(model, (images, labels))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before[1:]
