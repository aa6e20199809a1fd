"""Gaussian noise: its distribution, and images of any shape and type."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import nn

from attackroute.robustness.gaussian_noise import GaussianNoise

MODEL = nn.Identity()


@pytest.mark.parametrize("std", [0.08, 0.18, 0.38])
def test_gaussian_noise_is_normal(std):
    x = torch.full((20, 3, 16, 16), 0.5) + torch.arange(20)[:, None, None, None] * 1e-6
    noisy = GaussianNoise(std)(MODEL, x, torch.zeros(20, dtype=torch.long))
    inside = (noisy > 0) & (noisy < 1)
    noise = (noisy - x)[inside] / std
    bound = 0.5 / std
    assert stats.kstest(noise, stats.truncnorm(-bound, bound).cdf).pvalue > 1e-3
    cut = stats.norm.sf(bound) * 2
    assert abs(float((~inside).float().mean()) - cut) < 4 * (cut / inside.numel()) ** 0.5 + 1e-4


def test_gaussian_noise_of_any_shape_and_type():
    y = torch.zeros(4, dtype=torch.long)
    for shape in ((4, 7), (4, 1, 28, 28), (4, 5, 3, 2), (4, 2, 3, 4, 5)):
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        noisy = GaussianNoise()(MODEL, x, y)
        assert noisy.shape == x.shape and 0.05 < (noisy - x).std() < 0.2
        doubled = GaussianNoise()(MODEL, x.double(), y)
        assert doubled.dtype == torch.float64
        torch.testing.assert_close(doubled.float(), noisy, atol=1e-6, rtol=0)
    half = GaussianNoise(std=0.05)(MODEL, x.half(), y)
    assert half.dtype == torch.float16 and half.min() >= 0 and half.max() <= 1


def test_gaussian_noise_belongs_to_the_image_and_the_seed():
    x, y = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(3, dtype=torch.long)
    noisy = GaussianNoise()(MODEL, x, y)
    assert torch.equal(GaussianNoise()(MODEL, x.flip(0), y), noisy.flip(0))
    assert torch.equal(GaussianNoise()(MODEL, x[1:2], y[:1]), noisy[1:2])
    assert not torch.equal(GaussianNoise(seed=1)(MODEL, x, y), noisy)
