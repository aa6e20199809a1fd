"""What a training step minimises: cross entropy on clean images, or on images that are attacked as training goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from attackroute.core.checks import check_logits, checked_batch
from attackroute.core.model_state import placement
from attackroute.robustness.attack import Attack, Perturbation
from attackroute.robustness.registry import as_attack


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's images, and what comes with them."""

    images: Tensor  # (N, C, H, W) on the model's device, augmented
    labels: Tensor  # (N,) on the CPU, so that checking them does not wait for the device
    targets: Tensor  # the labels on the model's device
    draws: torch.Generator  # for what is random in an attack; its own for every step
    autocast: Callable[[], AbstractContextManager[Any]]  # the context in which the model runs


@dataclass(frozen=True, eq=False)
class StepLosses:
    """What a batch costs; only the total has its graph."""

    total: Tensor  # what is to be minimised
    task: Tensor  # the cross entropy
    logits: Tensor  # for the images that the step learnt from
    penalties: Mapping[str, Tensor] = field(default_factory=dict)  # by name, without their factors


class Objective:
    """Cross entropy: plain training, or adversarial training as of Madry et al. (2018) with an attack.

    With an attack, the network learns from the attacked images alone. They are made for the network in eval mode, from
    random numbers that the step's generator decides.
    """

    def __init__(self, attack: Attack | str | None = None) -> None:
        self.attack: Perturbation | None = None if attack is None else as_attack(attack)

    @property
    def settings(self) -> dict[str, Any]:
        """All that must be the same for a run to go on, as plain values."""
        return {"attack": None if self.attack is None else str(self.attack)}

    def start(self, model: nn.Module, data: Dataset[Any], seed: int, state: Mapping[str, Any] | None = None) -> None:
        """Called once, before the first step of a run; one that goes on gives what :meth:`state` gave."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs back, as plain values."""
        return {}

    def save(self, folder: Path) -> None:
        """Write what others read of it into the run's folder: before the first step, and with every checkpoint."""

    def losses(self, model: nn.Module, batch: Batch) -> StepLosses:
        """The losses of one step; the model is in training mode."""
        images = self.attacked(model, batch)
        with batch.autocast():
            output = model(images)
        logits = check_logits(output, batch.labels, "training data")
        task = task_loss(logits, batch.targets)
        return StepLosses(task, task.detach(), logits.detach())

    def attacked(self, model: nn.Module, batch: Batch) -> Tensor:
        """The images that the step learns from."""
        if self.attack is None:
            return batch.images
        with batch.autocast():
            attacked = self.attack(model, batch.images, batch.targets, generator=batch.draws)
        return attacked.detach().to(batch.images)


def samples_of(
    model: nn.Module, data: Dataset[Any], numbers: Sequence[int], what: str = "training data"
) -> tuple[Tensor, Tensor]:
    """Some images of a data set, as the model takes them, and their labels, on the CPU."""
    (batch,) = DataLoader(data, batch_sampler=[list(numbers)], generator=torch.Generator())  # not the global one
    images, labels = checked_batch(batch, what)
    return images.to(*placement(model)), labels


def task_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, averaged over the batch, in float32 or wider."""
    return functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def summed(values: Iterable[Tensor]) -> Tensor:
    """The sum of scalars that may be on several devices."""
    first, *others = values
    return torch.stack([first, *(value.to(first.device) for value in others)]).sum()
