"""Crops and flips against a loop over single samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attackroute.hardening.augmentation import CROP_PADDING, augment, crop, flip

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


@pytest.mark.parametrize(("shape", "padding"), [((6, 3, 5, 7), 4), ((5, 1, 4, 4), 2), ((4, 2, 3, 6), 6)])
def test_crop_equals_the_slow_loop(shape: tuple[int, ...], padding: int) -> None:
    images = torch.rand(shape, generator=generator(0))
    top = torch.randint(0, 2 * padding + 1, (shape[0],), generator=generator(1))
    left = torch.randint(0, 2 * padding + 1, (shape[0],), generator=generator(2))
    wanted = torch.stack([slow_crop(x, int(t), int(k), padding) for x, t, k in zip(images, top, left, strict=True)])
    assert torch.equal(crop(images, top, left, padding), wanted)


def test_crop_by_hand() -> None:
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    middle, corner = torch.tensor([1]), torch.tensor([2])
    assert crop(image, middle, middle, 1).tolist() == [[[[1.0, 2.0], [3.0, 4.0]]]]
    assert crop(image, corner, middle, 1).tolist() == [[[[3.0, 4.0], [0.0, 0.0]]]]
    assert crop(image, middle, torch.tensor([0]), 1).tolist() == [[[[0.0, 1.0], [0.0, 3.0]]]]


def test_flip_equals_the_slow_loop() -> None:
    images = torch.rand(5, 3, 4, 6, generator=generator(0))
    chosen = torch.tensor([True, False, True, True, False])
    wanted = torch.stack([slow_flip(x) if c else x for x, c in zip(images, chosen, strict=True)])
    assert torch.equal(flip(images, chosen), wanted)


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


def test_samples_are_drawn_on_their_own() -> None:
    views = augment(torch.rand(1, 3, 8, 8).expand(64, 3, 8, 8), "crop", generator(0))
    assert len(views.flatten(1).unique(dim=0)) > 32


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
