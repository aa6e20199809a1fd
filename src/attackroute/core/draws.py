"""Random numbers that belong to an image: no batch size, order or device changes them.

Every number is a hash of a key and of its position, so there is no state to carry and nothing depends on which other
images share the batch. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: the odd number nearest to 2^64 over the golden ratio


_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9


_SECOND = -7723592293110705685  # 0x94D049BB133111EB


_BITS = 24  # of a float32's mantissa


def image_keys(images: Tensor, seed: int, purpose: str, generator: torch.Generator | None = None) -> Tensor:
    """One key for each image, from the image's values, the seed and what the numbers are for.

    Args:
        images: ``(N, ...)``; two equal images have equal keys.
        seed: Another seed, other keys.
        purpose: Separates uses of one seed.
        generator: One draw from it joins the seed, so that the same image gets new numbers at every call.

    Returns:
        ``(N,)`` int64 on the images' device.
    """
    drawn = 0
    if generator is not None:
        drawn = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    digest = hashlib.sha256(f"{purpose}/{seed}/{drawn}".encode()).digest()
    start = int.from_bytes(digest[:8], "big", signed=True)
    values = images.detach().to(torch.float32) + 0.0  # -0.0 and 0.0 are equal
    words = values.contiguous().view(torch.int32).flatten(1).to(torch.int64)
    # a sum of hashed values does not depend on the order of summation, and wraps alike everywhere
    content = _mix_(words.bitwise_xor_(_counter(words.shape[1], words.device))).sum(1)
    return _mix_(content + start)


def uniforms(keys: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Numbers in [0, 1), float32 ``(N, *shape)``, for keys ``(N,)``."""
    hashed = _mix_(_mix_(_counter(math.prod(shape), keys.device) + keys[:, None]))
    numbers: Tensor = _shifted(hashed, 64 - _BITS, out=hashed).to(torch.float32).div_(2**_BITS)
    return numbers.reshape(-1, *shape)


def normals(keys: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32 ``(N, *shape)``, for keys ``(N,)``, by Box and Muller's transform.

    Of 24 bits, they reach to 5.8. Their last digit is the device's.
    """
    radius = uniforms(keys, shape).neg_().log1p_().mul_(-2).sqrt_()  # log(1 - u), since u may be 0
    return uniforms(_mix_(keys + 1), shape).mul_(2 * math.pi).cos_().mul_(radius)


def mixed(keys: Tensor) -> Tensor:
    """New keys, one for each of ``keys`` (int64 of any shape)."""
    return _mix_(keys.clone())


def _counter(length: int, device: torch.device) -> Tensor:
    return torch.arange(1, length + 1, device=device) * _GAMMA


def _mix_(values: Tensor) -> Tensor:
    """The finaliser, in place: new memory for each of its steps would take most of the time."""
    spare = torch.empty_like(values)
    values.bitwise_xor_(_shifted(values, 30, out=spare)).mul_(_FIRST)
    values.bitwise_xor_(_shifted(values, 27, out=spare)).mul_(_SECOND)
    return values.bitwise_xor_(_shifted(values, 31, out=spare))


def _shifted(values: Tensor, places: int, *, out: Tensor) -> Tensor:
    """Logical shift to the right: ``>>`` on int64 would pull the sign in."""
    shifted: Tensor = torch.bitwise_right_shift(values, places, out=out)
    return shifted.bitwise_and_((1 << (64 - places)) - 1)
