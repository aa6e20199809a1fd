"""Attacks applied to a batch, with checks on what they return."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from attackroute.core.checks import checked_logits
from attackroute.core.errors import UserError
from attackroute.core.model_state import explained, frozen
from attackroute.robustness.contract import Perturbation

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``(model, images, labels) -> images``, as everything in :mod:`attackroute.attacks`."""


def attacked(model: nn.Module, attack: Attack, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """A batch after the attack, and the labels that it was attacked for.

    Args:
        model: A model in eval mode; whatever the attack does to it is undone.
        attack: The attack.
        images: ``(n, ...)``; they stay as they are.
        labels: ``(n,)``; None for the model's predictions on the images.

    Raises:
        UserError: The attack does not return finite images of the same shape, or the model no logits.
    """
    if labels is None:
        with torch.no_grad(), explained(images):
            labels = checked_logits(model(images.clone()), images.shape[0]).argmax(1)
    with frozen(model):
        changed = attack(model, images.clone(), labels)
    if not isinstance(changed, Tensor) or changed.shape != images.shape:
        found = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        raise UserError(f"the attack returns {found} for images of shape {tuple(images.shape)}")
    if not torch.isfinite(changed).all():
        raise UserError("the attack returns NaN or inf")
    return changed.detach().to(images), labels


def attack_name(attack: Attack) -> str:
    """What a route's provenance calls the attack."""
    return str(attack) if isinstance(attack, Perturbation) else getattr(attack, "__name__", type(attack).__name__)
