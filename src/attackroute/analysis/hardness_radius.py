"""The smallest eps at which PGD fools a model on each sample, by bisection of all samples at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError
from attackroute.robustness.attack import check_count, check_eps
from attackroute.robustness.gradient_attacks import attacking, input_gradient, predicted

_REACH = 2.5  # the steps together go 2.5 times as far as the ball's radius, as Madry et al. (2018) have it


@dataclass(frozen=True)
class EpsSearch:
    """Bisection over the radius of the L-infinity ball.

    Each trial is PGD from the image itself, without restarts, with steps of ``2.5 eps / steps``. What is found is the
    smallest radius *at which this attack fools the model*, an upper bound of the distance to the decision boundary.

    Attributes:
        largest: Radius above which no sample is searched.
        tolerance: An eps found is one that fools the model, at most this much above one that does not.
        steps: Steps of PGD in each trial.
    """

    largest: float = 16 / 255
    tolerance: float = 0.1 / 255
    steps: int = 10

    def __post_init__(self) -> None:
        check_eps(self.largest)
        check_count("steps", self.steps)
        if not 0 < self.tolerance <= self.largest:
            raise UserError(f"tolerance {self.tolerance} is outside (0, {self.largest:g}]: 0.1/255 is a good one")

    @property
    def rounds(self) -> int:
        """Trials after the one at the largest radius."""
        return math.ceil(math.log2(self.largest / self.tolerance) - 1e-9)

    @property
    def passes(self) -> int:
        """Forward passes for each sample, all but one a trial with a backward pass."""
        return (self.rounds + 1) * (self.steps + 1)

    def smallest_eps(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The smallest eps for each sample, float64 ``(n,)`` on the CPU; infinity where the largest does not fool.

        Args:
            model: Maps images in [0, 1] to logits.
            images: ``(n, C, H, W)`` in [0, 1], which the model classifies correctly.
            labels: ``(n,)``.

        Raises:
            UserError: An image is not in [0, 1], or the model's gradient is not finite.
        """
        with attacking(model, images, labels) as (x, y):
            high = torch.full((len(x),), self.largest, dtype=torch.float64)
            found = self._fooled(model, x, y, high)
            result = torch.full_like(high, math.inf)
            if found.any():
                result[found] = self._bisected(model, x[found.to(x.device)], y[found.to(y.device)], high[found])
            return result

    def _bisected(self, model: nn.Module, x: Tensor, y: Tensor, high: Tensor) -> Tensor:
        low = torch.zeros_like(high)
        for _ in range(self.rounds):
            middle = (low + high) / 2
            fooled = self._fooled(model, x, y, middle)
            high, low = torch.where(fooled, middle, high), torch.where(fooled, low, middle)
        return high

    def _fooled(self, model: nn.Module, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        """Whether PGD within each sample's own radius fools the model, bool ``(n,)`` on the CPU."""
        radius = eps.to(x.dtype).to(x.device).reshape(-1, *[1] * (x.ndim - 1))
        lowest, highest = (x - radius).clamp_(min=0), (x + radius).clamp_(max=1)
        step = radius * (_REACH / self.steps)
        current = x.clone()
        for _ in range(self.steps):
            current = (current + step * input_gradient(model, current, y).sign()).clamp_(lowest, highest)
        return (predicted(model, current) != y).cpu()
