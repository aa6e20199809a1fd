"""Random numbers that belong to something: to an image, a channel, or a purpose and an epoch.

No batch size, order, device or library's version changes them. Numbers of an image are hashes of a key and of their
position, so there is no state to carry and nothing depends on which other images share the batch. The hash is the
finaliser of SplitMix64 (Steele, Lea and Flood, 2014); for Cauchy numbers, of which there are many, it works on 32 bits:
two rounds of C. Wellons' lowbias32, half of the key going into each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: the odd number nearest to 2^64 over the golden ratio
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB
_GAMMA_32 = -1640531527  # 0x9E3779B9 as int32
_LOWBIAS = ((16, 0x7FEB352D), (15, -2073319797), (16, None))  # places and factors; the second is 0x846CA68B as int32
_BITS = 24  # of a float32's mantissa
_BLOCK = 1 << 16  # numbers at a time: temporaries that stay in the processor's cache


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start PyTorch's global generators, of the CPU and of all CUDA devices, from a seed, and put them back."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def derived_seed(seed: int, purpose: str, epoch: int) -> int:
    """A 63-bit seed for one purpose in one epoch, unrelated to that of any other purpose, epoch or seed."""
    return int.from_bytes(_digest(seed, purpose, epoch)[:8], "big") >> 1


def derived_generator(seed: int, purpose: str, epoch: int) -> torch.Generator:
    """A CPU generator that starts from :func:`derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, epoch))


def drawn_number(generator: torch.Generator | None) -> int:
    """A 62-bit number from a generator; 0 where there is none."""
    if generator is None:
        return 0
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device))


def random_order(seed: int, layer: str, channels: Iterable[int]) -> list[int]:
    """A layer's channels in random order, as :meth:`attackroute.Route.random_like` draws them."""
    return sorted(channels, key=lambda channel: _digest(seed, layer, channel))


def image_keys(images: Tensor, seed: int, purpose: str, generator: torch.Generator | None = None) -> Tensor:
    """One key for each image, int64 ``(N,)``, from the image's values, the seed and what the numbers are for.

    Equal images have equal keys. One draw from a generator joins the seed, so that the same image gets new numbers at
    every call.
    """
    start = _signed(_digest(purpose, seed, drawn_number(generator)))
    values = images.detach().to(torch.float32) + 0.0  # -0.0 and 0.0 are equal
    words = values.contiguous().view(torch.int32).flatten(1).to(torch.int64)
    # a sum of hashed values does not depend on the order of summation, and wraps alike everywhere
    content = _mix_(words.bitwise_xor_(_counter(words.shape[1], words.device))).sum(1)
    return _mix_(content + start)


def derived_keys(keys: Tensor, purpose: str, draws: range) -> Tensor:
    """Keys for several draws from one key for each image, ``(N,)`` int64 -> ``(N, len(draws))``."""
    steps = torch.arange(draws.start, draws.stop, device=keys.device)
    return mixed(mixed(keys[:, None] + _signed(_digest(purpose))) + steps)


def mixed(keys: Tensor) -> Tensor:
    """New keys, one for each of ``keys`` (int64 of any shape)."""
    return _mix_(keys.clone())


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


def cauchies(keys: Tensor, length: int) -> Tensor:
    """Standard Cauchy numbers, float32 ``(N, length)``, for keys ``(N,)`` int64. None is zero, or beyond 2.2e7."""
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)  # the lower half wraps
    counter = torch.arange(1, length + 1, device=keys.device, dtype=torch.int32) * _GAMMA_32
    numbers = torch.empty(len(keys), length, device=keys.device)
    rows = max(1, _BLOCK // max(1, length)) if keys.device.type == "cpu" else len(keys)
    for start in range(0, len(keys), rows):
        block = slice(start, start + rows)
        bits = counter + low[block, None]
        spare = torch.empty_like(bits)
        _mix_32_(_mix_32_(bits, spare).bitwise_xor_(high[block, None]), spare)
        # cot(pi / 2 * u) for u in (0, 1): the tail is at u = 0, where float32 is finest; the sign is another bit
        cotangents = torch.bitwise_and(bits, (1 << _BITS) - 1, out=spare).to(torch.float32)
        cotangents.add_(0.5).mul_(math.pi / 2 ** (_BITS + 1)).tan_().reciprocal_()
        torch.copysign(cotangents, bits.view(torch.float32), out=numbers[block])
    return numbers


def _digest(*parts: object) -> bytes:
    return hashlib.sha256("/".join(map(str, parts)).encode()).digest()


def _signed(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big", signed=True)


def _counter(length: int, device: torch.device) -> Tensor:
    return torch.arange(1, length + 1, device=device) * _GAMMA


def _mix_(values: Tensor) -> Tensor:
    """The 64-bit finaliser, in place: new memory for each of its steps would take most of the time."""
    spare = torch.empty_like(values)
    values.bitwise_xor_(_shifted(values, 30, out=spare)).mul_(_FIRST)
    values.bitwise_xor_(_shifted(values, 27, out=spare)).mul_(_SECOND)
    return values.bitwise_xor_(_shifted(values, 31, out=spare))


def _shifted(values: Tensor, places: int, *, out: Tensor) -> Tensor:
    """Logical shift to the right: ``>>`` on int64 would pull the sign in."""
    shifted: Tensor = torch.bitwise_right_shift(values, places, out=out)
    return shifted.bitwise_and_((1 << (64 - places)) - 1)


def _mix_32_(bits: Tensor, spare: Tensor) -> Tensor:
    """The 32-bit finaliser, in place."""
    for places, factor in _LOWBIAS:
        torch.bitwise_right_shift(bits, places, out=spare).bitwise_and_((1 << (32 - places)) - 1)
        bits.bitwise_xor_(spare)
        if factor is not None:
            bits.mul_(factor)
    return bits
