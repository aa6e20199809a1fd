"""Sketches against exact products: no bias, honest errors, and the same numbers whatever the batch."""

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
from attackroute.tracing.sketches import Estimate, groups
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


def test_groups_of_the_jackknife_are_never_mixed() -> None:
    for most in (1, 2, 3, 100):
        parts = groups(range(32, 64), most)
        assert [draw for part in parts for draw in part] == list(range(32, 64))
        assert all(part.start // 4 == (part.stop - 1) // 4 and len(part) <= most for part in parts)


# Bias and stated errors


def apart(scores: Tensor, exact: Tensor) -> float:
    """How far the mean over copies is from the exact scores: the largest distance in its own standard errors."""
    scores, exact = scores.double()[:, exact[0] > 0], exact.double()[:, exact[0] > 0]
    return float(((scores - exact).mean(0) / scores.std(0) * math.sqrt(COPIES)).abs().max())


@pytest.mark.parametrize("draws", [16, 32])
def test_scores_are_unbiased_and_their_errors_as_stated(copies: Copies, draws: int) -> None:
    found, edges, critical = copies
    keys = mixed(torch.arange(COPIES) + COPIES * draws)
    for target in edges:
        exact = found.scores(target, critical[target])
        for source, estimate in found.sketched(target, critical[target], keys, range(draws)).items():
            true = exact[source]
            assert apart(estimate.scores, true) < 4.5, (source, target)
            assert (estimate.scores[true == 0] == 0).all()
            alive = true[0] > 0
            stated = estimate.errors.double().square().mean(0).sqrt() / estimate.scores.double().std(0)
            assert 0.85 < stated[alive].mean() < 1.2, (source, target)
            inside = ((estimate.scores - true).abs() < 2 * estimate.errors)[:, alive].double().mean()
            assert 0.8 < inside < 0.97, (source, target)  # of a normal error with 7 degrees of freedom, 0.915


def test_a_bias_of_a_few_percent_would_be_found(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    more = lambda logs, draws: (logs / draws).exp()  # noqa: E731  # by 8 %
    monkeypatch.setattr("attackroute.tracing.sketches._geometric_mean", more)
    found, edges, critical = copies
    keys = mixed(torch.arange(COPIES))
    for target in edges:
        exact = found.scores(target, critical[target])
        for source, estimate in found.sketched(target, critical[target], keys, range(16)).items():
            assert apart(estimate.scores, exact[source]) > 4.5, (source, target)


def test_expected_overlap_is_what_happens() -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = parts["b"](F.gelu(F.group_norm(parts["a"](x), 4)))
        return parts["head"](parts["c"](F.gelu(F.group_norm(x, 1))))

    layers = {"a": (3, 40, 3), "b": (40, 60, 1), "c": (60, 20, 3)}
    build = using(
        forward, **{name: partial(nn.Conv2d, *sizes) for name, sizes in layers.items()}, head=partial(Head, 20)
    )
    model, images, labels = ready(build, dtype=torch.float32, samples=40, size=8)
    labels = labels % 5
    exact = trace_routes(model, (images, labels), keep_scores=True)
    found = trace_routes(model, (images, labels), config=SKETCHES, keep_scores=True)
    assert found.sketched is not None
    kept = found.masks["parts.b"]
    wrong = kept & ~exact.masks["parts.b"]
    stated, actual = found.sketched.overlap["parts.b"].mean(), 1 - wrong.sum() / kept.sum()
    assert abs(stated - actual) < 0.04
    assert actual < 0.95  # or nothing was tested
    assert found.sketched.undecided("parts.b")[wrong].double().mean() > 0.9


def test_a_mean_of_two_estimates_has_the_error_of_both() -> None:
    first = Estimate(torch.tensor([[1.0, 2]]), torch.tensor([[[3.0, 0]]]))
    second = Estimate(torch.tensor([[3.0, 4]]), torch.tensor([[[4.0, 2]]]))
    mean = Estimate.mean(first, second, torch.tensor([0.5]))
    assert mean.scores.tolist() == [[2, 3]]
    assert mean.errors.tolist() == [[2.5, 1]]
    assert torch.equal(Estimate.mean(first, second, torch.tensor([0.0])).errors, first.errors)


# Whole traces


@pytest.mark.parametrize("name", MIXED)
def test_only_edges_without_a_closed_form_are_sketched(name: str) -> None:
    model, images, labels = ready(MIXED[name])
    exact = trace_routes(model, (images, labels), 0.3, keep_scores=True)
    found = trace_routes(model, (images, labels), 0.3, keep_scores=True, config=SKETCHES)
    assert exact.sketched is None
    renamed = {edge: "sketch" if way == "autograd" else way for edge, way in exact.methods.items()}
    assert found.methods == renamed
    assert found.sketched is not None
    assert set(found.sketched.layers) == {source for (source, _), way in renamed.items() if way == "sketch"}
    assert found.provenance.criterion == "influence, approximate (32 sketches)"
    assert found.provenance.seed == 0


@pytest.mark.parametrize("name", SKETCHED)
def test_routes_of_many_draws_are_the_exact_ones(name: str) -> None:
    build, linear = SKETCHED[name]
    model, images, labels = ready(build, samples=2)
    expected = oracle.trace(model, images, labels, width=0.5, linear=linear)
    config = TraceConfig(sketches=8192, linear=linear)
    found = trace_routes(model, (images, labels), 0.5, keep_scores=True, config=config)
    assert found.sketched is not None
    for layer in reversed(found.layers):
        assert deviation(found.scores[layer], expected.scores[layer]) < 0.08, layer
        if (wrong := found.masks[layer] != expected.masks[layer]).any():
            assert found.sketched.undecided(layer)[wrong].double().mean() > 0.5  # scores that are equal
            break


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
    found = trace_routes(model, (images, labels), keep_scores=True, config=TraceConfig(sketches="auto", seed=5))
    assert found == exact
    assert worst(found, exact) == 0
    assert found.sketched is None
    assert found.provenance == exact.provenance


@pytest.mark.parametrize("sketches", [32, "auto"])
def test_batches_and_order_change_nothing(sketches: int | str) -> None:
    model, images, labels = ready(tokens, dtype=torch.float32, samples=6)
    labels = labels % 5

    def traced(order: Tensor, batch_size: int, seed: int = 1) -> InstanceRoutes:
        data = images[order], labels[order]
        config = TraceConfig(sketches=sketches, linear=True, seed=seed)
        return trace_routes(model, data, 0.4, config=config, batch_size=batch_size, keep_scores=True)

    order = torch.tensor([4, 1, 5, 0, 3, 2])
    together = traced(torch.arange(6), 6)
    apart = traced(order, 1).select(order.argsort())
    assert same_routes(apart, together)
    assert worst(apart, together) < 1e-4
    assert apart.sketched is not None and together.sketched is not None
    for layer in together.sketched.layers:
        assert torch.equal(apart.sketched.draws[layer], together.sketched.draws[layer])
        torch.testing.assert_close(apart.sketched.overlap[layer], together.sketched.overlap[layer], rtol=0, atol=1e-3)
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
    assert found.sketched is not None
    assert (found.sketched.errors["parts.a"][:, 2] == 0).all()


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_small_and_large_derivatives_stay_in_range(factor: float) -> None:
    model, images, labels = ready(dead, dtype=torch.float32)
    before = trace_routes(model, (images, labels), 0.5, config=SKETCHES, keep_scores=True)
    with torch.no_grad():
        model.parts["b"].weight.mul_(factor)
        model.parts["head"].fc.weight.div_(factor)
    after = trace_routes(model, (images, labels), 0.5, config=SKETCHES, keep_scores=True)
    assert deviation(after.scores["parts.a"] / factor, before.scores["parts.a"]) < 1e-3


def test_auto_draws_more_where_the_cut_is_not_clear() -> None:
    model, images, labels = ready(Shuffled)
    found = trace_routes(model, (images, labels), 0.5, config=TraceConfig(sketches="auto"))
    assert found.provenance.criterion == "influence, approximate (auto)"
    notes = found.sketched
    assert notes is not None
    assert (notes.draws["conv6"] == 512).all()  # all scores are equal
    assert notes.undecided("conv6").all()
    for layer in notes.layers:
        assert ((notes.overlap[layer] >= 0.95) | (notes.draws[layer] == 512)).all()
        assert set(notes.draws[layer].tolist()) <= {32, 64, 128, 256, 512}
    assert any((draws == 32).any() for draws in notes.draws.values())


# Notes and files


def test_notes_follow_the_samples_into_files(tmp_path: Path) -> None:
    model, images, labels = ready(Shuffled, samples=4)
    whole = trace_routes(model, (images, labels), config=SKETCHES, keep_scores=True)
    whole.save(tmp_path / "routes.safetensors")
    loaded = InstanceRoutes.load(tmp_path / "routes.safetensors")
    joined = InstanceRoutes.concatenate([whole.select([0, 1]), whole.select([2, 3])])
    assert whole.sketched is not None
    for other in (loaded, joined):
        assert other == whole
        assert other.sketched is not None
        assert other.sketched.layers == whole.sketched.layers
        for layer in whole.sketched.layers:
            for note in ("draws", "overlap", "errors"):
                assert torch.equal(getattr(other.sketched, note)[layer], getattr(whole.sketched, note)[layer])
            assert torch.equal(other.sketched.undecided(layer), whole.sketched.undecided(layer))
    assert "approximate" in repr(loaded)
    assert "approximate" in repr(loaded.aggregate())


def test_exact_and_approximate_routes_are_not_joined() -> None:
    model, images, labels = ready(Shuffled)
    exact, found = (trace_routes(model, (images, labels), config=config) for config in (TraceConfig(), SKETCHES))
    with pytest.raises(UserError, match="trace all parts in the same way"):
        InstanceRoutes.concatenate([exact, found])


# Faults


@pytest.mark.parametrize("sketches", [0, 8, 20, -32, 32.0, True, "many"])
def test_numbers_of_draws_that_cannot_be_used_are_refused(sketches: Any) -> None:
    model, images, labels = ready(Shuffled)
    with pytest.raises(UserError, match="multiple of 8"):
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
