"""Scores of one batch whose edges without a closed form are estimated by sketches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attackroute.core.random import image_keys
from attackroute.routes.masks import top_k
from attackroute.tracing.config import AUTO, FIRST_SKETCHES
from attackroute.tracing.segments import Segments
from attackroute.tracing.sketches import CLEAR_OVERLAP, MOST_SKETCHES, Cut, Estimate


@dataclass(frozen=True, eq=False)
class Ranked:
    """A layer whose critical channels are known.

    Attributes:
        scores: ``(n, C)``.
        mask: Its critical channels, bool ``(n, C)``.
        draws: Draws behind each sample's scores, int32 ``(n,)``; None where no edge was sketched.
        cut: How certain the mask is; None where no edge was sketched.
    """

    scores: Tensor
    mask: Tensor
    draws: Tensor | None = None
    cut: Cut | None = None


class OpenEdges(Protocol):
    """The computation of a batch's edges without a closed form."""

    def rank(self, name: str, partial: Tensor) -> Ranked:
        """Rank a layer all of whose targets have been followed; ``partial`` ``(n, C)`` is the other edges' share."""

    def follow(self, target: str, critical: Tensor) -> None:
        """Take note of a target's critical neurons, bool ``(n, C)``, for all its sources."""


class ExactProducts:
    """Exact vector-Jacobian products.

    Args:
        segments: The batch's graph between layers.
        width: Share of each layer's channels that is critical.
    """

    def __init__(self, segments: Segments, width: float) -> None:
        self._segments = segments
        self._width = width
        self._scores: dict[str, Tensor] = {}

    def rank(self, name: str, partial: Tensor) -> Ranked:
        """See :class:`OpenEdges`."""
        scores = partial + self._scores.pop(name) if name in self._scores else partial
        return Ranked(scores, top_k(scores, self._width))

    def follow(self, target: str, critical: Tensor) -> None:
        """See :class:`OpenEdges`."""
        for source, score in self._segments.scores(target, critical).items():
            self._scores[source] = score + self._scores[source] if source in self._scores else score


class SketchedProducts:
    """Ranks the layers of a batch from the last to the first, drawing as it goes.

    Args:
        segments: The batch's graph between layers, with the edges that are to be sketched.
        images: ``(n, ...)``: each image has random numbers of its own.
        sketches: Number of draws, or ``"auto"``.
        seed: Another seed, other draws.
        width: Share of each layer's channels that is critical.
    """

    def __init__(self, segments: Segments, images: Tensor, sketches: int | str, seed: int, width: float) -> None:
        self._segments = segments
        self._keys = image_keys(images, seed, "sketches")
        self._first = FIRST_SKETCHES if sketches == AUTO else int(sketches)
        self._most = MOST_SKETCHES if sketches == AUTO else self._first
        self._width = width
        self._critical: dict[str, Tensor] = {}
        self._estimates: dict[str, dict[str, Estimate]] = {}

    def follow(self, target: str, critical: Tensor) -> None:
        """Take the first draws of a target's critical channels, for all its sources."""
        self._critical[target] = critical
        drawn = self._segments.sketched(target, critical, self._keys, range(self._first))
        for source, estimate in drawn.items():
            self._estimates.setdefault(source, {})[target] = estimate

    def rank(self, name: str, partial: Tensor) -> Ranked:
        """Rank a layer all of whose targets have been followed; ``partial`` ``(n, C)`` is the other edges' share."""
        targets = self._estimates.pop(name, None)
        if targets is None:
            return Ranked(partial, top_k(partial, self._width))
        exact = Estimate(partial, partial.new_zeros(0, *partial.shape))
        estimate = Estimate.sum([exact, *targets.values()])
        done = self._first
        draws = torch.full((len(partial),), done, dtype=torch.int32, device=partial.device)
        while True:
            mask = top_k(estimate.scores, self._width)
            cut = Cut.of(estimate, mask, self._width)
            unclear = (cut.overlap < CLEAR_OVERLAP) & (draws == done)
            if done >= self._most or not unclear.any():
                return Ranked(estimate.scores, mask, draws, cut)
            # samples whose cut is unclear double their draws, so old and new weigh alike; others keep theirs
            more = [self._drawn(target, name, range(done, 2 * done)) for target in targets]
            estimate = Estimate.mean(estimate, Estimate.sum([exact, *more]), unclear / 2)
            done *= 2
            draws[unclear] = done

    def _drawn(self, target: str, source: str, draws: range) -> Estimate:
        return self._segments.sketched(target, self._critical[target], self._keys, draws, [source])[source]
