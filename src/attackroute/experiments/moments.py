"""Means over samples with their intervals, from running sums."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
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
