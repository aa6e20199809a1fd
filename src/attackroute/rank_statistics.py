"""AUROC and Spearman's correlation, with bootstrap intervals, for several predictors of one target.

Both are sums over mid-ranks, and a bootstrap resample is a set of weights: how often each sample is drawn. So all
resamples share one sort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_CHUNK = 1 << 22  # weights at a time
_INTERVAL = (2.5, 97.5)

AUROC, SPEARMAN = "AUROC", "Spearman"


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % bootstrap interval (percentiles).

    Attributes:
        value: None where it is not defined: one side is empty, or all values are equal.
        interval: None where no resample has a value.
    """

    value: float | None
    interval: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """Value and interval."""
        return {"value": self.value, "interval_95": None if self.interval is None else list(self.interval)}

    def __str__(self) -> str:
        if self.value is None or self.interval is None:
            return "not defined"
        return f"{self.value:.3f} ({self.interval[0]:.3f} to {self.interval[1]:.3f})"


@dataclass(frozen=True)
class Association:
    """How well a predictor ranks a target.

    Attributes:
        predictor: Its name.
        statistic: ``"AUROC"`` or ``"Spearman"``.
        estimate: The statistic.
        lead: The first predictor's statistic less this one's, on the same resamples.
    """

    predictor: str
    statistic: str
    estimate: Estimate
    lead: Estimate


def associations(
    predictors: Mapping[str, Floats],
    target: NDArray[Any],
    statistic: str,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Association]:
    """Judge predictors of a target, each beside the first.

    Args:
        predictors: Values ``(N,)`` by name, without NaN; infinities are allowed.
        target: ``(N,)``, bool for the AUROC; real, without NaN, for Spearman's correlation.
        statistic: ``"AUROC"`` or ``"Spearman"``.
        resamples: Number of bootstrap resamples.
        seed: Of the resamples; every predictor and statistic sees the same ones.
    """
    compute: Callable[[Floats, NDArray[Any], Floats], Floats]
    compute = auroc if statistic == AUROC else spearman
    whole = np.ones((1, len(target)))
    values = {name: float(compute(scores, target, whole)[0]) for name, scores in predictors.items()}
    drawn: dict[str, list[Floats]] = {name: [] for name in predictors}
    for weights in _weights(len(target), resamples, seed):
        for name, scores in predictors.items():
            drawn[name].append(compute(scores, target, weights))
    spread = {name: np.concatenate(parts) for name, parts in drawn.items()}
    first = next(iter(predictors))
    return [
        Association(
            name,
            statistic,
            _estimate(values[name], spread[name]),
            _estimate(values[first] - values[name], spread[first] - spread[name]),
        )
        for name in predictors
    ]


def auroc(scores: Floats, events: NDArray[np.bool_], weights: Floats) -> Floats:
    """Probability that a sample with the event has the higher score, ties counting half.

    Args:
        scores: ``(N,)``.
        events: ``(N,)`` bool.
        weights: ``(B, N)``, how often each sample counts.

    Returns:
        ``(B,)``; NaN where no sample, or every one, has the event.
    """
    positive = (weights * events).sum(1)
    negative = weights.sum(1) - positive
    below = (mid_ranks(scores, weights) * weights * events).sum(1) - positive**2 / 2
    return _quotient(below, positive * negative)


def spearman(scores: Floats, target: Floats, weights: Floats) -> Floats:
    """Pearson's correlation of the mid-ranks, ``(B,)``; NaN where one of them is constant. Arguments as for `auroc`."""
    left, right = (_centred(mid_ranks(values, weights), weights) for values in (scores, target))
    products = [(weights * one * two).sum(1) for one, two in ((left, right), (left, left), (right, right))]
    return _quotient(products[0], np.sqrt(products[1] * products[2]))


def mid_ranks(values: Floats, weights: Floats) -> Floats:
    """For each sample the weight of those below it and half of that of its equals, itself included: ``(B, N)``."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    sums = np.add.reduceat(weights[:, order], np.flatnonzero(first), axis=1)
    ranks = np.empty_like(weights)
    ranks[:, order] = (np.cumsum(sums, axis=1) - sums / 2)[:, np.cumsum(first) - 1]
    return ranks


def _weights(samples: int, resamples: int, seed: int) -> Iterator[Floats]:
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // samples)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        draws = generator.integers(0, samples, (count, samples))
        draws += np.arange(count)[:, None] * samples
        yield np.bincount(draws.ravel(), minlength=count * samples).reshape(count, samples).astype(np.float64)


def _centred(ranks: Floats, weights: Floats) -> Floats:
    means: Floats = (weights * ranks).sum(1) / weights.sum(1)
    return ranks - means[:, None]


def _quotient(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


def _estimate(value: float, spread: Floats) -> Estimate:
    known = spread[~np.isnan(spread)]
    if np.isnan(value) or not len(known):
        return Estimate(None, None)
    low, high = np.percentile(known, _INTERVAL)
    return Estimate(value, (float(low), float(high)))


def best(found: Sequence[Association]) -> Association | None:
    """The association with the largest value, the first of equals; None where no value is defined."""
    known = [item for item in found if item.estimate.value is not None]
    return max(known, key=lambda item: item.estimate.value or 0.0) if known else None
