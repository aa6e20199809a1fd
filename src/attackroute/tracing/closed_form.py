"""What a recorded edge is worth: influence (Eqs. (1)-(2)) and its sum over critical neurons (Eq. (5)), in closed form.

``C[j, i] = sum_u |W[j, i, u]| * N_i[u]`` with N the window sums of the recording. For a batch of critical sets the sum
over j is one matrix product of a 0/1 matrix with |W|, shared by all sources of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from attackroute.tracing.recorder import Piece, RecordedLayer
from attackroute.tracing.windows import pattern_kernel

_BLOCK = 1 << 18  # weights per block: their absolute values stay in the processor's cache


def critical_sums(layer: RecordedLayer, critical: Tensor, totals: dict[int, Tensor]) -> None:
    """Add one target's share of Eq. (5) to the scores ``(n, C_source)`` of its sources, by index, in place.

    ``critical`` are the target's critical neurons, bool ``(n, C_target)``.
    """
    if not layer.pieces:
        return
    dtype = next(iter(totals.values())).dtype
    chosen = critical.to(dtype)
    # the last result is kept: sources of a residual stream meet the same kernel
    reduce = lru_cache(maxsize=1)(lambda weight: chosen_rows(chosen, weight, layer.groups))
    shared: dict[tuple[int, int, int], Tensor] = {}  # by gains: what a residual stream carries differs in scale alone
    for piece in layer.pieces:
        key = (id(piece.sums), piece.dst, piece.length)
        if key not in shared:
            reached = slice(piece.dst, piece.dst + piece.length)
            terms = [  # (n, length, kh, kw), summed over the kernel
                (reduce(kernel)[:, reached] * sums.to(dtype)).sum((2, 3))
                for kernel, sums in _kernels(layer, piece, dtype)
            ]
            shared[key] = sum(terms[1:], terms[0])
        totals[piece.source].narrow(1, piece.src, piece.length).add_(_scaled(shared[key], piece))


def influence_matrix(layer: RecordedLayer, source: int, channels: int, samples: int) -> Tensor:
    """Eqs. (1)-(2): ``(n, C_target, C_source)`` for a source of ``channels`` channels with closed-form pieces."""
    weight = layer.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    matrix = torch.zeros(samples, layer.channels, channels, dtype=dtype, device=weight.device)
    for piece in layer.pieces:
        if piece.source != source:
            continue
        score = matrix.new_zeros(())
        for kernel, sums in _kernels(layer, piece, dtype):
            dense = _dense(kernel, layer.groups)[:, piece.dst : piece.dst + piece.length]
            each = sums.to(dtype).expand(samples, *dense.shape[1:])
            score = score + torch.einsum("oiuv,niuv->noi", dense, each)
        matrix[:, :, piece.src : piece.src + piece.length] += _scaled(score, piece)
    return matrix


def _kernels(layer: RecordedLayer, piece: Piece, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of a kernel ``|W|`` (or a widened pattern kernel) and the window sums that go with it."""
    if isinstance(piece.sums, Tensor):
        yield layer.weight, piece.sums
        return
    assert layer.axes is not None
    for pattern in piece.sums:
        yield pattern_kernel(layer.weight.to(dtype), pattern, *layer.axes), pattern.sums


def _scaled(score: Tensor, piece: Piece) -> Tensor:
    return score if piece.scale is None else score * piece.scale.to(score.dtype).abs()


def chosen_rows(chosen: Tensor, weight: Tensor, groups: int) -> Tensor:
    """``sum over chosen j of |W[j]|``: ``(n, C_in, kh, kw)`` for ``chosen`` ``(n, C_out)`` and a grouped kernel."""
    samples, (kh, kw) = chosen.shape[0], weight.shape[2:]
    if groups == weight.shape[0] and weight.shape[1] == 1:  # depthwise, one neuron per input channel
        return chosen[..., None, None] * weight.abs().to(chosen.dtype).transpose(0, 1)
    if groups > 1:
        rows = weight.abs().to(chosen.dtype).reshape(groups, weight.shape[0] // groups, -1)
        # (groups, n, C_in / groups * kh * kw)
        summed = torch.bmm(chosen.view(samples, groups, -1).transpose(0, 1), rows)
        return summed.transpose(0, 1).reshape(samples, -1, kh, kw)
    dense = weight.is_contiguous()
    ordered = weight if dense else weight.permute(0, 2, 3, 1)  # a channels_last kernel is contiguous in this order
    total = chosen.new_zeros(samples, weight[0].numel())
    step = max(1, _BLOCK // weight[0].numel()) if weight.device.type == "cpu" else weight.shape[0]
    for start in range(0, weight.shape[0], step):
        block = ordered[start : start + step].abs().to(chosen.dtype).flatten(1)
        total.addmm_(chosen[:, start : start + step], block)
    return total.view(samples, -1, kh, kw) if dense else total.view(samples, kh, kw, -1).permute(0, 3, 1, 2)


def _dense(weight: Tensor, groups: int) -> Tensor:
    """``|W|`` of a grouped convolution as ``(C_out, C_in, kh, kw)``, zero where a group does not look."""
    size = weight.abs()
    if groups == 1:
        return size
    blocks = size.unflatten(0, (groups, -1))
    whole = size.new_zeros(groups, blocks.shape[1], groups, *size.shape[1:])
    index = torch.arange(groups, device=size.device)
    whole[index, :, index] = blocks
    return whole.flatten(2, 3).flatten(0, 1)
