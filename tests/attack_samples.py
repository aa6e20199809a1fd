"""A small trained network that attacks fool in part, and its images."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

CLASSES = 5


@cache
def images(samples: int = 64, seed: int = 1, size: int = 8) -> tuple[Tensor, Tensor]:
    """Five faint patterns in noise, with values in [0, 1]."""
    source = torch.Generator().manual_seed(0)
    patterns = torch.randn(CLASSES, 3, size, size, generator=source)
    source.manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=source)
    noise = torch.randn(samples, 3, size, size, generator=source)
    return (0.5 + 0.08 * patterns[labels] + 0.2 * noise).clamp(0, 1), labels


def untrained(classes: int = CLASSES) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Dropout(0.1),
            nn.Flatten(), nn.Linear(256, classes),
        )  # fmt: skip


@cache
def _weights() -> dict[str, Tensor]:
    model = untrained()
    x, y = images(512, seed=2)
    parameters = list(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for rows in torch.arange(len(x)).repeat(6).split(64):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.data -= 0.1 * gradient
    return {name: value.detach() for name, value in model.state_dict().items()}


def network() -> nn.Sequential:
    """The trained network, in eval mode; a new one at each call."""
    model = untrained()
    model.load_state_dict(_weights())
    return model.eval()


def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) == y
