"""Boolean masks packed eight to a byte, and column counts taken from the packed form."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Bits unpacked at a time while counting, which bounds the memory by a few megabytes.
_CHUNK_BITS = 1 << 22


def packed_width(channels: int) -> int:
    """Bytes that one row of ``channels`` bits takes."""
    return -(-channels // 8)


def pack(masks: Tensor) -> Tensor:
    """Pack a bool mask (N, C) into uint8 (N, ceil(C / 8)) on the CPU; bit b of byte k is channel 8k + b."""
    rows = masks.detach().to(device="cpu", dtype=torch.bool).numpy()
    return torch.from_numpy(np.packbits(rows, axis=1, bitorder="little"))


def unpack(packed: Tensor, channels: int) -> Tensor:
    """Undo `pack`: uint8 (N, ceil(C / 8)) to bool (N, C)."""
    return torch.from_numpy(_unpack(packed, channels).view(np.bool_))


def count(packed: Tensor, channels: int) -> Tensor:
    """How many rows have each channel set, int64 (C,), unpacking only a few rows at a time."""
    totals = np.zeros(channels, dtype=np.int64)
    step = max(1, _CHUNK_BITS // channels)
    for start in range(0, len(packed), step):
        totals += _unpack(packed[start : start + step], channels).sum(axis=0, dtype=np.int64)
    return torch.from_numpy(totals)


def has_stray_bits(packed: Tensor, channels: int) -> bool:
    """Whether a bit beyond the last channel is set, which `pack` never leaves behind."""
    used = channels % 8
    return used != 0 and bool((packed[:, -1] >> used).any())


def _unpack(packed: Tensor, channels: int) -> np.ndarray:
    return np.unpackbits(packed.numpy(), axis=1, count=channels, bitorder="little")
