"""The set of images that an attack may choose from: all within a distance of the clean one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attackroute.core.errors import UserError
from attackroute.robustness.contract import Perturbation, show_eps

_ORDERS = {"linf": math.inf, "l2": 2.0}


_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Ball:
    """Images within a distance of the clean image, and within [0, 1].

    Attributes:
        norm: ``"linf"`` or ``"l2"``.
        eps: The radius, for values in [0, 1].
    """

    norm: str
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in _ORDERS or not (isinstance(self.eps, (int, float)) and self.eps >= 0):
            raise UserError(f"no ball of norm {self.norm!r} and radius {self.eps!r} is known")

    def __str__(self) -> str:
        return f"{self.norm} {show_eps(self.eps) if self.norm == 'linf' else format(self.eps, 'g')}"

    def distances(self, images: Tensor, clean: Tensor) -> Tensor:
        """Distance of each image from its clean one, float64 ``(N,)``."""
        change = (images.double() - clean.double()).flatten(1)
        distances: Tensor = torch.linalg.vector_norm(change, _ORDERS[self.norm], dim=1)
        return distances

    def outside(self, images: Tensor, clean: Tensor) -> Tensor:
        """Which images are out of the ball by more than rounding explains, bool ``(N,)``; NaN is outside."""
        return ~(self.distances(images, clean) <= self.eps + max(1.0, self.eps) * tolerance(images))


def out_of_range(images: Tensor) -> Tensor:
    """Which images have a value outside [0, 1] by more than rounding explains, bool ``(N,)``; NaN is outside."""
    slack = tolerance(images)
    values = images.flatten(1)
    return ~((values >= -slack) & (values <= 1 + slack)).all(1)


def ball_of(attack: Perturbation) -> Ball | None:
    """The ball of an attack; None for what keeps to no ball, as corruptions."""
    eps = getattr(attack, "eps", None)
    if not attack.uses_model or eps is None:
        return None
    return Ball(getattr(attack, "norm", "linf" if attack.in_levels else "l2"), float(eps))


def tolerance(images: Tensor) -> float:
    """What rounding may add to a value in [0, 1]."""
    return max(_TOLERANCE, 2 * torch.finfo(images.dtype).eps)
