"""Intervals, tests and rank statistics of paired measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Mean:
    """A mean over samples.

    Attributes:
        value: The mean; NaN without samples.
        half_width: Half of its 95 % interval, in the normal approximation; NaN below two samples.
        samples: How many there are.
    """

    value: float
    half_width: float
    samples: int

    @property
    def interval(self) -> tuple[float, float]:
        """The approximate 95 % interval."""
        return self.value - self.half_width, self.value + self.half_width


class Moments:
    """Running sums of several quantities over samples; values that are NaN are left out.

    Args:
        count: Number of quantities.
    """

    def __init__(self, count: int) -> None:
        self._samples, self._mean, self._squares = torch.zeros(3, count, dtype=torch.float64)

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Those of values ``(quantities, n)``."""
        values = values.detach().to("cpu", torch.float64)
        known = ~values.isnan()
        found = cls(len(values))
        found._samples = known.sum(1).double()
        found._mean = values.nan_to_num(0).sum(1) / found._samples.clamp(min=1)
        found._squares = (values - found._mean[:, None]).nan_to_num(0).square().sum(1)
        return found

    def add(self, other: Moments) -> None:
        """Add other samples (Chan's parallel update, so that nothing cancels)."""
        total = self._samples + other._samples
        apart = other._mean - self._mean
        weight = other._samples / total.clamp(min=1)
        self._squares += other._squares + apart.square() * self._samples * weight
        self._mean += apart * weight
        self._samples = total

    def means(self) -> list[Mean]:
        """One mean for each quantity."""
        found = []
        for samples, mean, squares in zip(
            self._samples.tolist(), self._mean.tolist(), self._squares.tolist(), strict=True
        ):
            half = _Z95 * math.sqrt(squares / (samples - 1) / samples) if samples > 1 else math.nan
            found.append(Mean(mean if samples else math.nan, half, int(samples)))
        return found


CLEAR = 0.05
"""Below this probability a difference is called clear; nothing is corrected for the number of comparisons."""


@lru_cache(maxsize=100_000)
def sign_test(wins: int, losses: int) -> float:
    """Two-sided probability of a split at least as uneven, if each discordant sample were a fair coin (McNemar, exact).

    Args:
        wins: Samples that only the one treatment gets right.
        losses: Samples that only the other gets right.
    """
    total, fewer = wins + losses, min(wins, losses)
    logs = (
        math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1) - total * math.log(2)
        for count in range(fewer + 1)
    )
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


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
