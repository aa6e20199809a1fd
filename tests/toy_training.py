"""A problem that is learnt in milliseconds, for the tests of training."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from attackroute.hardening.checkpoint import EpochRecord
from attackroute.hardening.settings import TrainSettings
from attackroute.hardening.training import TrainResult, train

SETTINGS_USED = TrainSettings(epochs=3, batch_size=8, lr=0.05, augment="crop-flip", seed=11)


def toy_data(samples: int = 24, seed: int = 0, noise: float = 0.3) -> TensorDataset:
    """Four classes: which quarter of the image is bright."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 4
    images = torch.rand(samples, 3, 8, 8, generator=source) * noise
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 4 * (label // 2), 4 * (label % 2)
        image[:, top : top + 4, left : left + 4] += 1 - noise
    return TensorDataset(images, labels)


def toy_model(seed: int = 0, dropout: float = 0.5) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(96, 4),
        )  # fmt: skip


def toy_network(seed: int = 0, dropout: float = 0.5) -> nn.Sequential:
    """Two layers, with batch norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout),
            nn.Linear(128, 4),
        )  # fmt: skip


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_time(history: tuple[EpochRecord, ...]) -> list[EpochRecord]:
    return [replace(record, seconds=0.0) for record in history]


def trained(settings: TrainSettings = SETTINGS_USED, **options: Any) -> tuple[dict[str, Tensor], TrainResult]:
    model = toy_model()
    result = train(model, toy_data(), toy_data(12, seed=1), settings, **options)
    return weights_of(model), result


def raises(error: BaseException, epoch: int) -> Callable[[EpochRecord], None]:
    def on_epoch(record: EpochRecord) -> None:
        if record.epoch == epoch:
            raise error

    return on_epoch


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_at(calls: int, names: Sequence[str], run: Callable[[], object]) -> bool:
    """Run, and be killed when these functions of ``os`` have been called so often; whether it came to that."""
    countdown = iter(range(calls, -1, -1))

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if next(countdown) == 0:
                raise Killed
            return operation(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            run()
        except Killed:
            return True
    return False
