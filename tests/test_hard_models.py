"""Networks that could mislead the tracer: each is traced exactly or refused in one line, never wrong in silence."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from architectures import Head, dynamic, randomised
from attackroute.core.errors import UserError
from attackroute.core.model_state import weights_digest
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.layer_map import require_model
from attackroute.tracing.influence import influence
from attackroute.tracing.oracle import _gradients, _run
from attackroute.tracing.trace import trace_routes
from hard_models import END, HARD, HARD_LINEAR, A, B, two, using
from tracing import check, ready, same_routes, small, worst


@pytest.mark.parametrize("name", [*HARD, *HARD_LINEAR])
def test_hard_models_are_the_oracle(name: str) -> None:
    check(*ready({**HARD, **HARD_LINEAR}[name]), linear=name in HARD_LINEAR, influences=True)


# Closed forms that must not be lost


VIEWS = {
    "slices": lambda x: torch.cat([x[:, :3], x[:, 3:]], 1),
    "chunk": lambda x: torch.cat(x.chunk(2, 1), 1),
    "positions": lambda x: x[:, :, 1:, ::2],
    "view": lambda x: x.flatten(2).view(x.shape),
    "constants like a map": lambda x: torch.cat([x, torch.ones_like(x[:, :1])], 1)[:, :6],
    "option A": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))[:, :6],
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("inplace", [False, True])
def test_views_keep_the_closed_form(name: str, inplace: bool) -> None:
    found = check(*ready(two(lambda x: VIEWS[name](F.relu(x, inplace=inplace)))))
    assert list(found.methods.values()) == ["closed-form"]


# The user's data


@pytest.mark.parametrize("between", [F.relu, lambda x: F.softmax(x, 1)], ids=["closed form", "autograd"])
def test_a_network_that_normalises_in_place(between: Callable[[Tensor], Tensor]) -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        return parts["head"](F.relu(parts["b"](between(parts["a"](x.sub_(0.4).mul_(3))))))

    model, images, labels = ready(using(forward, a=A, b=B, head=END))
    given = images.clone()
    check(model, images, labels, influences=True)
    assert torch.equal(images, given)


# Values that change after they were used


@pytest.mark.parametrize(
    "factor",
    [lambda x: torch.sigmoid(x.detach()), lambda x: torch.linspace(-1, 1, 6).to(x).view(6, 1, 1)],
    ids=["gate", "scale"],
)
def test_a_factor_that_is_overwritten_later(factor: Callable[[Tensor], Tensor]) -> None:
    def dirty(x: Tensor) -> Tensor:
        gain = factor(x)
        x = x * gain
        gain.mul_(5)
        return x

    model, images, labels = ready(two(lambda x: x * factor(x)))
    expected = trace_routes(model, (images, labels), keep_scores=True)
    model, images, labels = ready(two(dirty))
    try:
        found = trace_routes(model, (images, labels), keep_scores=True)
    except UserError:
        return
    assert worst(found, expected) <= 1e-9


def test_a_kernel_that_is_overwritten_later() -> None:
    """One buffer that holds the kernels of two layers in turn."""
    work = torch.zeros(4, 4, 3, 3).double()

    def traced(shared: bool) -> InstanceRoutes:
        def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
            x = F.relu(parts["first"](x))
            for factor in (1.0, -2.0):
                kernel = parts["kernel"].weight * factor
                x = F.relu(F.conv2d(x, work.copy_(kernel) if shared else kernel))
            return parts["head"](x)

        layers = {"first": lambda: nn.Conv2d(3, 4, 3), "kernel": lambda: nn.Conv2d(4, 4, 3), "head": lambda: Head(4)}
        model, images, labels = ready(using(forward, **layers))
        return trace_routes(model, (images, labels), keep_scores=True)

    expected = traced(shared=False)
    try:
        found = traced(shared=True)
    except UserError:
        return
    assert worst(found, expected) <= 1e-9


# Samples that do not stand alone


@pytest.mark.parametrize(
    "between",
    [
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: x - x.mean(0),
        lambda x: x.roll(1, 0),
        lambda x: x * torch.sigmoid(x.flip(0)),
        lambda x: x * torch.sigmoid(x[:1]),
        lambda x: x * torch.sigmoid(x[1:2]),
    ],
    ids=["batch norm without statistics", "batch mean", "roll", "gate of another sample", "first", "second"],
)
def test_networks_that_mix_samples_are_refused(between: Callable[[Tensor], Tensor]) -> None:
    model, images, labels = ready(two(between))
    with pytest.raises(UserError, match="sample"):
        trace_routes(model, (images, labels))


def test_a_kernel_that_is_computed_from_all_samples_is_refused() -> None:
    model, images, labels = ready(dynamic)
    with pytest.raises(UserError, match="depends on another image"):
        trace_routes(model, (images, labels))


@pytest.mark.parametrize(
    "forward",
    [
        lambda p, x: p["head"](p["b"](F.relu(p["a"](torch.cat([x, x.flip(3)]))))).chunk(2)[0],
        lambda p, x: torch.cat([p["head"](p["b"](F.relu(p["a"](one[None])))) for one in x]),
        lambda p, x: p["head"](torch.stack([p["b"](one) for one in F.relu(p["a"](x))])),
    ],
    ids=["views of an image", "one by one", "unbatched"],
)
def test_layers_on_another_batch_are_refused(forward: Any) -> None:
    model, images, labels = ready(using(forward, a=A, b=B, head=END))
    with pytest.raises(UserError, match=r"runs on a batch of \d for 2 images"):
        trace_routes(model, (images, labels))


def test_a_network_that_squeezes_a_batch_of_one_is_refused() -> None:
    forward = lambda p, x: p["fc"](F.adaptive_avg_pool2d(p["a"](x), 1).squeeze())  # noqa: E731
    model, images, labels = ready(using(forward, a=A, fc=lambda: nn.Linear(6, 5)))
    check(model, images, labels)
    for data in ((images[:1], labels[:1]), (images, labels)):
        with pytest.raises(UserError, match=r"shape \(5,\) for 1 images, not logits"):
            trace_routes(model, data, batch_size=2)


# Networks that change, or are not eager


def varying(chosen: Callable[[Tensor], bool]) -> nn.Module:
    """A network of which one part or another runs, as the images or the number of the pass have it."""

    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        return parts["head"](parts["b" if chosen(x) else "c"](F.relu(parts["a"](x))))

    return using(forward, a=A, b=B, c=B, head=END)()


def test_a_structure_that_varies_is_refused() -> None:
    passes = count()
    with pytest.raises(UserError, match="structure must not vary"):
        trace_routes(varying(lambda _: next(passes) % 2 == 0), torch.rand(2, 3, 9, 9))
    branching = varying(lambda x: bool(x.mean() > 0.5))
    bright, dark = torch.full((2, 3, 9, 9), 0.9), torch.full((2, 3, 9, 9), 0.1)
    assert trace_routes(branching, iter([bright, bright])).layers == ("parts.a", "parts.b")
    assert trace_routes(branching, iter([dark, dark])).layers == ("parts.a", "parts.c")
    with pytest.raises(UserError, match="structure must not vary"):
        trace_routes(branching, iter([bright, dark]))


@pytest.mark.parametrize(
    "build",
    [
        lambda model, _: torch.jit.script(model),
        torch.jit.trace,
        lambda model, x: nn.Sequential(nn.Conv2d(3, 3, 1), torch.jit.trace(model, x)),
    ],
    ids=["scripted", "traced", "partly traced"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.*")
def test_torchscript_is_refused(build: Any) -> None:
    images = torch.rand(2, 3, 9, 9)
    with pytest.raises(UserError, match="TorchScript"):
        trace_routes(build(small().eval(), images), images)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "layer", "function"])
def test_compiled_networks_are_traced_as_eager_ones(part: str) -> None:
    model, images, labels = ready(two(lambda x: F.softmax(F.relu(x), 1)))
    expected = trace_routes(model, (images, labels), keep_scores=True)
    if part == "model":
        model = torch.compile(model, backend="eager")
    elif part == "layer":
        model.parts["b"].compile(backend="eager")
    else:
        model.run = torch.compile(model.run, backend="eager")
    found = trace_routes(model, (images, labels), keep_scores=True)
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert ours == theirs
        assert torch.equal(found.scores[ours], expected.scores[theirs])
    found.aggregate().check(expected.channels)
    require_model(found.channels, model)
    assert weights_digest(model) == weights_digest(getattr(model, "_orig_mod", model))


def test_fx_and_data_parallel_wrappers() -> None:
    model, images, labels = ready(small)
    expected = trace_routes(model, (images, labels), keep_scores=True)
    for wrapped in (torch.fx.symbolic_trace(model), nn.DataParallel(model)):
        found = trace_routes(wrapped, (images, labels), keep_scores=True)
        assert found == expected
        assert all(torch.equal(found.scores[layer], expected.scores[layer]) for layer in expected.layers)
        require_model(expected.channels, wrapped)


# Modes inside the model


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("whole", [False, True])
def test_layers_without_gradients_are_refused(mode: Callable[[], Any], whole: bool) -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        with mode():
            x = F.relu(parts["b"](F.relu(parts["a"](x))))
            if whole:
                return parts["head"](parts["c"](x))
        return parts["head"](parts["c"](x.clone()))

    model = using(forward, a=A, b=B, c=lambda: nn.Conv2d(5, 5, 3), head=END)()
    with pytest.raises(UserError, match=r"no_grad|inference_mode"):
        trace_routes(model, torch.rand(2, 3, 9, 9))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("act", [F.relu, lambda x: F.softmax(x, 1)], ids=["closed form", "autograd"])
@pytest.mark.parametrize("where", ["body", "segment", "sink", "head"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_traced_exactly_or_refused(
    act: Callable[[Tensor], Tensor], where: str, reentrant: bool
) -> None:
    def forward(parts: nn.ModuleDict, x: Tensor, at: str) -> Tensor:
        def run(part: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return checkpoint(function, x, use_reentrant=reentrant) if part == at else function(x)

        x = run("body", lambda x: act(parts["b"](act(parts["a"](x)))), x)
        x = run("segment", act, x)
        x = run("sink", lambda x: F.relu(parts["c"](x)), x)
        return run("head", parts["head"], x)

    parts = {"a": lambda: nn.Conv2d(3, 4, 3), "b": lambda: nn.Conv2d(4, 4, 3), "c": lambda: nn.Conv2d(4, 4, 3)}
    plain, images, labels = ready(using(lambda p, x: forward(p, x, ""), **parts, head=lambda: Head(4)))
    saving, *_ = ready(using(lambda p, x: forward(p, x, where), **parts, head=lambda: Head(4)))
    expected = trace_routes(plain, (images, labels), keep_scores=True)
    try:
        found = trace_routes(saving, (images, labels), keep_scores=True)
    except UserError as error:
        assert "checkpoint" in str(error) or "no_grad" in str(error)
        return
    assert worst(found, expected) <= 1e-9
    assert same_routes(found, expected)


# Other people's networks


QUICK = ["resnet18", "mobilenet_v3_small"]
SLOW = [
    *("resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121", "googlenet", "squeezenet1_1", "mnasnet0_5"),
    *("regnet_y_400mf", "shufflenet_v2_x0_5", "inception_v3"),
]


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_torchvision_at_random(name: str) -> None:
    """Every edge's structure, and the influence of some edges on single elements of the target."""
    import torchvision

    torch.manual_seed(0)
    model = randomised(torchvision.models.get_model(name, weights=None, num_classes=5)).double().eval()
    size = 75 if name == "inception_v3" else 33
    images = torch.rand(1, 3, size, size).double()
    routes = trace_routes(model, images, keep_scores=True)
    shuffles = name.startswith("shufflenet")  # a channel shuffle has no closed form
    assert set(routes.methods.values()) == ({"closed-form", "autograd"} if shuffles else {"closed-form"})
    calls, _ = _run(model, images, False)
    edges = list(routes.methods)
    for source, target in edges[:: max(1, len(edges) // 4)]:
        output, leaf = calls[target].output, calls[source].leaf
        expected = torch.zeros(leaf.shape[1], dtype=torch.float64)
        for element in output[0, 0].flatten():
            (gradient,) = _gradients(element, [leaf], torch.ones_like(element))
            expected += 0 if gradient is None else gradient[0].abs().flatten(1).sum(1)
        found = influence(model, images, source, target)[0, 0]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "test_efficientnet", "test_convnext"])
def test_timm_at_random(name: str) -> None:
    import timm

    model, images, _ = ready(lambda: timm.create_model(name, num_classes=5), size=32, samples=1)
    check(model, images, None)
