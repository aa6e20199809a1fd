"""What a training step minimises: cross entropy on clean images, or on images that are attacked as training goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from attackroute.core.checks import check_logits
from attackroute.robustness.attack import Perturbation
from attackroute.robustness.registry import parse_attack


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's images, and what comes with them.

    Attributes:
        images: ``(N, C, H, W)`` on the model's device, augmented.
        labels: ``(N,)`` on the CPU, so that checking them does not wait for the device.
        targets: The labels on the model's device.
        draws: For what is random in an attack; its own for every step.
        autocast: The context in which the model runs.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor
    draws: torch.Generator
    autocast: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, eq=False)
class StepLosses:
    """What a batch costs.

    Attributes:
        total: What is to be minimised, with its graph.
        task: The cross entropy, detached.
        logits: For the images that the step learnt from, detached.
        penalties: By name, without their factors, detached.
    """

    total: Tensor
    task: Tensor
    logits: Tensor
    penalties: Mapping[str, Tensor] = field(default_factory=dict)


class Objective:
    """Cross entropy: plain training, or adversarial training as of Madry et al. (2018) with an attack.

    With an attack, the network learns from the attacked images alone. They are made for the network in eval mode, from
    random numbers that the step's generator decides.

    Args:
        attack: An attack, its specification, or None.
    """

    def __init__(self, attack: str | Perturbation | None = None) -> None:
        self.attack = parse_attack(attack) if isinstance(attack, str) else attack

    @property
    def settings(self) -> dict[str, Any]:
        """All that must be the same for a run to go on, as plain values."""
        return {"attack": None if self.attack is None else str(self.attack)}

    def start(self, model: nn.Module, data: Dataset[Any], seed: int) -> None:
        """Called once, before the first step of a new run."""

    def begin_epoch(self, model: nn.Module, data: Dataset[Any], epoch: int) -> None:
        """Called before every epoch, counted from 1."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs back, as plain values."""
        return {}

    def restore(self, model: nn.Module, data: Dataset[Any], state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave, in the place of :meth:`start`."""

    def losses(self, model: nn.Module, batch: Batch) -> StepLosses:
        """The losses of one step; the model is in training mode."""
        images = self.attacked(model, batch)
        with batch.autocast():
            logits = model(images)
        check_logits(logits, batch.labels, "training data")
        task = task_loss(logits, batch.targets)
        return StepLosses(task, task.detach(), logits.detach())

    def attacked(self, model: nn.Module, batch: Batch) -> Tensor:
        """The images that the step learns from."""
        if self.attack is None:
            return batch.images
        with batch.autocast():
            attacked = self.attack(model, batch.images, batch.targets, generator=batch.draws)
        return attacked.detach().to(batch.images)


def backward_in_parts(
    objective: Objective, model: nn.Module, batch: Batch, parts: int, scale: Callable[[Tensor], Tensor]
) -> StepLosses:
    """Add a batch's gradients to those of the parameters, part by part, so that memory is that of one part.

    The losses are means over samples, so that in a network whose samples do not meet (batch norms in eval mode, no
    dropout) the parts' gradients, weighted by size, add up to those of the whole batch, attacks included.

    Args:
        objective: What is minimised.
        model: The network.
        batch: The whole batch.
        parts: In how many parts of nearly equal size it is taken, at most one a sample.
        scale: Applied to every loss before its backward pass.

    Returns:
        The whole batch's losses; ``total`` is detached.
    """
    count = len(batch.images)
    taken, start = [], batch.draws.get_state()
    for images, labels, targets in zip(
        *(values.tensor_split(min(parts, count)) for values in (batch.images, batch.labels, batch.targets)), strict=True
    ):
        batch.draws.set_state(start)  # an attack's random numbers belong to the image, not to its part
        losses = objective.losses(model, replace(batch, images=images, labels=labels, targets=targets))
        share = len(images) / count
        scale(losses.total * share).backward()  # type: ignore[no-untyped-call]
        taken.append((share, losses))

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([share * value.detach() for (share, _), value in zip(taken, values, strict=True)]).sum()

    return StepLosses(
        mean(losses.total for _, losses in taken),
        mean(losses.task for _, losses in taken),
        torch.cat([losses.logits for _, losses in taken]),
        {name: mean(losses.penalties[name] for _, losses in taken) for name in taken[0][1].penalties},
    )


def task_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, averaged over the batch, in float32 or wider."""
    return functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
