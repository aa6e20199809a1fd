"""Labelled images in [0, 1]: what a data set is, its batches, and parts of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from attackroute.core.batches import count_samples
from attackroute.core.errors import UserError
from attackroute.core.random import derived_generator, drawn_indices


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


class ImageBatches:
    """Batches of images in a fixed order, checked to be in [0, 1], and the share of time that goes into waiting.

    Args:
        images: The images.
        batch_size: Images in a batch; the last one may be smaller.
        batches: Indices of the images in each batch, where these are not all in their order.
        workers: Processes that read images; 0 reads in this one.

    Attributes:
        batch_size: Images in a batch.
        sampler: Its length tells how many images there are.

    Raises:
        UserError: A batch size below 1, or a negative number of workers.
    """

    def __init__(
        self,
        images: ImageData,
        batch_size: int = 128,
        *,
        batches: Sequence[Sequence[int]] | None = None,
        workers: int = 0,
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise UserError(f"batch_size must be at least 1 and workers at least 0, not {batch_size} and {workers}")
        self.batch_size = batch_size
        self._dataset = images.dataset
        count = len(images)
        in_order = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        self._batches: Sequence[Sequence[int]] = in_order if batches is None else batches
        self._workers = workers
        self.sampler = range(sum(map(len, self._batches)))
        self._started: float | None = None
        self._waited = 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.numbered(range(len(self)))

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def numbered(self, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of these numbers, as processes read them in turns; the others are not read."""
        chosen: list[Any] = [self._batches[number] for number in numbers]
        batches = iter(
            DataLoader(
                self._dataset,
                batch_sampler=chosen,
                num_workers=self._workers if len(chosen) > 1 else 0,
                generator=torch.Generator(),  # the global ones are left alone
                pin_memory=torch.cuda.is_available(),
            )
        )
        self._started, self._waited = time.perf_counter(), 0.0
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - before
            if batch is None:
                return
            images, labels = batch
            check_images(images)
            yield images, labels

    @property
    def reading(self) -> str:
        """How much of the time this process waited for images, for a progress line."""
        if self._started is None:
            return ""
        return f"reading {self._waited / max(time.perf_counter() - self._started, 1e-9):.0%}"


def check_images(images: Tensor) -> None:
    """Check that images, a float tensor of any shape, are fit for a model that normalises its own input.

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


def drawn(data: Dataset[Any], count: int, seed: int) -> Subset[Any]:
    """At most so many samples, drawn without replacement, in the data's order."""
    return Subset(data, drawn_indices(count_samples(data, "data"), count, seed))


def held_out(data: Dataset[Any], share: float, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """Divide a data set at random, to choose epochs by samples that no network learns from.

    Args:
        data: Has a length.
        share: Of the samples to hold out, between 0 and 1.
        seed: Decides which.

    Returns:
        The samples to learn from and those that are held out, each in the data's order.

    Raises:
        UserError: One of the parts would be empty.
    """
    samples = count_samples(data, "training data")
    held = round(share * samples)
    if not 0 < held < samples:
        raise UserError(f"a share of {share:g} of {samples} training images to hold out leaves one part empty")
    order = torch.randperm(samples, generator=derived_generator(seed, "validation", 0))
    learnt, kept = (Subset(data, part.sort().values.tolist()) for part in (order[held:], order[:held]))
    return learnt, kept
