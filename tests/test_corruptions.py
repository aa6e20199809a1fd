"""Corruptions: ImageNet-C's own numbers, and the same image always corrupted alike."""

from __future__ import annotations

import builtins
import random
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError
from attackroute.robustness.corruptions import KINDS, Corruption, GaussianNoise

needs_library = pytest.mark.skipif(find_spec("imagecorruptions") is None, reason="needs the corruptions extra")
np = pytest.importorskip("numpy")
DETERMINISTIC = ("gaussian-blur", "defocus-blur", "zoom-blur", "brightness", "contrast", "pixelate", "saturate")
MODEL = nn.Identity()


@cache
def photos(samples: int = 3, size: int = 32, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Smooth images with some structure, of 8 bits."""
    coarse = torch.rand(samples, channels, 6, 6, generator=torch.Generator().manual_seed(0))
    fine = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (fine * 255).round() / 255, torch.zeros(samples, dtype=torch.long)


def state() -> tuple[object, ...]:
    kind, keys, *rest = np.random.get_state()
    return kind, keys.tolist(), *rest, random.getstate(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_gaussian_noise_is_normal(severity):
    stats = pytest.importorskip("scipy.stats")
    std = {1: 0.08, 2: 0.12, 3: 0.18, 4: 0.26, 5: 0.38}[severity]
    x = torch.full((20, 3, 16, 16), 0.5) + torch.arange(20)[:, None, None, None] * 1e-6
    noisy = GaussianNoise(severity)(MODEL, x, torch.zeros(20, dtype=torch.long))
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
    assert torch.equal(GaussianNoise(std=0.18)(MODEL, x, y), GaussianNoise(3)(MODEL, x, y))


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("severity", [1, 5])
def test_what_the_library_makes_of_the_same_numbers(kind, severity):
    """The library by itself, seeded with each image's key."""
    import imagecorruptions

    from attackroute.core.random import image_keys

    x, y = photos(2)
    found = Corruption(kind, severity, seed=6)(MODEL, x, y)
    assert found.shape == x.shape and found.dtype == x.dtype
    pixels = (x * 255).round().byte().permute(0, 2, 3, 1).numpy()
    before = np.random.get_state()
    for image, key, result in zip(pixels, image_keys(x, 6, kind).tolist(), found, strict=True):
        np.random.seed([key % 2**32, key // 2**32 % 2**32])
        own = {"seed": key % 2**31} if kind in ("glass-blur", "impulse-noise") else {}
        expected = imagecorruptions.corrupt(image, severity, kind.replace("-", "_"), **own)
        assert torch.equal((result * 255).round().byte().permute(1, 2, 0), torch.from_numpy(expected.copy()))
        assert torch.equal(result, (result * 255).round() / 255)
    np.random.set_state(before)


def test_constants_are_those_of_imagenet_c():
    """By hand, for corruptions whose definition is a line of arithmetic."""
    pytest.importorskip("imagecorruptions")
    x, y = photos(2)
    for severity, factor in enumerate((0.4, 0.3, 0.2, 0.1, 0.05), start=1):
        means = x.mean((2, 3), keepdim=True)
        expected = (x - means) * factor + means
        found = Corruption("contrast", severity)(MODEL, x, y)
        torch.testing.assert_close(found, expected, atol=1.01 / 255, rtol=0)
    for severity, added in enumerate((0.1, 0.2, 0.3, 0.4, 0.5), start=1):  # to the largest channel, V of HSV
        found = Corruption("brightness", severity)(MODEL, x, y).amax(1)
        torch.testing.assert_close(found, (x.amax(1) + added).clamp(max=1), atol=1.01 / 255, rtol=0)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_batches_seeds_and_generators(kind):
    corruption = Corruption(kind)
    x, y = photos()
    before = state()
    whole = corruption(MODEL, x, y)
    assert not torch.equal(whole, x) and whole.min() >= 0 and whole.max() <= 1
    for _ in range(2):  # alone, in another order, and again
        assert torch.equal(corruption(MODEL, x[1:2], y[:1]), whole[1:2])
        assert torch.equal(corruption(MODEL, x.flip(0), y), whole.flip(0))
    generator = torch.Generator().manual_seed(0)
    first, second = (corruption(MODEL, x, y, generator=generator) for _ in range(2))
    seeded = Corruption(kind, seed=1)(MODEL, x, y)
    if kind in (*DETERMINISTIC, "jpeg-compression"):
        assert torch.equal(first, whole) and torch.equal(seeded, whole)
    else:
        assert not torch.equal(first, second) and not torch.equal(seeded, whole)
        assert torch.equal(corruption(MODEL, x, y, generator=generator.manual_seed(0)), first)
    assert state() == before


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_grey_images_are_colour_images_of_equal_channels(kind):
    x, y = photos(2, channels=1)
    found = Corruption(kind)(MODEL, x, y)
    assert found.shape == x.shape
    levels = found * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    if kind in (*DETERMINISTIC, "jpeg-compression"):
        colour = Corruption(kind)(MODEL, x.expand(-1, 3, -1, -1), y)
        torch.testing.assert_close(found[:, 0], colour.mean(1), atol=0.51 / 255, rtol=0)


@needs_library
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zoom-blur"])
def test_photographs_and_images_that_are_not_square(kind):
    x, y = photos(1, size=224)
    assert ((Corruption(kind, 5)(MODEL, x, y) - x).abs() > 1 / 255).float().mean() > 0.02
    x = x[:, :, :40, :51]
    found = Corruption(kind, 5)(MODEL, x, y)
    assert found.shape == x.shape and not torch.equal(found, x)


@needs_library
def test_no_drop_on_a_small_image_leaves_it_as_it_is():
    x = photos(1)[0].expand(600, -1, -1, -1).clone()
    x[:, 0, 0] = (torch.arange(600 * 32) % 251).view(600, 32) / 255
    found = Corruption("spatter", 1)(MODEL, x, torch.zeros(600, dtype=torch.long))
    change = (found - x).flatten(1).abs().amax(1)
    assert 0 < (change == 0).sum() < 30
    assert (found.flatten(1).amax(1) > 0.5).all()  # and none turned black


@needs_library
@pytest.mark.parametrize("kind", ["fog", "snow", "zoom-blur"])
def test_types_formats_and_modes(kind, capsys):
    x, y = photos()
    expected = Corruption(kind)(MODEL, x, y)
    last = Corruption(kind)(MODEL, x.contiguous(memory_format=torch.channels_last), y)
    assert torch.equal(last, expected) and last.is_contiguous(memory_format=torch.channels_last)
    doubles = Corruption(kind)(MODEL, x.double(), y)
    assert doubles.dtype == torch.float64
    torch.testing.assert_close(doubles.float(), expected, atol=1e-6, rtol=0)
    with torch.inference_mode():
        found = Corruption(kind)(MODEL, x, y)
    assert torch.equal(found, expected) and not found.is_inference()
    watched = x.clone().requires_grad_()
    assert not Corruption(kind)(MODEL, watched, y).requires_grad
    assert Corruption(kind)(MODEL, x[:0], y[:0]).shape == (0, 3, 32, 32)
    assert capsys.readouterr() == ("", "")


@needs_library
@pytest.mark.parametrize("shape", [(2, 3, 31, 40), (2, 1, 28, 28), (2, 4, 32, 32), (2, 32, 32), (2, 3072)])
def test_images_that_are_too_small_or_none(shape):
    with pytest.raises(UserError, match=r"fog is for images .* of 32x32 or larger, .*; gaussian-noise takes any"):
        Corruption("fog")(MODEL, torch.zeros(shape), torch.zeros(2, dtype=torch.long))


@needs_library
def test_the_global_generator_comes_back_after_an_error(monkeypatch):
    import imagecorruptions

    def fail(*_, **__):
        np.random.rand()
        raise ZeroDivisionError

    monkeypatch.setattr(imagecorruptions, "corrupt", fail)
    before = state()
    with pytest.raises(ZeroDivisionError):
        Corruption("fog")(MODEL, *photos())
    assert state() == before


def test_a_library_that_cannot_be_loaded_is_one_line(monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "imagecorruptions":
            raise ImportError("libGL.so.1: cannot open shared object file")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr("attackroute.robustness.corruptions.require_extra", lambda *_: None)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"libGL.so.1.*opencv-python-headless"):
        Corruption("fog")(MODEL, *photos())
