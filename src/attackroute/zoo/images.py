"""A labelled set of images, and what every one of them has to keep to."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from attackroute.core.errors import UserError


@dataclass(frozen=True)
class Request:
    """What is wanted from a source of images; see :func:`attackroute.data.load_data` for the meaning of each field."""

    path: Path
    split: str
    image_size: int | None
    samples: int | None
    seed: int
    skip_unreadable: bool

    def choose(self, count: int) -> list[int]:
        """Indices of at most ``samples`` out of ``count`` images, drawn without replacement, in ascending order."""
        if self.samples is None or self.samples >= count:
            return list(range(count))
        generator = torch.Generator().manual_seed(self.seed)
        drawn: list[int] = torch.randperm(count, generator=generator)[: self.samples].sort().values.tolist()
        return drawn


@dataclass(frozen=True)
class ImageData:
    """Labelled images of one size.

    Attributes:
        dataset: Has a length and gives pairs of a float tensor ``shape`` in [0, 1] and an integer label.
        classes: Name of each label.
        shape: (C, H, W) of every image.
        name: Where the images come from: ``cifar10``, ``svhn``, ``imagenet``, ``folder`` or ``mnist-sample``.
        split: ``train`` or ``test``; ``all`` for a folder that is not divided.
        skipped: Paths of image files that cannot be read and were left out.
    """

    dataset: Dataset[tuple[Tensor, int]]
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    name: str
    split: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of images."""
        return len(cast(Sized, self.dataset))


def loader(
    data: ImageData, batch_size: int = 128, *, shuffle: bool = False, num_workers: int = 0, seed: int = 0
) -> DataLoader[Any]:
    """Batches of images (N, C, H, W) and labels (N,).

    Args:
        data: The images.
        batch_size: Images in a batch; the last one may be smaller.
        shuffle: Deliver them in random order, a new one in every pass.
        num_workers: Processes that read images; 0 reads in this one.
        seed: Decides on the orders. The global random generators are left alone.

    Raises:
        UserError: A batch size below 1, or a negative number of workers.
    """
    if batch_size < 1 or num_workers < 0:
        raise UserError(f"batch_size must be at least 1 and num_workers at least 0, not {batch_size} and {num_workers}")
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data.dataset, batch_size, shuffle=shuffle, num_workers=num_workers, generator=generator)


def check_images(images: Tensor) -> None:
    """Check that images are fit for a model that normalises its own input.

    Args:
        images: Float tensor of any shape.

    Raises:
        UserError: NaN, infinity, or a value outside [0, 1].
    """
    if images.numel() == 0:
        return
    low, high = (bound.item() for bound in images.aminmax())  # NaN makes both of them NaN
    if low >= 0 and high <= 1:
        return
    broken = int((~images.isfinite()).sum())
    if broken:
        raise UserError(f"the images hold {broken} values that are NaN or infinite; check the data")
    raise UserError(
        f"the images hold values from {low:.4g} to {high:.4g}; give images in [0, 1], which the model itself normalises"
    )
