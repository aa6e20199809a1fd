"""Masks of samples' critical neurons: the top-k of Eqs. (4), (5) and (7), packed bits, and the rows of some samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from attackroute.core.errors import UserError
from attackroute.routes.layer_map import LayerMap

_CHUNK_BITS = 1 << 22  # unpacked at a time while counting: some megabytes


def packed_width(channels: int) -> int:
    """Bytes that one row of ``channels`` bits takes."""
    return -(-channels // 8)


def pack(masks: Tensor) -> Tensor:
    """Pack a bool mask (N, C) into uint8 (N, ceil(C / 8)) on the CPU; bit b of byte k is channel 8k + b."""
    rows = masks.detach().to(device="cpu", dtype=torch.bool).numpy()
    return torch.from_numpy(np.packbits(rows, axis=1, bitorder="little"))


def pack_all(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """:func:`pack` of many masks (N, C); they leave an accelerator together, and packed."""
    if not masks or all(mask.device.type == "cpu" for mask in masks.values()):
        return {layer: pack(mask) for layer, mask in masks.items()}
    padded = (functional.pad(mask, (0, -mask.shape[1] % 8)) if mask.shape[1] % 8 else mask for mask in masks.values())
    whole = torch.cat(list(padded), dim=1)
    places = torch.arange(8, device=whole.device)
    rows = (whole.unflatten(1, (-1, 8)) << places).sum(2).to(torch.uint8).to("cpu")
    parts = rows.split([packed_width(mask.shape[1]) for mask in masks.values()], dim=1)
    return {layer: part.contiguous() for layer, part in zip(masks, parts, strict=True)}


def unpack(packed: Tensor, channels: int) -> Tensor:
    """Undo `pack`: uint8 (N, ceil(C / 8)) to bool (N, C)."""
    return torch.from_numpy(_unpack(packed, channels).view(np.bool_))


def usage_counts(packed: Tensor, channels: int) -> Tensor:
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


class PackedMasks(LayerMap[Tensor]):
    """Packed masks by layer; a layer is unpacked to a new bool tensor (N, C) whenever it is asked for."""

    def __init__(self, packed: Mapping[str, Tensor], channels: Mapping[str, int]) -> None:
        super().__init__(packed)
        self._channels = channels

    def __getitem__(self, layer: str) -> Tensor:
        return unpack(super().__getitem__(layer), self._channels[layer])


def check_width(width: float) -> None:
    """Raise a `UserError` unless ``width`` is a share in (0, 1]."""
    if not 0 < width <= 1:  # false for NaN too
        raise UserError(f"width {width} is outside (0, 1]: give the share of a layer's channels to keep, such as 0.2")


def kept(width: float, channels: int) -> int:
    """Number of channels that a route keeps in a layer, ``max(1, round(width * channels))``, for a width in (0, 1]."""
    check_width(width)
    if channels < 1:
        raise UserError(f"a layer with {channels} channels has none to keep: leave it out of the route layers")
    return max(1, round(width * channels))


def top_k(scores: Tensor, width: float) -> Tensor:
    """Mark the ``kept(width, C)`` largest of scores (..., C) in each row, as bool (..., C).

    Ties go to the lower index, on every device. Scores may be infinite, but not NaN.
    """
    check_ranked([scores])
    return largest(scores, width)


def check_ranked(scores: Iterable[Tensor]) -> None:
    """Raise a `UserError` if any score is NaN; the device is read once."""
    if bool(torch.cat([values.flatten() for values in scores]).isnan().any()):
        raise UserError("scores contain NaN, which cannot be ranked: look for inf or NaN in the images and the weights")


def largest(scores: Tensor, width: float) -> Tensor:
    """:func:`top_k` of scores that are checked elsewhere: nothing here waits for an accelerator."""
    count = kept(width, scores.shape[-1])
    scores = scores.detach()
    if scores.device.type != "cpu":  # few launches, and no look at the values
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)
    # the order in which torch.topk returns ties depends on the device, the smallest value that it returns does not
    threshold = torch.topk(scores, count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    chosen = scores >= threshold
    if int(chosen.sum()) == count * threshold.numel():
        return chosen  # no row has more than it keeps: no ties at the threshold
    above = scores > threshold
    tied = chosen & ~above
    room = count - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))


def sample_rows(index: slice | Sequence[int] | Tensor, samples: int) -> Tensor:
    """The samples that a slice, integers or a mask (samples,) select: int64 on the CPU."""
    positions = index if isinstance(index, slice) else torch.as_tensor(index, device="cpu").numpy()
    try:
        rows = np.arange(samples)[positions]
    except IndexError as error:
        raise UserError(f"the index does not fit {samples} samples: {error}") from None
    if rows.ndim != 1 or not len(rows):
        raise UserError(f"the index selects none of the {samples} samples, or is no slice, list of integers or mask")
    return torch.from_numpy(rows.copy())
