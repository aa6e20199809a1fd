"""Gaussian noise, the paper's perturbation that knows nothing of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attackroute.core.checks import check_attackable
from attackroute.core.errors import UserError
from attackroute.core.random import image_keys, normals
from attackroute.robustness.attack import Perturbation


@dataclass(frozen=True)
class GaussianNoise(Perturbation):
    """Independent normal noise on every value, cut off at 0 and 1; for images of any shape.

    Attributes:
        std: The standard deviation, for values in [0, 1]; 0.18 is that of ImageNet-C's middle level.
        seed: Of the noise.
    """

    name: ClassVar[str] = "gaussian-noise"
    std: float = 0.18
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.std, (int, float)) and 0 <= self.std < math.inf):
            raise UserError(f"{self.name}: std {self.std} is not a standard deviation; give a number, 0 or more")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """See :class:`Perturbation`; the model is not used."""
        check_attackable(x, y)
        with torch.inference_mode(False), torch.no_grad():
            keys = image_keys(x, self.seed, self.name, generator)
            noise = normals(keys, x.shape[1:]).to(x.dtype)
            return torch.add(x.detach(), noise, alpha=self.std).clamp_(0, 1)
