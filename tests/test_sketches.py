"""Sketches against exact products: no bias, and the same numbers whatever the batch."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures import MIXED, Function, Head, Shuffled, chain, tokens
from attackroute.core.errors import UserError
from attackroute.core.model_state import frozen
from attackroute.core.random import cauchies, derived_keys, mixed
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.masks import top_k
from attackroute.tracing import oracle
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.segments import Segments
from attackroute.tracing.structure import Structure
from attackroute.tracing.trace import trace_routes
from hard_models import two, using
from tracing import deviation, ready, same_routes, worst

COPIES = 800
SKETCHES = TraceConfig(sketches=32)
Copies = tuple[Segments, dict[str, list[str]], dict[str, Tensor]]
SKETCHED = {"shuffled": (Shuffled, False), "tokens": (tokens, True)}


def dead() -> nn.Module:
    """Layer norm between convolutions, and a channel that nothing can pass."""

    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = parts["a"](x) * torch.tensor([1.0, 1, 0, 1]).to(x).view(1, 4, 1, 1)
        x = F.relu(F.group_norm(x, 4))
        return parts["head"](parts["b"](x))

    return Function(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 6, 3, bias=False), head=Head(6))


@pytest.fixture(scope="module", params=SKETCHED)
def copies(request: pytest.FixtureRequest) -> Copies:
    """The Jacobian edges of a network on many copies of one image, and critical channels for each target."""
    build, linear = SKETCHED[request.param]
    model, images, _ = ready(build, dtype=torch.float32, samples=1, size=9)
    images = images.expand(COPIES, -1, -1, -1)
    with frozen(model):
        structure, _ = Structure.probe(model, images, linear=linear)
        edges = structure.jacobian_edges
        critical = {
            name: top_k(torch.rand(1, structure.channels[name]), 0.4).expand(COPIES, -1).contiguous() for name in edges
        }
        return Segments(model, images, edges, linear=linear), edges, critical


# The numbers


def test_cauchy_numbers_have_the_quantiles_of_the_distribution() -> None:
    numbers = cauchies(torch.arange(64) * 987654321987, 4096).double()
    uniform = torch.atan(numbers) / math.pi + 0.5
    counts = torch.histc(uniform.float(), 64, 0, 1)
    expected = numbers.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * math.sqrt(2 * 63)
    assert numbers.isfinite().all()
    assert (numbers != 0).all()


def test_cauchy_numbers_of_neighbours_and_of_keys_are_unrelated() -> None:
    keys = derived_keys(torch.tensor([1, 2]), "layer", range(32)).flatten()
    assert len(keys.unique()) == len(keys)
    uniform = torch.atan(cauchies(keys, 4096).double()) / math.pi
    bound = 5 / math.sqrt(4096)
    correlations = torch.corrcoef(uniform) - torch.eye(64)
    assert correlations.abs().max() < bound
    assert (torch.corrcoef(torch.stack([uniform[:, 1:].flatten(), uniform[:, :-1].flatten()]))[0, 1]).abs() < bound / 8


def test_draws_do_not_depend_on_how_they_are_taken() -> None:
    keys = torch.tensor([5, 6])
    whole = derived_keys(keys, "a", range(8))
    assert torch.equal(torch.cat([derived_keys(keys, "a", range(3)), derived_keys(keys, "a", range(3, 8))], 1), whole)
    assert not (whole == derived_keys(keys, "b", range(8))).any()
    numbers = cauchies(whole.flatten(), 100)
    assert torch.equal(cauchies(whole.flatten()[3:5], 60), numbers[3:5, :60])


# Bias


def apart(scores: Tensor, exact: Tensor) -> float:
    """How far the mean over copies is from the exact scores: the largest distance in its own standard errors."""
    scores, exact = scores.double()[:, exact[0] > 0], exact.double()[:, exact[0] > 0]
    return float(((scores - exact).mean(0) / scores.std(0) * math.sqrt(COPIES)).abs().max())


@pytest.mark.parametrize("draws", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_scores_are_unbiased(copies: Copies, draws: int) -> None:
    found, edges, critical = copies
    keys = mixed(torch.arange(COPIES) + COPIES * draws)
    for target in edges:
        exact = found.scores(target, critical[target])
        for source, scores in found.sketched(target, critical[target], keys, draws).items():
            assert apart(scores, exact[source]) < 4.5, (source, target)
            assert (scores[exact[source] == 0] == 0).all()


def test_a_bias_of_a_few_percent_would_be_found(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    more = lambda logs, draws: (logs / draws).exp()  # noqa: E731  # by 8 %
    monkeypatch.setattr("attackroute.tracing.segments._scale", more)
    found, edges, critical = copies
    keys = mixed(torch.arange(COPIES))
    for target in edges:
        exact = found.scores(target, critical[target])
        for source, scores in found.sketched(target, critical[target], keys, 16).items():
            assert apart(scores, exact[source]) > 4.5, (source, target)


# Whole traces


@pytest.mark.parametrize("name", MIXED)
def test_only_edges_without_a_closed_form_are_sketched(name: str) -> None:
    model, images, labels = ready(MIXED[name])
    exact = trace_routes(model, (images, labels), 0.3, keep_scores=True)
    found = trace_routes(model, (images, labels), 0.3, keep_scores=True, config=SKETCHES)
    renamed = {edge: "sketch" if way == "autograd" else way for edge, way in exact.methods.items()}
    assert found.methods == renamed
    assert found.provenance.criterion == "influence, approximate (32 sketches)"
    assert found.provenance.seed == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SKETCHED)
def test_routes_of_many_draws_are_the_exact_ones(name: str) -> None:
    build, linear = SKETCHED[name]
    model, images, labels = ready(build, samples=2)
    expected = oracle.trace(model, images, labels, width=0.5, linear=linear)
    config = TraceConfig(sketches=4096, linear=linear)
    found = trace_routes(model, (images, labels), 0.5, keep_scores=True, config=config)
    for layer in reversed(found.layers):
        assert deviation(found.scores[layer], expected.scores[layer]) < 0.1, layer
        if (found.masks[layer] != expected.masks[layer]).any():
            break  # earlier layers add up over other neurons


def test_what_is_written_to_after_a_linear_map_has_read_it_counts_as_it_was() -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = F.layer_norm(parts["embed"](x).flatten(2).transpose(1, 2), (4,))
        hidden = parts["fc1"](x)
        x *= hidden.sigmoid() * torch.tensor([9.0, 1, 1, 0.1]).to(x)
        return parts["head"](x.mean(1))

    layers = {
        "embed": partial(nn.Conv2d, 3, 4, 4, 4),
        "fc1": partial(nn.Linear, 4, 4),
        "head": partial(nn.Linear, 4, 5),
    }
    model, images, labels = ready(using(forward, **layers), samples=2)
    expected = oracle.trace(model, images, labels, width=1.0, linear=True)
    found = trace_routes(model, (images, labels), 1.0, keep_scores=True, config=TraceConfig(sketches=4096, linear=True))
    assert worst(found, expected) < 0.08


def test_closed_form_networks_stay_exact() -> None:
    model, images, labels = ready(chain)
    exact = trace_routes(model, (images, labels), keep_scores=True)
    found = trace_routes(model, (images, labels), keep_scores=True, config=TraceConfig(sketches=32, seed=5))
    assert found == exact
    assert worst(found, exact) == 0
    assert found.provenance == exact.provenance


def test_batches_and_order_change_nothing() -> None:
    model, images, labels = ready(tokens, dtype=torch.float32, samples=6)
    labels = labels % 5

    def traced(order: Tensor, batch_size: int, seed: int = 1) -> InstanceRoutes:
        data = images[order], labels[order]
        config = TraceConfig(sketches=32, linear=True, seed=seed)
        return trace_routes(model, data, 0.4, config=config, batch_size=batch_size, keep_scores=True)

    order = torch.tensor([4, 1, 5, 0, 3, 2])
    together = traced(torch.arange(6), 6)
    apart = traced(order, 1).select(order.argsort())
    assert same_routes(apart, together)
    assert worst(apart, together) < 1e-4
    assert worst(traced(torch.arange(6), 6, seed=2), together) > 1e-3


def test_chunks_of_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, labels = ready(Shuffled, dtype=torch.float32)
    whole = trace_routes(model, (images, labels), config=SKETCHES, keep_scores=True)
    monkeypatch.setattr("attackroute.tracing.segments._ELEMENTS", 1)
    assert worst(trace_routes(model, (images, labels), config=SKETCHES, keep_scores=True), whole) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_that_nothing_passes_score_exactly_zero(dtype: torch.dtype) -> None:
    model, images, labels = ready(dead, dtype=dtype)
    found = trace_routes(model, (images, labels), 0.5, config=SKETCHES, keep_scores=True)
    assert found.methods["parts.a", "parts.b"] == "sketch"
    scores = found.scores["parts.a"]
    assert (scores[:, 2] == 0).all()
    assert (scores[:, [0, 1, 3]] > 0).all()


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_small_and_large_derivatives_stay_in_range(factor: float) -> None:
    model, images, labels = ready(dead, dtype=torch.float32)
    before = trace_routes(model, (images, labels), 0.5, config=SKETCHES, keep_scores=True)
    with torch.no_grad():
        model.parts["b"].weight.mul_(factor)
        model.parts["head"].fc.weight.div_(factor)
    after = trace_routes(model, (images, labels), 0.5, config=SKETCHES, keep_scores=True)
    assert deviation(after.scores["parts.a"] / factor, before.scores["parts.a"]) < 1e-3


# Files


def test_files_say_that_routes_are_approximate(tmp_path: Path) -> None:
    model, images, labels = ready(Shuffled, samples=4)
    whole = trace_routes(model, (images, labels), config=SKETCHES, keep_scores=True)
    whole.save(tmp_path / "routes.safetensors")
    loaded = InstanceRoutes.load(tmp_path / "routes.safetensors")
    joined = InstanceRoutes.concatenate([whole.select([0, 1]), whole.select([2, 3])])
    assert loaded == joined == whole
    assert "approximate" in repr(loaded)
    assert "approximate" in repr(loaded.aggregate())


def test_exact_and_approximate_routes_together_are_approximate() -> None:
    model, images, labels = ready(Shuffled)
    exact, found = (trace_routes(model, (images, labels), config=config) for config in (TraceConfig(), SKETCHES))
    joined = InstanceRoutes.concatenate([exact, found])
    assert joined.provenance.criterion == "influence + influence, approximate (32 sketches)"
    assert "autograd + sketch" in joined.methods.values()


# Faults


@pytest.mark.parametrize("sketches", [0, 7, -32, 32.0, True, "many"])
def test_numbers_of_draws_that_cannot_be_used_are_refused(sketches: Any) -> None:
    model, images, labels = ready(Shuffled)
    with pytest.raises(UserError, match="give 8 or more"):
        trace_routes(model, (images, labels), config=TraceConfig(sketches=sketches))


def test_bfloat16_is_near_and_float16_is_refused() -> None:
    model, images, labels = ready(tokens, dtype=torch.float32)
    settings: dict[str, Any] = {"config": TraceConfig(sketches=32, linear=True), "keep_scores": True}
    plain = trace_routes(model, (images, labels), 1.0, **settings)
    short = trace_routes(model, (images, labels), 1.0, autocast=torch.bfloat16, **settings)
    assert worst(short, plain) < 0.2
    with pytest.raises(UserError, match="float16, whose range"):
        trace_routes(model, (images, labels), 1.0, autocast=torch.float16, **settings)


def test_derivatives_that_are_not_finite_are_named() -> None:
    def infinite(x: Tensor) -> Tensor:
        return F.softmax(x + (x - x.detach()).abs().sqrt(), 1)  # its derivative is infinite times zero

    model, images, labels = ready(two(infinite))
    with pytest.raises(UserError, match="NaN"):
        trace_routes(model, (images, labels), config=SKETCHES)
