"""Batches of a data set in an order that only the seed and the epoch decide, checked before a model sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from attackroute.errors import UserError

_IMAGE_DIMS = 4


def derived_seed(seed: int, purpose: str, epoch: int) -> int:
    """A 63-bit seed for one purpose in one epoch, unrelated to that of any other purpose, epoch or seed."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def derived_generator(seed: int, purpose: str, epoch: int) -> torch.Generator:
    """A CPU generator that starts from :func:`derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, epoch))


def count_samples(data: Dataset[Any], what: str) -> int:
    """The number of samples of a data set.

    Raises:
        UserError: The data set is empty or has no length.
    """
    if not isinstance(data, Sized):
        raise UserError(f"the {what} has no length; give a data set with __len__ and __getitem__")
    if len(data) == 0:
        raise UserError(f"the {what} is empty; give at least one sample")
    return len(data)


def count_steps(samples: int, batch_size: int) -> int:
    """Batches in an epoch, the smaller last one of :func:`split_evenly` included."""
    return -(-samples // batch_size)


def split_evenly(order: Tensor, batch_size: int) -> list[list[int]]:
    """Split sample indices into batches of at most ``batch_size`` whose sizes differ by no more than one.

    No sample is dropped, and no tiny last batch upsets batch normalisation.
    """
    return [batch.tolist() for batch in order.tensor_split(count_steps(len(order), batch_size))]


def shuffled(samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch: every sample once, in an order drawn from the seed and the epoch alone."""
    order = torch.randperm(samples, generator=derived_generator(seed, "order", epoch))
    return split_evenly(order, batch_size)


def in_order(samples: int, batch_size: int) -> list[list[int]]:
    """Every sample once, in the data set's own order."""
    return [list(range(start, min(start + batch_size, samples))) for start in range(0, samples, batch_size)]


def load(
    data: Dataset[Any],
    batches: Sequence[list[int]],
    *,
    generator: torch.Generator,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """A loader of the given batches that leaves the global random generators alone.

    Workers are started afresh for every pass: a worker that lived on would carry its random state from epoch to
    epoch, and a resumed run could not get it back.
    """
    return DataLoader(data, batch_sampler=batches, num_workers=workers, generator=generator, pin_memory=pin_memory)


def checked(batch: Any, what: str) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch.

    Raises:
        UserError: Not a pair of floating images (N, C, H, W) and integer labels (N,).
    """
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise UserError(f"the {what} must give pairs of an image tensor and an integer label")
    images, labels = batch
    if images.ndim != _IMAGE_DIMS or not images.is_floating_point():
        raise UserError(
            f"the {what} gives images of shape {tuple(images.shape[1:])} and type {images.dtype}; "
            "floating tensors (channels, height, width) are needed"
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"the {what} gives labels of shape {tuple(labels.shape[1:])} and type {labels.dtype}; integers are needed"
        )
    return images, labels.long()


def check_logits(logits: Tensor, labels: Tensor, what: str) -> None:
    """Check that a model's output can be compared with labels.

    Args:
        logits: The model's output, (N, classes).
        labels: (N,), best on the CPU: reading them elsewhere would wait for the device.
        what: Name of the data set for the message.

    Raises:
        UserError: The output is not (N, classes), or a label has no logit.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"the model returns {shape} for {len(labels)} images; one row of logits an image is needed")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= logits.shape[1]:
        wrong = low if low < 0 else high
        raise UserError(
            f"label {wrong} in the {what} is outside the model's {logits.shape[1]} logits "
            f"(0 to {logits.shape[1] - 1}); give the model more classes or other data"
        )


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating type of a model's first floating parameter; CPU and float32 without one."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32
