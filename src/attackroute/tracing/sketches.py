"""1-stable sketches: Eq. (5) estimated from a few vector-Jacobian products, however many neurons are critical.

A sum of Cauchy numbers ``c_z`` times weights ``a_z`` is Cauchy with scale ``sum of |a_z|``. So with ``c`` over the
elements z of a layer's critical channels, the entry of ``c^T J`` at an element s of a source is Cauchy with scale
``sum over z of |dz/ds|``, which is what Eqs. (1)-(2) add up. From K draws the geometric mean estimates it without bias,

    cos(pi / 2K)^K * (|g_1| * ... * |g_K|)^(1/K)

(P. Li, "Estimators and tail bounds for dimension reduction in l_alpha", SODA 2008), and the sum over s is a score. The
draws are shared by all s, so the errors of a score's parts go together; the standard error comes from leaving out
groups of draws (the jackknife), each time for the whole score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attackroute.routes.masks import kept
from attackroute.tracing.config import SKETCH_GROUPS

MOST_SKETCHES = 512
"""Draws at which ``"auto"`` gives up."""

CLEAR_OVERLAP = 0.95
"""Expected overlap at which ``"auto"`` takes a layer's cut to be clear."""

_UNDECIDED = 2.0  # standard errors


@dataclass(frozen=True, eq=False)
class Estimate:
    """Scores with a description of their errors.

    Attributes:
        scores: ``(n, C)``.
        deviations: ``(r, n, C)``; the variance of any linear combination of a sample's scores is estimated by the
            sum over r of the squares of the same combination of these.
    """

    scores: Tensor
    deviations: Tensor

    @classmethod
    def zero(cls, like: Tensor) -> Estimate:
        """Scores that are zero for certain, shaped like ``like`` ``(n, C)``."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return cls(torch.zeros_like(like, dtype=dtype), like.new_zeros(0, *like.shape, dtype=dtype))

    @classmethod
    def sum(cls, parts: Sequence[Estimate]) -> Estimate:
        """The sum of independent estimates."""
        return cls(
            sum((estimate.scores for estimate in parts[1:]), parts[0].scores), torch.cat([e.deviations for e in parts])
        )

    @classmethod
    def mean(cls, first: Estimate, second: Estimate, share: Tensor) -> Estimate:
        """A mean of independent estimates of the same scores; ``share`` ``(n,)`` is the second one's weight."""
        weight = share[:, None]
        return cls(
            torch.where(weight > 0, first.scores + weight * (second.scores - first.scores), first.scores),
            torch.cat([(1 - weight) * first.deviations, weight * second.deviations]),
        )

    @property
    def errors(self) -> Tensor:
        """Standard error of every score, ``(n, C)``."""
        return self.deviations.square().sum(0).sqrt()


class ScaleSums:
    """Collects the draws of one gradient, group by group, and sums the scales of its elements over positions.

    Args:
        draws: Number of draws K in all.
        reduce: ``(n, ...)`` shaped like the gradient of one draw -> ``(n, C)``.
    """

    def __init__(self, draws: int, reduce: Callable[[Tensor], Tensor]) -> None:
        self._draws = draws
        self._reduce = reduce
        self._groups: list[Tensor] = []
        self._taken = 0

    def add(self, gradients: Tensor) -> None:
        """Add the next draws, ``(k, n, ...)``, all of one group."""
        logs = gradients.to(torch.promote_types(gradients.dtype, torch.float32)).abs().log_().sum(0)
        if self._taken % (self._draws // SKETCH_GROUPS) == 0:
            self._groups.append(logs)
        else:
            self._groups[-1] += logs
        self._taken += len(gradients)

    def estimate(self) -> Estimate:
        """The scores from all draws. A gradient that is zero in every draw counts zero."""
        total = sum(self._groups[1:], self._groups[0].clone())
        scores = self._reduce(_geometric_mean(total, self._draws))
        others = self._draws - self._draws // SKETCH_GROUPS
        without = torch.stack(
            [
                self._reduce(_geometric_mean(total - group, others).nan_to_num_(nan=0.0))  # -inf less -inf: zero in all
                for group in self._groups
            ]
        )
        deviations = (without - without.mean(0)).mul_(math.sqrt((SKETCH_GROUPS - 1) / SKETCH_GROUPS))
        return Estimate(scores, deviations)


def groups(draws: range, most: int) -> list[range]:
    """Consecutive parts of ``draws``, none larger than ``most`` or across two groups of the jackknife."""
    size = len(draws) // SKETCH_GROUPS
    step = min(size, max(1, most))
    return [
        range(start, min(start + step, first + size))
        for first in range(draws.start, draws.stop, size)
        for start in range(first, first + size, step)
    ]


def _geometric_mean(logs: Tensor, draws: int) -> Tensor:
    """The estimate of the scale from the sum of ``log |g|`` over the draws."""
    return logs.div(draws).add_(draws * math.log(math.cos(math.pi / (2 * draws)))).exp_()


@dataclass(frozen=True, eq=False)
class Cut:
    """How certain it is which channels of a layer a sample's route keeps, if those of later layers are given.

    Attributes:
        errors: Standard error of each score, ``(n, C)``.
        overlap: Share of the kept channels that exact scores are expected to keep as well, ``(n,)``.
        undecided: Channels within two standard errors of the cut, bool ``(n, C)``.
    """

    errors: Tensor
    overlap: Tensor
    undecided: Tensor

    @classmethod
    def of(cls, estimate: Estimate, mask: Tensor, width: float) -> Cut:
        """The cut between the channels of ``mask``, bool ``(n, C)``, and the others."""
        scores, channels = estimate.scores, estimate.scores.shape[1]
        errors = estimate.errors
        if kept(width, channels) == channels:
            return cls(errors, errors.new_ones(len(errors)), torch.zeros_like(mask))
        last = scores.masked_fill(~mask, math.inf).argmin(1, keepdim=True)
        next_one = scores.masked_fill(mask, -math.inf).argmax(1, keepdim=True)
        edge = (scores.gather(1, last) + scores.gather(1, next_one)) / 2
        index = torch.stack([last, next_one]).expand(2, len(scores), 1)
        moved = sum(estimate.deviations.gather(2, at.expand(len(estimate.deviations), -1, -1)) for at in index) / 2
        spread = (estimate.deviations - moved).square().sum(0).sqrt()  # of a score's distance from the cut
        distance = (scores - edge).abs()
        stays = torch.special.ndtr(torch.where(spread > 0, distance / spread, math.inf))
        overlap = torch.where(mask, stays, 0).sum(1) / mask.sum(1)
        return cls(errors, overlap, (distance < _UNDECIDED * spread) & (spread > 0))
