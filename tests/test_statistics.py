"""AUROC against pairs counted one by one, scipy, and resamples written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from attackroute.core.statistics import AUROC, associations, auroc, mid_ranks


def pairs(scores: np.ndarray, events: np.ndarray) -> float:
    found = [1.0 if high > low else 0.5 if high == low else 0.0 for high in scores[events] for low in scores[~events]]
    return sum(found) / len(found)


@pytest.fixture
def numbers() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with many ties and infinities, events, and how often each sample is drawn."""
    random = np.random.default_rng(3)
    scores = random.integers(0, 12, 60).astype(float)
    scores[scores == 0] = -np.inf
    drawn = np.stack([np.ones(60), *random.integers(0, 4, (7, 60))])  # the first: as they are
    return scores, random.random(60) < 0.4, drawn


def test_weights_are_repeated_samples(numbers: tuple[np.ndarray, ...]) -> None:
    scores, events, weights = numbers
    assert mid_ranks(scores, weights)[0] + 0.5 == pytest.approx(stats.rankdata(scores))
    for row, weight in enumerate(weights):
        drawn = np.repeat(np.arange(60), weight.astype(int))
        assert auroc(scores, events, weights)[row] == pytest.approx(pairs(scores[drawn], events[drawn]), rel=1e-12)


def test_by_hand() -> None:
    # Events at 3 and 1, others at 2 and 1: of four pairs two are in order and one is tied.
    scores, events = np.array([3.0, 2.0, 1.0, 1.0]), np.array([True, False, True, False])
    assert auroc(scores, events, np.ones((1, 4)))[0] == 0.625
    assert auroc(scores, events, np.array([[1.0, 2.0, 0.0, 1.0]]))[0] == 1.0


def test_what_is_not_defined_is_none() -> None:
    scores = {"ours": np.array([1.0, 2.0, 3.0]), "constant": np.ones(3)}
    for events in (np.zeros(3, bool), np.ones(3, bool)):
        for row in associations(scores, events, resamples=10):
            assert {row.pop("predictor"), row.pop("statistic")} > {AUROC} and set(row.values()) == {None}
    assert associations(scores, np.array([True, False, True]), resamples=50)[1]["value"] == 0.5


def test_intervals_are_those_of_resamples_written_out() -> None:
    random = np.random.default_rng(0)
    events = random.random(80) < 0.5
    scores = {"good": events + random.normal(size=80), "bad": 0.3 * events + random.normal(size=80)}
    good, bad = associations(scores, events, resamples=2000, seed=1)
    own = np.random.default_rng(9)  # other resamples: the percentiles agree within their own noise
    drawn = [own.integers(0, 80, 80) for _ in range(2000)]
    values = {name: np.array([pairs(s[i], events[i]) for i in drawn]) for name, s in scores.items()}
    assert good["value"] == pytest.approx(pairs(scores["good"], events))
    assert (good["low"], good["high"]) == pytest.approx(np.percentile(values["good"], (2.5, 97.5)), abs=0.015)
    assert bad["lead"] == pytest.approx(pairs(scores["good"], events) - pairs(scores["bad"], events))
    assert (bad["lead_low"], bad["lead_high"]) == pytest.approx(
        np.percentile(values["good"] - values["bad"], (2.5, 97.5)), abs=0.02
    )
    assert good["lead"] == good["lead_low"] == good["lead_high"] == 0
    assert associations(scores, events, resamples=100, seed=1) == associations(scores, events, resamples=100, seed=1)


def test_intervals_hold_what_they_promise() -> None:
    random = np.random.default_rng(7)
    truth = stats.norm.cdf(1 / math.sqrt(2))  # P(N(1, 1) > N(0, 1))
    held = 0
    for seed in range(100):
        events = np.arange(120) < 60
        (found,) = associations({"s": events + random.normal(size=120)}, events, resamples=200, seed=seed)
        held += found["low"] <= truth <= found["high"]
    assert held >= 87  # of 100, binomial with p near 0.94
