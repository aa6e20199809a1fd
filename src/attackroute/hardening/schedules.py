"""Learning rates as a function of the step alone, so that a resumed run needs no memory of the schedule."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["one-cycle", "cosine"]


_RISE = 0.3  # share of the steps


_START = 1 / 25


_END = _START / 1e4


def learning_rate(schedule: Schedule, peak: float, step: int, total: int) -> float:
    """The learning rate of one optimiser step.

    Args:
        schedule: ``"one-cycle"`` climbs from peak / 25 to the peak within the first 30 % of the steps and falls to
            peak / 250,000, each along half a cosine; ``"cosine"`` falls from the peak along
            ``peak / 2 * (1 + cos(pi * step / total))``.
        peak: The largest learning rate.
        step: Counts from 0 to ``total - 1``.
        total: Steps in the whole run.

    Returns:
        The learning rate. The values are those of PyTorch's ``OneCycleLR`` and ``CosineAnnealingLR``; one-cycle runs
        of one to three steps, which have no room to climb, start at the peak.
    """
    if schedule == "cosine":
        return _half_cosine(peak, 0.0, step / total)
    top = max(_RISE * total - 1, 0.0)
    if step < top:
        return _half_cosine(peak * _START, peak, step / top)
    if total == 1:
        return peak
    return _half_cosine(peak, peak * _END, (step - top) / (total - 1 - top))


def _half_cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) / 2 * (1 + math.cos(math.pi * share))
