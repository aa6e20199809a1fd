"""Area under the ROC curve, from ranks, with its variance (DeLong et al., 1988)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_Z95 = 1.959963984540054


@dataclass(frozen=True, eq=False)
class Separation:
    """How well scores tell positive from negative samples.

    Attributes:
        positive: For each positive sample, the share of negative ones with a lower score, ties counting half.
        negative: For each negative sample, the share of positive ones with a higher score, ties counting half.
    """

    positive: Tensor
    negative: Tensor

    @classmethod
    def of(cls, positive: Tensor, negative: Tensor) -> Separation:
        """The separation of two samples of scores, (m,) and (n,), each at least one, without NaN."""
        positive, negative = positive.double(), negative.double()
        return cls(_below(positive, negative), 1 - _below(negative, positive))

    @property
    def auroc(self) -> float:
        """Probability that a positive sample has the higher score, ties counting half."""
        return float(self.positive.mean())

    @property
    def half_width(self) -> float:
        """Half of the approximate 95 % interval of the area; NaN with fewer than two samples of a kind."""
        return _Z95 * _deviation(self.positive, self.negative)

    def clearly_above(self, other: Separation) -> int:
        """1 if this area is clearly larger than another one of the same samples (|z| > 1.96), -1 if smaller, else 0."""
        deviation = _deviation(self.positive - other.positive, self.negative - other.negative)
        apart = self.auroc - other.auroc
        if not abs(apart) > _Z95 * deviation:  # false for NaN too
            return 0
        return 1 if apart > 0 else -1


def _below(values: Tensor, others: Tensor) -> Tensor:
    ordered = others.sort().values
    lower = torch.searchsorted(ordered, values, right=False)
    upper = torch.searchsorted(ordered, values, right=True)
    return (lower + upper).double() / (2 * len(ordered))


def _deviation(positive: Tensor, negative: Tensor) -> float:
    if min(len(positive), len(negative)) < 2:
        return math.nan
    return math.sqrt(float(positive.var()) / len(positive) + float(negative.var()) / len(negative))
