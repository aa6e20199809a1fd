"""The difference between two ways to train or to choose, on the same images of the same networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attackroute.analysis.intervention_table import BEATS, LOSES, UNDECIDED
from attackroute.core.statistics import Z95


@dataclass(frozen=True)
class PairedDifference:
    """How much more accurate one of two is, with two 95 % intervals.

    Attributes:
        value: Mean over seeds and images, in [-1, 1].
        over_images: For other images and these very networks: the normal interval of the images' mean differences;
            -1 to 1 where a network has a single image, which says nothing about others.
        over_seeds: For other networks: Student's interval of the networks' differences, on the same images or on those
            of each; None with a single network.
    """

    value: float
    over_images: tuple[float, float]
    over_seeds: tuple[float, float] | None

    @classmethod
    def of(cls, first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]]) -> PairedDifference:
        """Compare two.

        Args:
            first: For each seed, whether each image was classified correctly.
            second: The same of the other, for the same seeds and images in the same order.
        """
        gains = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
        images = gains.shape[1]
        value = float(gains.mean())
        spread = Z95 * _deviation(gains.mean(0)) / math.sqrt(images)
        return cls(value, _over_images(value, spread, images), _over_seeds(gains.mean(1)))

    @classmethod
    def across(cls, gains: Sequence[np.ndarray[Any, np.dtype[np.float64]]]) -> PairedDifference:
        """The mean over networks that were measured on images of their own.

        Args:
            gains: For each network, the difference of the two on each of its images.
        """
        means = np.asarray([each.mean() for each in gains])
        errors = [_deviation(each) ** 2 / len(each) for each in gains]
        value, spread = float(means.mean()), Z95 * math.sqrt(sum(errors)) / len(gains)
        return cls(value, _over_images(value, spread, min(map(len, gains))), _over_seeds(means))

    @property
    def verdict(self) -> str:
        """``"beats"`` or ``"loses to"`` where both intervals leave out zero on the same side."""
        intervals = (self.over_images, self.over_seeds)
        if all(interval is not None and interval[0] > 0 for interval in intervals):
            return BEATS
        if all(interval is not None and interval[1] < 0 for interval in intervals):
            return LOSES
        return UNDECIDED

    def text(self, over: str = "seeds") -> str:
        """In percentage points, with its intervals, the second of which is called ``over``."""
        intervals = ", ".join(
            f"{what} {100 * ends[0]:+.1f} to {100 * ends[1]:+.1f}"
            for what, ends in (("images", self.over_images), (over, self.over_seeds))
            if ends is not None
        )
        return f"{100 * self.value:+.1f} ({intervals})"

    def __str__(self) -> str:
        return self.text()

    def to_json(self, over: str) -> dict[str, Any]:
        """As plain values; the second interval under the name ``over``."""
        return {
            "difference": self.value,
            "over_images": list(self.over_images),
            over: None if self.over_seeds is None else list(self.over_seeds),
            "verdict": self.verdict,
        }


def _over_images(value: float, spread: float, images: int) -> tuple[float, float]:
    """The normal interval; all that a difference can be where a single image leaves its spread unknown."""
    return (value - spread, value + spread) if images > 1 else (-1.0, 1.0)


def _over_seeds(means: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float] | None:
    """Student's interval of the seeds' means; None for a single one."""
    from scipy.stats import t

    seeds = len(means)
    if seeds == 1:
        return None
    value, spread = float(means.mean()), float(t.ppf(0.975, seeds - 1)) * _deviation(means) / math.sqrt(seeds)
    return value - spread, value + spread


def _deviation(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
