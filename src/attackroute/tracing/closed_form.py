"""What a recorded edge is worth: influence (Eqs. (1)-(2)) and its sum over critical neurons (Eq. (5)), in closed form.

``C[j, i] = sum_u |W[j, i, u]| * N_i[u]`` with N the window sums of the recording. For a batch of critical sets the sum
over j is one matrix product of a 0/1 matrix with |W|, shared by all sources of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from attackroute.core.layers import CHANNEL_DIM
from attackroute.tracing.crossings import Held, Passage, Rows, Share
from attackroute.tracing.deviations import Deviations
from attackroute.tracing.recorder import Piece, RecordedLayer, Recording
from attackroute.tracing.windows import indicator, pattern_kernel

_BLOCK = 1 << 18  # weights per block: their absolute values stay in the processor's cache


def per_deviation(layer: RecordedLayer, deviations: Deviations) -> RecordedLayer:
    """The layer with its neurons in units of their deviations: all that follows is linear in a kernel's rows."""
    weight = layer.weight.detach()
    inverse = deviations.power(-1, layer.name, weight)
    return replace(layer, weight=weight * inverse.view(-1, *(1,) * (weight.ndim - 1)))


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


def passage_sums(layer: RecordedLayer, critical: Tensor, totals: dict[int, Tensor], recording: Recording) -> None:
    """The same as :func:`critical_sums` for the sources whose closed form goes element by element.

    Their outputs are leaves of the ``recording``.
    """
    for passage in layer.passages:
        shares, sources = _shares(layer, passage, critical), sorted(passage.sources)
        if not shares or not sources:
            continue
        leaves = [recording.leaf(source) for source in sources]
        largest = torch.stack([sums.amax() for _, sums in shares]).amax().clamp(min=torch.finfo(torch.float32).tiny)
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            [held.edge for held, _ in shares if held.edge is not None], [leaf for leaf, _ in leaves],
            [(sums / largest).to(held.dtype) for held, sums in shares],  # in the range of any dtype
            retain_graph=True, allow_unused=True
        )  # fmt: skip
        alike: dict[object, Tensor] = {}  # layers that add to one residual stream share one gradient
        for source, (_, kind), gradient in zip(sources, leaves, gradients, strict=True):
            if gradient is None:
                continue
            place = (gradient.data_ptr(), gradient.shape, gradient.stride(), kind)
            if place not in alike:
                rows = gradient.abs().movedim(CHANNEL_DIM[kind], -1).flatten(1, -2)
                alike[place] = (rows.sum(1, dtype=totals[source].dtype) if gradient.ndim > 2 else rows) * largest
            totals[source].add_(alike[place])


def passage_matrix(layer: RecordedLayer, source: int, recording: Recording) -> Tensor:
    """Eqs. (1)-(2), ``(n, C_target, C_source)``, for such a source; see :func:`passage_sums`."""
    leaf, kind = recording.leaf(source)
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    narrowed = layer.corrected(frozenset((source,)), frozenset())
    matrix = torch.zeros(len(leaf), layer.channels, leaf.shape[CHANNEL_DIM[kind]], dtype=dtype, device=leaf.device)
    for channel in range(layer.channels):
        only = torch.zeros(matrix.shape[:2], dtype=torch.bool, device=leaf.device)
        only[:, channel] = True
        passage_sums(narrowed, only, {source: matrix[:, channel]}, recording)
    return matrix


def _shares(layer: RecordedLayer, passage: Passage, critical: Tensor) -> list[Share]:
    """Absolute influence on a layer's critical neurons, of each element that is the last before they are mixed."""
    assert layer.read is not None
    read = layer.read
    if read.edge is None:
        return []
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    if passage.crossing is None:
        reached = chosen_rows(critical.to(dtype), layer.weight, layer.groups)
        return [(read, _spread(layer, read, reached))]
    ranked = critical.nonzero()[:, 1].view(len(critical), -1)
    weight, output = layer.weight.detach(), passage.crossing.output
    if layer.axes is not None and layer.groups == weight.shape[0] == layer.channels and weight.shape[1] == 1:
        # depthwise: what matters of a kernel is how often, and how strongly, it reads each position
        rows = Rows(functional.one_hot(ranked, layer.channels).to(dtype).unsqueeze(3), ranked)
        seen = _spread(layer, read, weight.to(dtype).abs().transpose(0, 1))
        return passage.crossing.shares(passage.strands, rows, _pulled(read, output, [seen]))
    kernel = _signed(weight, layer.groups)
    rows = Rows((kernel.reshape(layer.channels, -1, 1) if layer.axes is None else kernel.flatten(2))[ranked].to(dtype))
    altered = any(strand.partial or strand.gained for strand in passage.strands)
    offsets = _offsets(layer, read) if altered or rows.weight.shape[3] > 1 else ()
    return passage.crossing.shares(passage.strands, rows, _pulled(read, output, offsets))


def _spread(layer: RecordedLayer, read: Held, reached: Tensor) -> Tensor:
    """What is read at each position, for what is at each kernel offset: ``(n, C_in, H, W)`` or ``(n, ..., F)``."""
    shape = read.values.shape
    if layer.axes is None:
        return reached.reshape(len(reached), *(1,) * (len(shape) - 2), -1).expand(shape)
    rows, columns = (indicator(axis, reached.dtype, reached.device) for axis in layer.axes)
    return (rows.T @ reached @ columns).expand(shape)


def _offsets(layer: RecordedLayer, read: Held) -> Iterator[Tensor]:
    """For each kernel offset, 1 where it meets what the layer reads."""
    values = read.values
    if layer.axes is None:
        yield torch.ones_like(values)
        return
    rows, columns = (indicator(axis, values.dtype, values.device) for axis in layer.axes)
    for row in rows:
        for column in columns:
            yield (row.unsqueeze(1) * column).expand(values.shape)


def _pulled(read: Held, output: Tensor, weights: Iterable[Tensor]) -> Iterator[Tensor]:
    """How much each element of a crossing's output counts in what a layer reads, given how that is weighed."""
    assert read.edge is not None
    for weight in weights:
        seed = weight.to(read.values.dtype).contiguous()
        yield torch.autograd.grad([read.edge], [output], [seed], retain_graph=True)[0]


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
            dense = _signed(kernel.to(dtype), layer.groups).abs()[:, piece.dst : piece.dst + piece.length]
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


def _signed(weight: Tensor, groups: int) -> Tensor:
    """``W`` of a grouped convolution as ``(C_out, C_in, kh, kw)``, zero where a group does not look."""
    if groups == 1:
        return weight
    blocks = weight.unflatten(0, (groups, -1))
    whole = weight.new_zeros(groups, blocks.shape[1], groups, *weight.shape[1:])
    index = torch.arange(groups, device=weight.device)
    whole[index, :, index] = blocks
    return whole.flatten(2, 3).flatten(0, 1)
