"""Crops and flips against a loop over single samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attackroute.hardening.augmentation import CROP_PADDING, augment

SIDE = 2 * CROP_PADDING + 1


def slow_crop(image: Tensor, top: int, left: int, padding: int) -> Tensor:
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for c in range(channels):
        for row in range(height):
            for column in range(width):
                r, k = row + top - padding, column + left - padding
                if 0 <= r < height and 0 <= k < width:
                    out[c, row, column] = image[c, r, k]
    return out


def slow_flip(image: Tensor) -> Tensor:
    return torch.stack([image[:, :, column] for column in reversed(range(image.shape[2]))], dim=2)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(6, 3, 5, 7), (5, 1, 4, 4), (4, 2, 3, 6)])
def test_views_equal_the_slow_loop(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=generator(0))
    source = generator(1)
    top, left = torch.randint(0, SIDE, (2, shape[0]), generator=source).tolist()
    mirrored = torch.randint(0, 2, (shape[0],), generator=source).tolist()
    crops = [slow_crop(x, t, k, CROP_PADDING) for x, t, k in zip(images, top, left, strict=True)]
    views = [slow_flip(x) if flipped else x for x, flipped in zip(crops, mirrored, strict=True)]
    assert torch.equal(augment(images, "crop", generator(1)), torch.stack(crops))
    assert torch.equal(augment(images, "crop-flip", generator(1)), torch.stack(views))


@pytest.mark.parametrize("kind", ["crop", "crop-flip"])
def test_every_view_is_a_crop_and_all_views_are_equally_likely(kind: str) -> None:
    height, width = 10, 12
    image = torch.arange(1.0, height * width + 1).reshape(1, 1, height, width)
    samples = 40 * SIDE * SIDE
    views = augment(image.expand(samples, 1, height, width), kind, generator(3))  # type: ignore[arg-type]
    possible = {}
    for top in range(SIDE):
        for left in range(SIDE):
            view = slow_crop(image[0], top, left, CROP_PADDING)
            possible[tuple(view.flatten().tolist())] = 0
            if kind == "crop-flip":
                possible[tuple(slow_flip(view).flatten().tolist())] = 0
    for view in views:
        possible[tuple(view.flatten().tolist())] += 1  # a KeyError if it is no crop
    assert len(possible) == SIDE * SIDE * (2 if kind == "crop-flip" else 1)
    expected = samples / len(possible)
    chi_square = sum((count - expected) ** 2 / expected for count in possible.values())
    freedom = len(possible) - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_randomness_is_the_generators_alone() -> None:
    images = torch.rand(16, 3, 8, 8)
    before = torch.get_rng_state()
    first = augment(images, "crop-flip", generator(7))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(augment(images, "crop-flip", generator(7)), first)
    assert not torch.equal(augment(images, "crop-flip", generator(8)), first)


def test_none_returns_the_images_and_draws_nothing() -> None:
    images, source = torch.rand(2, 3, 8, 8), generator(0)
    before = source.get_state()
    assert augment(images, "none", source) is images
    assert torch.equal(source.get_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_type_range_and_input_are_kept(dtype: torch.dtype) -> None:
    images = torch.rand(8, 3, 8, 8).to(dtype)
    copy = images.clone()
    views = augment(images, "crop-flip", generator(0))
    assert views.dtype == dtype
    assert views.shape == images.shape
    assert views.min() >= 0
    assert views.max() <= images.max()
    assert torch.equal(images, copy)
