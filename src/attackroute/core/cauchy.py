"""Cauchy numbers that belong to an image: no batch size, order or device changes which ones it gets.

As in :mod:`attackroute.attacks.draws` every number is a hash of a key and of its position. There are many of them, so
the hash works on 32 bits: two rounds of a finaliser (with the constants of C. Wellons' lowbias32), half of the key
going into each.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from attackroute.core.draws import mixed

_GAMMA = -1640531527  # 0x9E3779B9 as int32: the odd number nearest to 2^32 over the golden ratio


_FIRST = 0x7FEB352D


_SECOND = -2073319797  # 0x846CA68B


_UNIFORM_BITS = 24  # of a float32's mantissa; the sign is another one


_BLOCK = 1 << 16  # numbers at a time: temporaries that stay in the processor's cache


def derived_keys(keys: Tensor, purpose: str, draws: range) -> Tensor:
    """Keys for several draws from one key for each image, ``(N,)`` int64 -> ``(N, len(draws))``."""
    digest = hashlib.sha256(purpose.encode()).digest()
    start = int.from_bytes(digest[:8], "big", signed=True)
    steps = torch.arange(draws.start, draws.stop, device=keys.device)
    return mixed(mixed(keys[:, None] + start) + steps)


def cauchies(keys: Tensor, length: int) -> Tensor:
    """Standard Cauchy numbers, float32 ``(N, length)``, for keys ``(N,)`` int64. None is zero, or beyond 2.2e7."""
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)  # the lower half wraps
    counter = torch.arange(1, length + 1, device=keys.device, dtype=torch.int32) * _GAMMA
    numbers = torch.empty(len(keys), length, device=keys.device)
    rows = max(1, _BLOCK // max(1, length)) if keys.device.type == "cpu" else len(keys)
    for start in range(0, len(keys), rows):
        block = slice(start, start + rows)
        bits = counter + low[block, None]
        spare = torch.empty_like(bits)
        _mix_(_mix_(bits, spare).bitwise_xor_(high[block, None]), spare)
        # cot(pi / 2 * u) for u in (0, 1): the tail is at u = 0, where float32 is finest
        part = torch.bitwise_and(bits, (1 << _UNIFORM_BITS) - 1, out=spare).to(torch.float32)
        part.add_(0.5).mul_(math.pi / 2 ** (_UNIFORM_BITS + 1)).tan_().reciprocal_()
        torch.copysign(part, bits.view(torch.float32), out=numbers[block])
    return numbers


def _mix_(bits: Tensor, spare: Tensor) -> Tensor:
    """The finaliser, in place."""
    for places, factor in ((16, _FIRST), (15, _SECOND), (16, None)):
        torch.bitwise_right_shift(bits, places, out=spare).bitwise_and_((1 << (32 - places)) - 1)
        bits.bitwise_xor_(spare)
        if factor is not None:
            bits.mul_(factor)
    return bits
