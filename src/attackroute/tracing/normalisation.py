"""Influence through layer norm or RMS norm and the linear map behind it, in closed form.

With ``xh`` the normalised stream, ``r`` the reciprocal of its deviation and A the map's rows times the affine factor,

    dz_j[t] / dx_s[t] = r[t] (w[j, s] - b[j, t] xh[t, s]),  w = A - mean_i A,  b[j, t] = mean_i w[j, i] xh[t, i]

(RMS norm: w = A). A normalisation before that one, with nothing but sums between them, does the same once more to the
rows ``w - b xh``, and so adds one more product. The sum over j of absolute values splits by signs,

    |w - b x| = |w| - sign(w) b x + 2 relu(sign(w) b x - |w|),

of which the first two summed over j are matrix products. The third is zero wherever ``|w| >= max_t |b| max_t |xh|``, so
what is left to evaluate one by one are the other pairs (j, s), about a quarter where channels are many. Where they are
few, and on a GPU, evaluating all of them is quicker. Nothing is truncated either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK = 1 << 19  # elements per block: temporaries that stay in the processor's cache
_DEVICE_BLOCK = 1 << 25  # the same where memory is quick and launches are dear
_TOKENS = 256  # tokens that share a bound
_FEW = 0.3  # share of the pairs that are cheaper to pick out than to evaluate with all the others


def block_size(values: Tensor) -> int:
    """How many elements temporaries may have on the device of some values."""
    return _BLOCK if values.device.type == "cpu" else _DEVICE_BLOCK


class Stage(NamedTuple):
    """One normalisation of n samples' tokens."""

    normalised: Tensor  # xh, (n, T, C), before the affine factor
    reciprocal: Tensor  # r, (n, T)
    scale: Tensor | None  # the affine factor, (C,)
    centred: bool  # whether the mean is taken off, as layer norm does and RMS norm does not

    def part(self, tokens: Tensor) -> Stage:
        """Some of the tokens, by their numbers."""
        return self._replace(normalised=self.normalised[:, tokens], reciprocal=self.reciprocal[:, tokens])


class Slopes(NamedTuple):
    """Derivatives of n samples' rows with respect to tokens: ``reciprocal (rows - sum of along across)``."""

    rows: Tensor  # (n, k, C)
    along: tuple[Tensor, ...] = ()  # b of each product, (n, k, T), and
    across: tuple[Tensor, ...] = ()  # what it is multiplied by, (n, T, C)
    reciprocal: Tensor | float = 1.0  # (n, T)

    def through(self, stage: Stage) -> Slopes:
        """The derivatives with respect to what a normalisation read."""
        rows, across = self.rows, list(self.across)
        if stage.scale is not None:
            rows, across = rows * stage.scale, [stream * stage.scale for stream in across]
        if stage.centred:
            rows = rows - rows.mean(2, keepdim=True)
            across = [stream - stream.mean(2, keepdim=True) for stream in across]
        slope = rows @ stage.normalised.transpose(1, 2)
        for earlier, stream in zip(self.along, across, strict=True):
            slope = slope - earlier * (stream * stage.normalised).sum(2).unsqueeze(1)
        along = (*self.along, slope / rows.shape[2])
        return Slopes(rows, along, (*across, stage.normalised), self.reciprocal * stage.reciprocal)

    def part(self, tokens: Tensor, channels: slice) -> Slopes:
        """Those with respect to some of the tokens and channels, tokens by their numbers."""
        assert isinstance(self.reciprocal, Tensor)
        return Slopes(
            self.rows[:, :, channels],
            tuple(slope[:, :, tokens] for slope in self.along),
            tuple(stream[:, tokens, channels] for stream in self.across),
            self.reciprocal[:, tokens],
        )

    def sums(self, counted: Tensor | None = None) -> Tensor:
        """``sum over rows j of |dz_j[t] / dx_s[t]|``, ``(n, T, C)``; ``counted``: how often rows count, (n, k, T)."""
        total = torch.empty_like(self.across[0])
        for sample, weight in enumerate(self.rows):
            for start in range(0, total.shape[1], _TOKENS):
                tokens = slice(start, start + _TOKENS)
                along = [slope[sample, :, tokens].contiguous() for slope in self.along]
                across = [stream[sample, tokens].T.contiguous() for stream in self.across]
                if counted is not None or weight.device.type != "cpu":
                    sums = _one_by_one(weight, along, across, None if counted is None else counted[sample, :, tokens])
                else:
                    sums = _by_signs(weight, along, across)
                total[sample, tokens] = sums.T
        return total * torch.as_tensor(self.reciprocal).unsqueeze(-1)


def _one_by_one(
    weight: Tensor, along: Sequence[Tensor], across: Sequence[Tensor], counted: Tensor | None = None
) -> Tensor:
    """``sum over j of |weight[j, s] - sum of along[j, t] across[s, t]|``, ``(C, T)``."""
    step = max(1, block_size(weight) // max(1, along[0].numel()))
    parts = []
    for start in range(0, weight.shape[1], step):
        each = weight[:, start : start + step].unsqueeze(2)
        for slope, stream in zip(along, across, strict=True):
            each = torch.addcmul(each, slope.unsqueeze(1), stream[start : start + step], value=-1)
        each = each.abs_() if counted is None else each.abs_().mul_(counted.unsqueeze(1))
        parts.append(each.sum(0))
    return torch.cat(parts)


def _by_signs(weight: Tensor, along: Sequence[Tensor], across: Sequence[Tensor]) -> Tensor:
    """The same as :func:`_one_by_one`, split by signs where that leaves few pairs, with the host's help."""
    pairs = list(zip(along, across, strict=True))
    bound = sum(slope.abs().amax(1, keepdim=True) * stream.abs().amax(1) for slope, stream in pairs)
    active, tokens = weight.abs() < bound, across[0].shape[1]
    counts = active.sum(0)
    ordered, channels = counts.sort(descending=True)
    numbers = ordered.tolist()
    if sum(numbers) > _FEW * active.numel():
        return _one_by_one(weight, along, across)
    settled = torch.where(active, 0, weight)
    total, signs = settled.abs().sum(0).unsqueeze(1), settled.sign().T
    for slope, stream in pairs:
        total = torch.addcmul(total, stream, signs @ slope, value=-1)
    # for each channel the rows that are left, filled up with a row of zeros
    channel, row = active.T.nonzero().unbind(1)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[channel]
    rows, offsets = row.new_full((len(counts), numbers[0]), len(weight)), weight.new_zeros(len(counts), numbers[0])
    rows[channel, place], offsets[channel, place] = row, weight[row, channel]
    rows, offsets, start = rows[channels], offsets[channels], 0
    pairs = [(functional.pad(slope, (0, 0, 0, 1)), stream[channels].unsqueeze(1)) for slope, stream in pairs]
    while start < len(numbers) and numbers[start]:
        part = slice(start, start + max(1, _BLOCK // (numbers[start] * tokens)))
        chosen, each = rows[part, : numbers[start]], offsets[part, : numbers[start]].unsqueeze(2)
        for slope, stream in pairs:
            slopes = slope.index_select(0, chosen.flatten()).view(*chosen.shape, tokens)
            each = torch.addcmul(each, slopes, stream[part], value=-1, out=slopes)
        total[channels[part]] += each.abs_().sum(1)
        start = part.stop
    return total
