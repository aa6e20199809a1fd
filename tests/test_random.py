"""Random numbers that belong to an image: their distribution, their independence, and that they never change."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attackroute.core.random import image_keys, normals, uniforms

stats = pytest.importorskip("scipy.stats")
KEYS = torch.arange(1000, 1200)  # neighbours
MASK = 2**64 - 1


def mixed(value: int) -> int:
    """The finaliser of SplitMix64 as published, in Python's integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def test_the_hash_is_the_published_one():
    # The first outputs of SplitMix64 from the seed 1234567, as its authors' program prints them, are
    # 6457827717110365317 and 3203168211198807973.
    gamma = 0x9E3779B97F4A7C15
    assert [mixed((1234567 + step * gamma) & MASK) for step in (1, 2)] == [6457827717110365317, 3203168211198807973]
    expected = [
        [(mixed(mixed((key + place * gamma) & MASK)) >> 40) / 2**24 for place in (1, 2, 3)]
        for key in (0, 1, 2**63 - 1, 2**64 - 5)
    ]
    found = uniforms(torch.tensor([0, 1, 2**63 - 1, -5]), (3,))
    assert found.tolist() == expected


def test_numbers_stay_as_they_are():
    """Reports that were made with one version are to be made again with the next."""
    image = torch.arange(12).view(1, 3, 2, 2) / 16
    keys = image_keys(image, 7, "pgd 0")
    assert keys.tolist() == [-7530925458859907394]
    assert uniforms(keys, (3,)).tolist() == [[0.23295313119888306, 0.7599130868911743, 0.7254316210746765]]
    torch.testing.assert_close(normals(keys, (3,)), torch.tensor([[0.725472, 1.687107, 1.442386]]), atol=1e-5, rtol=0)


def test_uniform_numbers():
    numbers = uniforms(KEYS, (10, 20))
    assert (numbers.shape, numbers.dtype) == ((200, 10, 20), torch.float32)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers.flatten(), "uniform").pvalue > 1e-3
    for row in (numbers[0], numbers[57], numbers[:, 3, 3]):
        assert stats.kstest(row.flatten(), "uniform").pvalue > 1e-4


def test_normal_numbers():
    numbers = normals(KEYS, (10, 20))
    assert (numbers.shape, numbers.dtype) == ((200, 10, 20), torch.float32)
    assert stats.kstest(numbers.flatten(), "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(numbers.flatten())) < 6 * math.sqrt(24 / numbers.numel())
    assert numbers.isfinite().all()


@pytest.mark.parametrize("draw", [uniforms, normals], ids=["uniforms", "normals"])
def test_neighbouring_keys_and_places_are_independent(draw):
    numbers = draw(KEYS, (1000,)).double()
    numbers = (numbers - numbers.mean()) / numbers.std()

    def correlation(first: Tensor, second: Tensor) -> float:
        return float((first * second).mean() * math.sqrt(first.numel()))

    assert abs(correlation(numbers[1:], numbers[:-1])) < 4
    assert abs(correlation(numbers[:, 1:], numbers[:, :-1])) < 4
    assert abs(correlation(numbers[1:, 1:], numbers[:-1, :-1])) < 4
    assert abs(correlation(numbers[1:, :-1], numbers[:-1, 1:])) < 4
    between = numbers @ numbers.T / math.sqrt(1000)
    between.fill_diagonal_(0)
    assert between.abs().max() < 5.5  # of 19,900 pairs
    assert len(numbers.unique()) > (150_000 if draw is uniforms else 100_000)  # no stream repeats another


def test_keys_belong_to_the_image():
    images = torch.rand(20, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    keys = image_keys(images, 0, "a")
    assert (keys.shape, keys.dtype) == ((20,), torch.int64)
    assert len(set(keys.tolist())) == 20
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(image_keys(images[order], 0, "a"), keys[order])
    assert torch.equal(image_keys(images[3:4], 0, "a"), keys[3:4])
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(image_keys(last, 0, "a"), keys)
    assert torch.equal(image_keys(images.double(), 0, "a"), keys)
    assert torch.equal(image_keys(torch.zeros(1, 4), 0, "a"), image_keys(-torch.zeros(1, 4), 0, "a"))
    for other in (image_keys(images, 1, "a"), image_keys(images, 0, "b"), image_keys(images.flip(3), 0, "a")):
        assert not set(other.tolist()) & set(keys.tolist())
    assert image_keys(images[:0], 0, "a").shape == (0,)
    assert uniforms(keys[:0], (2, 3)).shape == (0, 2, 3)


def test_one_bit_of_an_image_changes_half_of_its_key():
    images = torch.full((64, 1, 8, 8), 0.5)
    images[torch.arange(64), 0, torch.arange(64) // 8, torch.arange(64) % 8] += 2**-24
    keys = [key & MASK for key in image_keys(images, 0, "a").tolist()]
    assert len(set(keys)) == 64
    distances = [(first ^ second).bit_count() for first in keys for second in keys if first < second]
    assert 31 < sum(distances) / len(distances) < 33 and min(distances) > 10


def test_a_generator_renews_the_keys():
    images, generator = torch.zeros(3, 4), torch.Generator().manual_seed(3)
    first, second = (image_keys(images, 0, "a", generator) for _ in range(2))
    assert first[0] != second[0] and first[0] != image_keys(images, 0, "a")[0]
    assert torch.equal(image_keys(images, 0, "a", generator.manual_seed(3)), first)


@pytest.mark.parametrize("draw", [uniforms, normals], ids=["uniforms", "normals"])
def test_numbers_do_not_depend_on_the_batch_and_leave_keys_alone(draw):
    kept = KEYS.clone()
    whole = draw(KEYS, (3, 7, 5))
    assert torch.equal(KEYS, kept)
    torch.testing.assert_close(draw(KEYS[17:18], (3, 7, 5)), whole[17:18], atol=1e-6, rtol=0)
    torch.testing.assert_close(draw(KEYS[5:50:3], (3, 7, 5)), whole[5:50:3], atol=1e-6, rtol=0)
