"""What the parts of instance routes must look like to belong together, and which samples an index means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attackroute import bits
from attackroute.errors import UserError

Edge = tuple[str, str]


def check_masks(packed: Mapping[str, Tensor], channels: Mapping[str, int], samples: int) -> None:
    """Require packed masks uint8 (samples, ceil(C / 8)) on the CPU for every layer, with no bit beyond the channels."""
    if samples < 1:
        raise UserError("instance routes need at least one sample: see whether the data are empty")
    _check_layers("masks", packed, channels)
    for layer, count in channels.items():
        what = f"the packed masks of layer {layer!r}"
        _check_tensor(what, packed[layer], (samples, bits.packed_width(count)))
        if packed[layer].dtype != torch.uint8 or packed[layer].device.type != "cpu":
            raise UserError(f"{what} must be uint8 on the CPU, not {packed[layer].dtype} on {packed[layer].device}")
        if bits.has_stray_bits(packed[layer], count):
            raise UserError(f"{what} have bits set beyond the last of its {count} channels")


def check_scores(scores: Mapping[str, Tensor], channels: Mapping[str, int], samples: int) -> None:
    """Require floating-point scores (samples, C) for every layer."""
    _check_layers("scores", scores, channels)
    for layer, count in channels.items():
        what = f"the scores of layer {layer!r}"
        _check_tensor(what, scores[layer], (samples, count))
        if not scores[layer].is_floating_point():
            raise UserError(f"{what} must be floating point, not {scores[layer].dtype}")


def check_note(name: str, values: Tensor | None, samples: int) -> None:
    """Require one integer for each sample, int64 (samples,), or None."""
    if values is None:
        return
    _check_tensor(name, values, (samples,))
    if values.dtype != torch.int64:
        raise UserError(f"{name} must be int64, not {values.dtype}")


def check_methods(methods: Mapping[Edge, str], channels: Mapping[str, int]) -> None:
    """Require that every edge joins two of the layers and states its method in words."""
    for edge, method in methods.items():
        for layer in edge:
            if layer not in channels:
                raise UserError(f"edge {edge!r} names layer {layer!r}, which is not a layer of the routes")
        if not isinstance(method, str):
            raise UserError(f"edge {edge!r}: the method must be a string, not {method!r}")


def sample_rows(index: slice | Sequence[int] | Tensor, samples: int) -> Tensor:
    """The samples that an index selects, as int64 positions on the CPU, negative ones from the end.

    Raises:
        UserError: the index selects no sample, is out of range, or is neither a slice, integers nor a mask (samples,).
    """
    if isinstance(index, slice):
        rows = torch.tensor(range(samples)[index], dtype=torch.int64, device="cpu")
    else:
        rows = _positions(torch.as_tensor(index, device="cpu"), samples)
    if rows.numel() == 0:
        raise UserError(f"the index selects none of the {samples} samples")
    return rows


def _positions(index: Tensor, samples: int) -> Tensor:
    if index.dtype == torch.bool:
        if index.shape != (samples,):
            raise UserError(f"a mask of samples must have shape ({samples},), not {tuple(index.shape)}")
        return index.nonzero().flatten()
    if index.dim() != 1 or (index.numel() and (index.is_floating_point() or index.is_complex())):
        raise UserError(
            f"samples are selected by a slice, a list of integers or a mask, not by {index.dtype} {tuple(index.shape)}"
        )
    rows = index.to(torch.int64)
    outside = rows[(rows < -samples) | (rows >= samples)]
    if outside.numel():
        raise UserError(f"sample {int(outside[0])} is out of range: there are {samples} samples")
    return rows


def _check_layers(what: str, values: Mapping[str, Tensor], channels: Mapping[str, int]) -> None:
    for layer in channels:
        if layer not in values:
            raise UserError(f"there are no {what} for layer {layer!r}")
    for layer in values:
        if layer not in channels:
            raise UserError(f"there are {what} for layer {layer!r}, but no channel count")


def _check_tensor(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(f"{what} must have shape {shape}, not {tuple(tensor.shape)}")
