"""Layers ranked from the last to the first, where some edges have no closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from attackroute.jacobians import Segments
from attackroute.selection import top_k
from attackroute.sketches import Cut


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


class Mixing(Protocol):
    """The computation of a batch's edges without a closed form."""

    def rank(self, name: str, known: Tensor) -> Ranked:
        """Rank a layer all of whose targets have been followed; ``known`` ``(n, C)`` is the other edges' share."""

    def follow(self, target: str, critical: Tensor) -> None:
        """Take note of a target's critical neurons, bool ``(n, C)``, for all its sources."""


class Products:
    """Exact vector-Jacobian products.

    Args:
        segments: The batch's graph between layers.
        width: Share of each layer's channels that is critical.
    """

    def __init__(self, segments: Segments, width: float) -> None:
        self._segments = segments
        self._width = width
        self._scores: dict[str, Tensor] = {}

    def rank(self, name: str, known: Tensor) -> Ranked:
        """See :class:`Mixing`."""
        scores = known + self._scores.pop(name) if name in self._scores else known
        return Ranked(scores, top_k(scores, self._width))

    def follow(self, target: str, critical: Tensor) -> None:
        """See :class:`Mixing`."""
        for source, part in self._segments.scores(target, critical).items():
            self._scores[source] = part + self._scores[source] if source in self._scores else part
