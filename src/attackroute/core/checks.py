"""Checks of what users pass in and models give back: images, labels, logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attackroute.core.errors import UserError

_NAMES = (("image", "images", "pixel_values", "x", "input", "inputs"), ("label", "labels", "target", "targets", "y"))
"""What mappings call images and labels."""
_TOLERANCE = 1e-4  # of a value in [0, 1]
ONE_LOGIT = (
    "for a single logit z return torch.stack([torch.zeros_like(z), z], 1), of the same probabilities as its sigmoid"
)
_SUMS = 1e-5  # how far rounding may take a sum of float32 probabilities from 1


def images_and_labels(batch: Any) -> tuple[Any, Any]:
    """The first two things in a batch, or those that a mapping names so; None for what is not there."""
    if isinstance(batch, Mapping):
        images, labels = (next((batch[name] for name in names if name in batch), None) for names in _NAMES)
    else:
        items = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        images, labels = (*items, None, None)[:2]
    images, labels = (torch.as_tensor(item) if isinstance(item, np.ndarray) else item for item in (images, labels))
    return images, labels


def checked_batch(batch: Any, what: str) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch, which must be floating (N, C, H, W) and integers (N,)."""
    images, labels = images_and_labels(batch)
    if not (isinstance(images, Tensor) and isinstance(labels, Tensor)):
        raise UserError(f"the {what} must give pairs of an image tensor and an integer label")
    if images.ndim != 4 or not images.is_floating_point():
        raise UserError(
            f"the {what} gives images of shape {tuple(images.shape[1:])} and type {images.dtype}; "
            "floating tensors (channels, height, width) are needed"
        )
    return images, checked_labels(labels, None, len(images))


def check_attackable(x: Tensor, y: Tensor) -> None:
    """Check a batch that is to be perturbed: images in [0, 1] with one integer label each."""
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point():
        what = f"shape {tuple(x.shape)} and type {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"images to attack are {what}; floating tensors (N, C, H, W) are needed")
    if not isinstance(y, Tensor):
        raise UserError("an attack needs the labels: pass (images, labels)")
    if len(checked_labels(y, None, len(x))) and int(y.min()) < 0:
        raise UserError(f"label {int(y.min())} is negative; labels count from 0")
    if x.numel():
        low, high = (float(value) for value in x.detach().aminmax())
        if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
            raise UserError(
                f"images to attack have values from {low:.3g} to {high:.3g}; they must be in [0, 1], "
                "with normalisation inside the model"
            )


def checked_logits(output: object, samples: int, *, finite: bool = True) -> Tensor:
    """The model's output as logits ``(n, K)``, or an error that says what it is instead.

    Whether they are ``finite`` cannot be told without waiting for the device.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise UserError(
            f"the model returns {type(output).__name__}, not logits of shape (N, classes) nor an object with .logits: "
            "wrap it in a module whose forward returns the logits"
        )
    if logits.ndim != 2 or logits.shape[0] != samples:
        raise UserError(
            f"the model returns a tensor of shape {tuple(logits.shape)} for {samples} images, not logits (N, classes)"
            + (f"; {ONE_LOGIT}" if logits.ndim == 1 else "")
        )
    if finite and not torch.isfinite(logits).all():
        raise UserError("the model's logits are not finite: check its weights and the range of its inputs")
    return logits


def require_no_probabilities(logits: Tensor, what: str = "the model") -> None:
    """Refuse a model's output ``(n, K)`` that is positive and adds up to 1 in every row.

    Probabilities look like logits, but the gradient of a cross entropy that takes a second softmax is another one, and
    vanishes where the first is sure of itself.
    """
    tolerance = max(_SUMS, 4 * torch.finfo(logits.dtype).eps)
    wide = logits.detach().to(torch.float32)
    if logits.shape[1] > 1 and bool(((wide >= 0).all(1) & ((wide.sum(1) - 1).abs() < tolerance)).all()):
        raise UserError(f"{what} returns probabilities, which add up to 1, and not logits: leave out its softmax")


def checked_labels(labels: Tensor, classes: int | None, samples: int, where: str = "") -> Tensor:
    """Labels as int64 ``(n,)`` within ``0 .. classes - 1``; None where that is a loss's own business."""
    if labels.shape != (samples,) or labels.is_floating_point() or labels.is_complex():
        raise UserError(f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; expected {samples} integers")
    wrong = labels[:0] if classes is None else labels[(labels < 0) | (labels >= classes)]
    if classes is not None and len(wrong):
        inside = f"the model's {classes} logits (0 .. {classes - 1})" if classes > 1 else f"the one logit; {ONE_LOGIT}"
        raise UserError(f"label {int(wrong[0])}{where} is outside {inside}")
    return labels.long()


def check_logits(output: object, labels: Tensor, what: str) -> Tensor:
    """The model's output as logits that can be compared with the labels of the data set ``what``.

    NaN passes, so that nothing waits for the model's device where the labels are on the CPU.
    """
    logits = checked_logits(output, len(labels), finite=False)
    checked_labels(labels, logits.shape[1], len(labels), f" in the {what}")
    return logits
