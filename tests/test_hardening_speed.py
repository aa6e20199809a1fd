"""What the benchmark measures of hardening is what it says."""

from __future__ import annotations

import torch
from torch.nn import functional

from attackroute.benchmark import Plan
from attackroute.benchmark.hardening_speed import (
    GRADIENT,
    LIMITS,
    PLAIN,
    QUOTIENT,
    WEIGHT,
    deviation,
    measure_hardening,
    training_steps,
)
from attackroute.benchmark.timing import Spread
from attackroute.models import build_model
from attackroute.rivals import rank_channels


def test_steps_differ_by_their_penalty_alone() -> None:
    weights = {}
    for name in (PLAIN, GRADIENT, QUOTIENT, WEIGHT):
        torch.manual_seed(0)
        model = build_model("vgg_small", width=0.2, num_classes=3).train()
        images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
        start = torch.cat([value.detach().flatten() for value in model.parameters()])
        training_steps(model, images, labels, rank_channels(model, images, "random"))[name]()
        weights[name] = torch.cat([value.detach().flatten() for value in model.parameters()]) - start
    punished = {name: weights[name] - weights[PLAIN] for name in (GRADIENT, QUOTIENT, WEIGHT)}
    assert all(float(change.norm()) > 0 for change in punished.values())
    assert functional.cosine_similarity(punished[GRADIENT], punished[QUOTIENT], dim=0) > 0.95
    assert functional.cosine_similarity(punished[GRADIENT], punished[WEIGHT], dim=0).abs() < 0.95


def test_the_deviation_falls_with_eps_in_double_precision() -> None:
    torch.manual_seed(0)
    model = build_model("vgg_small", width=0.2, num_classes=3).double()
    images, labels = torch.rand(4, 3, 32, 32).double(), torch.tensor([0, 1, 2, 0])
    errors = [error for _, error in deviation(model, images, labels, rank_channels(model, images, "random")).values()]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


def test_the_report_has_every_ratio() -> None:
    result = measure_hardening(Plan(repeats=1, batch_size=2), lambda: None)
    found = result.to_json()
    assert set(LIMITS) < set(found["ratios"])
    seconds = found["seconds"]
    for name in LIMITS:
        assert result.ratio(name) == Spread((seconds[name][0] / seconds[PLAIN][0],))
    assert set(found["deviations"]) == {"float32", "float64"}
