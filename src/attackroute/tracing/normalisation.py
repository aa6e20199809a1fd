"""Influence through layer norm or RMS norm and the linear map behind it, in closed form.

With ``xh`` the normalised stream, ``r`` the reciprocal of its deviation and A the map's rows times the affine factor,

    dz_j[t] / dx_s[t] = r[t] (w[j, s] - b[j, t] xh[t, s]),  w = A - mean_i A,  b[j, t] = mean_i A[j, i] xh[t, i]

(RMS norm: w = A). The sum over j of absolute values splits by signs,

    |w - b x| = |w| - sign(w) b x + 2 relu(sign(w) b x - |w|),

of which the first two summed over j are matrix products. The third is zero wherever ``|w| >= max_t |b| max_t |xh|``, so
what is left to evaluate one by one are the other pairs (j, s), about a quarter. Nothing is truncated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK = 1 << 18  # elements per block: temporaries that stay in the processor's cache
_DEVICE_BLOCK = 1 << 25  # the same where memory is quick and launches are dear
_TOKENS = 256  # tokens that share a bound


def normalised_sums(rows: Tensor, normalised: Tensor, reciprocal: Tensor, *, centred: bool) -> Tensor:
    """``sum over rows j of |dz_j[t] / dx_s[t]|``, ``(n, T, C)``, for linear maps behind a normalisation.

    Args:
        rows: ``(n, k, C)``, each sample's rows of the map, times what the normaliser multiplies each channel by.
        normalised: ``xh``, ``(n, T, C)``, before the affine factor.
        reciprocal: ``r``, ``(n, T)``.
        centred: Whether the mean is taken off, as layer norm does and RMS norm does not.
    """
    weight = rows - rows.mean(2, keepdim=True) if centred else rows
    along = weight @ normalised.transpose(1, 2) / rows.shape[2]  # b, (n, k, T)
    split = _by_signs if rows.device.type == "cpu" else _one_by_one
    total = torch.empty_like(normalised)
    for sample in range(len(rows)):
        for start in range(0, normalised.shape[1], _TOKENS):
            tokens = slice(start, start + _TOKENS)
            stream = normalised[sample, tokens].T.contiguous()
            total[sample, tokens] = split(weight[sample], along[sample, :, tokens].contiguous(), stream).T
    return total * reciprocal.unsqueeze(2)


def _one_by_one(weight: Tensor, along: Tensor, stream: Tensor) -> Tensor:
    """``sum over j of |weight[j, s] - along[j, t] stream[s, t]|``, ``(C, T)``."""
    step = max(1, _DEVICE_BLOCK // max(1, weight.shape[0] * stream.shape[1]))
    parts = [
        (part.unsqueeze(2) - along.unsqueeze(1) * stream[None, start : start + step]).abs_().sum(0)
        for start, part in zip(range(0, weight.shape[1], step), weight.split(step, dim=1), strict=True)
    ]
    return torch.cat(parts)


def _by_signs(weight: Tensor, along: Tensor, stream: Tensor) -> Tensor:
    """The same as :func:`_one_by_one`, split by signs, with fewer pairs to evaluate and the host's help."""
    size, tokens = weight.abs(), stream.shape[1]
    active = size < along.abs().amax(1, keepdim=True) * stream.abs().amax(1)
    settled = torch.where(active, 0, weight)
    total = torch.addcmul(settled.abs().sum(0).unsqueeze(1), stream, settled.sign().T @ along, value=-1)
    counts = active.sum(0)
    ordered, channels = counts.sort(descending=True)
    rows = functional.pad(active.T.nonzero()[:, 1], (0, 1))
    first = counts.cumsum(0) - counts
    along, weight = functional.pad(along, (0, 0, 0, 1)), functional.pad(weight, (0, 0, 0, 1))  # a row of zeros at the end
    numbers, start = ordered.tolist(), 0
    while start < len(numbers) and numbers[start]:
        stop = start + max(1, _BLOCK // (numbers[start] * tokens))
        block, places = channels[start:stop], torch.arange(numbers[start], device=weight.device)
        index = (first[block].unsqueeze(1) + places).clamp_(max=len(rows) - 1)
        chosen = torch.where(places < counts[block].unsqueeze(1), rows[index], len(weight) - 1)
        slopes = along.index_select(0, chosen.flatten()).view(*chosen.shape, tokens)
        offsets = weight[chosen, block.unsqueeze(1)].unsqueeze(2)
        total[block] += torch.addcmul(offsets, slopes, stream[block].unsqueeze(1), value=-1, out=slopes).abs_().sum(1)
        start = stop
    return total
