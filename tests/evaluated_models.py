"""Small models, data and attacks for the tests of evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from architectures import Function
from attackroute.robustness.attack import Perturbation

CLASSES = 4
ATTACKS = ("fgsm:eps=0.1", "pgd:eps=0.1,steps=3", "gaussian-noise:std=0.12")


def small_model(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(216, CLASSES)
        )


def images_and_labels(samples: int = 23, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images, and labels that the first model of :func:`small_model` gets right for the most part."""
    source = torch.Generator().manual_seed(seed)
    images = torch.rand(samples, 1, 8, 8, generator=source)
    with torch.no_grad():
        labels = small_model().eval()(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % CLASSES
    return images, labels


@dataclass(frozen=True)
class Shift(Perturbation):
    """Adds a constant, in the ball or out of it."""

    name: ClassVar[str] = "shift"
    eps: float = 0.1
    by: float = 0.05

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return x + self.by


def noisy(model: nn.Module) -> nn.Module:
    """It draws from the global generator."""
    return Function(lambda parts, x: parts["model"](x + 0.3 * torch.randn_like(x)), model=model)
