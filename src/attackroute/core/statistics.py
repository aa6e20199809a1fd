"""Statistics of samples: accuracies, means with intervals, the sign test, and how well a number ranks a target.

AUROC is a sum over mid-ranks, and a bootstrap resample is a set of weights: how often each sample is drawn. So all
resamples of all predictors share one sort.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from attackroute.core.batches import BatchStream, count_samples
from attackroute.core.checks import check_logits
from attackroute.core.errors import UserError
from attackroute.core.model_state import frozen
from attackroute.core.table import Record, Table

Floats = NDArray[np.float64]
CLEAR = 0.05
"""Below this probability a difference is called clear; nothing is corrected for the number of comparisons."""

LEVEL = 0.01
"""Two shares, or two AUROCs, that differ by less are called level, however sure the difference is."""

AUROC = "AUROC"

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""

_CHUNK = 1 << 22  # weights at a time
_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Accuracy:
    """A share of correctly classified samples.

    Attributes:
        correct: Samples whose largest logit is that of their label.
        total: Samples in all, at least 1.
    """

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The share in [0, 1]."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval of the share, within [0, 1].

        With p = correct / n: ``(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)``.
        """
        ratio = Z95 * Z95 / self.total
        centre = self.value + ratio / 2
        spread = Z95 * math.sqrt(self.value * (1 - self.value) / self.total + ratio / (4 * self.total))
        return max(0.0, (centre - spread) / (1 + ratio)), min(1.0, (centre + spread) / (1 + ratio))


class BrokenLogits(UserError):
    """A model's logits are NaN."""


def count_correct(
    model: nn.Module,
    data: Dataset[Any],
    *,
    batch_size: int = 256,
    workers: int = 0,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
) -> Accuracy:
    """Classify every sample of a data set, or what an attack makes of it, in eval mode and without gradients.

    The data give pairs of a float image (C, H, W) and an integer label. The model's flags come back as they were.
    """
    samples = count_samples(data, "data set")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")

    def count(images: Tensor, labels: Tensor | None) -> tuple[int, bool]:
        if labels is None:
            raise UserError("the data set must give pairs of an image and a label")
        if attack is not None:
            images = attack(model, images, labels)
        logits = check_logits(model(images), labels, "data set")
        return int((logits.argmax(1) == labels).sum()), bool(logits.isnan().any())

    own, cuda = torch.Generator(), torch.cuda.is_available()
    loader = DataLoader(data, batch_size, num_workers=workers, generator=own, pin_memory=cuda)
    with frozen(model), torch.no_grad():
        counts = list(BatchStream(model, loader, batch_size).map(count))
    if any(broken for _, broken in counts):
        raise BrokenLogits("the model's logits are NaN for some images; check the images and the weights")
    return Accuracy(sum(correct for correct, _ in counts), samples)


@lru_cache(maxsize=100_000)
def sign_test(wins: int, losses: int) -> float:
    """Two-sided probability of a split at least as uneven, if each discordant sample were a fair coin (McNemar, exact).

    Discordant are samples that only the one treatment gets right (wins), or only the other (losses).
    """
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


class Mean(NamedTuple):
    """A mean over samples, NaN without any, and its 95 % interval in the normal approximation, NaN below two."""

    value: float
    low: float
    high: float
    samples: int


class Moments:
    """Running sums of several quantities over samples; values that are NaN are left out."""

    def __init__(self, count: int) -> None:
        self._samples, self._mean, self._squares = torch.zeros(3, count, dtype=torch.float64)

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Those of values ``(quantities, n)``."""
        values = values.detach().to("cpu", torch.float64)
        moments = cls(len(values))
        moments._samples = (~values.isnan()).sum(1).double()
        moments._mean = values.nan_to_num(0).sum(1) / moments._samples.clamp(min=1)
        moments._squares = (values - moments._mean[:, None]).nan_to_num(0).square().sum(1)
        return moments

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
        means = []
        for samples, mean, squares in torch.stack([self._samples, self._mean, self._squares], 1).tolist():
            half = Z95 * math.sqrt(squares / (samples - 1) / samples) if samples > 1 else math.nan
            means.append(Mean(mean if samples else math.nan, mean - half, mean + half, int(samples)))
        return means


def associations(
    predictors: Mapping[str, Floats], events: NDArray[np.bool_], *, resamples: int = 1000, seed: int = 0
) -> Table:
    """How well each predictor tells samples with an event from those without, and how far it is behind the first.

    Predictors are ``(N,)``, without NaN, and so are the events. There is a row for each ``predictor`` with the
    ``statistic``, the AUROC, its ``value`` and its 95 % bootstrap interval (percentiles) ``low`` to ``high``; and
    ``lead``, ``lead_low``, ``lead_high``, the first predictor's less this one's on the same resamples. They are None
    where there are no samples on one side.
    """
    whole = np.ones((1, len(events)))
    values = {name: float(auroc(scores, events, whole)[0]) for name, scores in predictors.items()}
    drawn: dict[str, list[Floats]] = {name: [] for name in predictors}
    for weights in _weights(len(events), resamples, seed):
        for name, scores in predictors.items():
            drawn[name].append(auroc(scores, events, weights))
    spread = {name: np.concatenate(parts) for name, parts in drawn.items()}
    first = next(iter(predictors))
    return Table.of(
        {
            "predictor": name,
            "statistic": AUROC,
            **_estimate("value", "", values[name], spread[name]),
            **_estimate("lead", "lead_", values[first] - values[name], spread[first] - spread[name]),
        }
        for name in predictors
    )


def auroc(scores: Floats, events: NDArray[np.bool_], weights: Floats) -> Floats:
    """Probability ``(B,)`` that a sample with the event has the higher score, ties counting half.

    Scores and events are ``(N,)``, weights ``(B, N)``: how often each sample counts.
    """
    positive = (weights * events).sum(1)
    negative = weights.sum(1) - positive
    below = (mid_ranks(scores, weights) * weights * events).sum(1) - positive**2 / 2
    pairs = positive * negative
    shares: Floats = np.divide(below, pairs, out=np.full_like(below, np.nan), where=pairs > 0)
    return shares


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


def _estimate(name: str, prefix: str, value: float, spread: Floats) -> Record:
    """A statistic with both ends of its interval; None where it, or every resample's, is not defined."""
    defined = spread[~np.isnan(spread)]
    if np.isnan(value) or not len(defined):
        return dict.fromkeys((name, f"{prefix}low", f"{prefix}high"))
    low, high = np.percentile(defined, _INTERVAL)
    return {name: value, f"{prefix}low": float(low), f"{prefix}high": float(high)}
