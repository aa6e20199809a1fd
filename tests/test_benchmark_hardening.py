"""What the benchmark measures of hardening is what it says."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch.nn import functional

from attackroute.analysis.criteria import rank_channels
from attackroute.zoo.networks import build_model
from benchmarks.cases import Plan
from benchmarks.hardening import (
    GRADIENT,
    LIMITS,
    PAT_GRADIENT,
    PLAIN,
    STEP_NAMES,
    WEIGHT,
    measure_hardening,
    training_steps,
)
from benchmarks.memory import measured
from benchmarks.timing import Spread


def test_steps_differ_by_their_penalty_alone() -> None:
    weights = {}
    for name in (PLAIN, GRADIENT, WEIGHT):
        torch.manual_seed(0)
        model = build_model("vgg_small", width=0.2, num_classes=3).train()
        images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
        start = torch.cat([value.detach().flatten() for value in model.parameters()])
        training_steps(model, images, labels, rank_channels(model, images, "kernel"))[name]()
        weights[name] = torch.cat([value.detach().flatten() for value in model.parameters()]) - start
    punished = {name: weights[name] - weights[PLAIN] for name in (GRADIENT, WEIGHT)}
    assert all(float(change.norm()) > 0 for change in punished.values())
    assert functional.cosine_similarity(punished[GRADIENT], punished[WEIGHT], dim=0).abs() < 0.95


@pytest.mark.slow
def test_the_report_has_every_ratio() -> None:
    jobs = []

    def probe(module: str, job: Mapping[str, object], case: str) -> tuple[int, int]:
        jobs.append((module, job, case))
        return 100, 100 * (1 + len(jobs))

    plan = Plan(repeats=1, batch_size=2)
    turns: list[None] = []
    measurements = measure_hardening(plan, lambda: turns.append(None), probe)
    assert len(turns) == plan.turns + 1 + len(STEP_NAMES) * plan.memory_repeats
    assert tuple(job["step"] for _, job, _ in jobs) == STEP_NAMES
    costs = {each.quantity: each for each in measurements}
    assert costs[f"memory: {PAT_GRADIENT} / PAT"].spread.median == pytest.approx(600 / 500)
    assert costs[f"memory: {GRADIENT} / plain"].spread.median == pytest.approx(300 / 200)
    assert costs[f"{PLAIN}, beyond libraries and weights"].spread.values == (100,)
    for name, limit in LIMITS.items():
        ratio = costs[f"time: {name} / plain"]
        assert ratio.spread == Spread((costs[name].spread.median / costs[PLAIN].spread.median,))
        assert ratio.bound == f"at most {limit:.2f}"


@pytest.mark.slow
def test_the_peak_of_a_step_grows_with_the_batch() -> None:
    job = {"step": GRADIENT, "threads": 1, "device": "cpu", "seed": 0}
    few, many = (measured("benchmarks.hardening", {**job, "batch_size": size}, "hardening") for size in (2, 24))
    assert few[1] >= few[0] > 0
    assert many[1] - many[0] > few[1] - few[0] + 10e6
