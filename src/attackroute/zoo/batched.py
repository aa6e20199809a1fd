"""Batches of a data set's images in a fixed order, which processes can read in turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from attackroute.core.errors import UserError
from attackroute.zoo.images import ImageData, check_images


class ImageBatches:
    """Batches of images, checked to be in [0, 1], and how much of the time goes into waiting for them.

    Args:
        images: The images.
        batch_size: Images in a batch; the last one may be smaller.
        batches: Indices of the images in each batch, where these are not all in their order.
        workers: Processes that read images; 0 reads in this one.

    Attributes:
        sampler: Its length tells how many images there are.

    Raises:
        UserError: A batch size below 1, or a negative number of workers.
    """

    def __init__(
        self,
        images: ImageData,
        batch_size: int,
        *,
        batches: Sequence[Sequence[int]] | None = None,
        workers: int = 0,
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise UserError(f"batch_size must be at least 1 and workers at least 0, not {batch_size} and {workers}")
        self._dataset = images.dataset
        count = len(images)
        in_order = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        self._batches: Sequence[Sequence[int]] = in_order if batches is None else batches
        self._workers = workers
        self.sampler = range(sum(map(len, self._batches)))
        self._started: float | None = None
        self._waited = 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.turns(0, 1)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def turns(self, start: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every ``step``-th batch from batch ``start`` on; the others are not read."""
        chosen: list[Any] = list(islice(self._batches, start, None, step))
        loader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_sampler=chosen,
            num_workers=self._workers if len(chosen) > 1 else 0,
            generator=torch.Generator(),  # the global ones are left alone
            pin_memory=torch.cuda.is_available(),
        )
        self._started, self._waited = time.perf_counter(), 0.0
        own = iter(loader)
        while True:
            before = time.perf_counter()
            batch = next(own, None)
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
