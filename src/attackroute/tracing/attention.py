"""Influence through softmax attention and the linear map behind it, in closed form.

One head with weights ``P = softmax(scale q k^T + bias)`` and output ``o = P v``, read by rows j of a linear map,
``z_j[t] = sum_d W[j, d] o[t, d]``:

    dz_j[t] / dv[t', d] = P[t, t'] W[j, d]
    dz_j[t] / dq[t, e]  = scale sum_d M[t, e, d] W[j, d],
              M[t, e, d] = sum_t' P[t, t'] k[t', e] v[t', d] - (P k)[t, e] o[t, d]
    dz_j[t] / dk[t', e] = scale q[t, e] P[t, t'] (W_j v[t'] - W_j o[t])

so values need column sums of P, queries a product with M, and keys an L1 distance of projected values. Constants that
are added to the logits (position biases, masks) change P alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attackroute.tracing.normalisation import block_size


class Heads(NamedTuple):
    """What attention computed, for ``b`` heads of all samples (and windows) with T queries and T' keys.

    The last three dimensions of ``queries`` are (b, T, E), of ``keys`` (b, T', E), of ``values`` (b, T', D) and of
    ``weights``, behind the softmax, (b, T, T').
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor
    scale: Tensor | float  # a number, or one for each head, (b,)


def attention_sums(
    heads: Heads, rows: Tensor, read: Tensor | None = None, asked: Sequence[bool] = (True, True, True)
) -> list[Tensor | None]:
    """Sums over rows j and target tokens t of ``|dz_j[t]|`` for each element of queries, keys and values.

    Args:
        heads: The heads; of the b heads those of one sample follow one another, and of these those of one window.
        rows: ``(n, k, h, D)``, each sample's rows of the map, by the head whose output they read.
        read: How much each head's output tokens count, ``(b, T)``; None for one.
        asked: Whether sums are asked for, of queries, keys and values.

    Returns:
        Sums shaped like queries, keys and values; None for what is not asked for.
    """
    queries, keys, values, weights, scale = heads
    samples, _, count, _ = rows.shape
    scale = torch.as_tensor(scale, dtype=queries.dtype, device=queries.device).expand(len(queries))
    counted = weights if read is None else weights * read.unsqueeze(2)
    sizes = rows.abs().sum(1).unsqueeze(1)  # (n, 1, h, D)
    columns = counted.sum(1).view(samples, -1, count, values.shape[1], 1)
    of_values = (columns * sizes.unsqueeze(3)).view(values.shape)
    outputs = weights @ values
    of_queries, of_keys = torch.empty_like(queries), torch.empty_like(keys)
    for start in range(count * samples) if asked[0] or asked[1] else ():
        sample, head = divmod(start, count)
        own = slice(sample * len(queries) // samples + head, (sample + 1) * len(queries) // samples, count)
        kernel = rows[sample, :, head].T.contiguous()
        projected, at_outputs = values[own] @ kernel, outputs[own] @ kernel  # (w, T', k), (w, T, k)
        if asked[1]:
            # sum_t |q[t, e]| P[t, t'] |W_J v[t'] - W_J o[t]|_1
            distances = _distances(at_outputs, projected) * counted[own]
            of_keys[own] = distances.transpose(1, 2) @ queries[own].abs()
        if not asked[0]:
            continue
        length, features = values.shape[1:]
        parts = keys[own], weights[own]
        if kernel.shape[1] * length <= features * (length + kernel.shape[1]):  # fewer products in this order
            of_queries[own] = _of_queries(*parts, projected, at_outputs)
        else:
            of_queries[own] = _of_queries(*parts, values[own], outputs[own], kernel)
    of_queries *= scale.abs().view(-1, 1, 1) if read is None else (scale.abs().unsqueeze(1) * read).unsqueeze(2)
    sums = of_queries, of_keys * scale.abs().view(-1, 1, 1), of_values
    return [each if wanted else None for each, wanted in zip(sums, asked, strict=True)]


def pulled_sums(side: int, heads: Heads, rows: Tensor, read: Tensor | None, copies: Tensor, jacobian: Tensor) -> Tensor:
    """The same for elements before a map of each token by itself, which may go to several heads: (rows, T, m).

    Args:
        side: 0 for queries, 1 for keys, 2 for values.
        heads, rows, read: As above.
        copies: The heads that the elements of each row reach, of one sample and window, (rows, g).
        jacobian: Derivatives of those heads' queries, keys or values, (rows, g, T, E, m).
    """
    count, of_sample = rows.shape[2], len(heads.weights) // len(rows)
    scale = torch.as_tensor(heads.scale, dtype=rows.dtype, device=rows.device).expand(len(heads.weights))
    total = jacobian.new_empty(len(copies), *jacobian.shape[2::2])
    pull = (_pulled_to_queries, _pulled_to_keys, _pulled_to_values)[side]
    for number, group in enumerate(copies):
        kernel = rows[group[0] // of_sample][:, group % count].transpose(0, 1)  # (g, k, D)
        counted = heads.weights[group] if read is None else heads.weights[group] * read[group].unsqueeze(2)
        counted = counted if side == 2 else counted * scale[group].view(-1, 1, 1)
        one = Heads(heads.queries[group], heads.keys[group], heads.values[group], heads.weights[group], 1.0)
        total[number] = pull(one, kernel, counted, jacobian[number])
    return total


def _pulled_to_queries(heads: Heads, kernel: Tensor, counted: Tensor, jacobian: Tensor) -> Tensor:
    """``sum_j |sum_{g, e, d} J[g, t, e, m] M[g, t, e, d] W[g, j, d]|``, (T, m)."""
    _, keys, values, weights, _ = heads
    features, (copies, tokens, _, width) = values.shape[2], jacobian.shape
    moments = jacobian.new_empty(tokens, width, copies, features)
    step = max(1, 2 * block_size(values) // (keys[0].numel()))  # features of the values at a time
    for copy, (key, value, weight, slope) in enumerate(zip(keys, values, weights, counted, strict=True)):
        means, outputs = slope @ key, weight @ value
        for start in range(0, features, step):
            part = slice(start, start + step)
            products = (key.unsqueeze(2) * value[:, None, part]).flatten(1)
            each = (slope @ products).view(tokens, key.shape[1], -1)
            each.addcmul_(means.unsqueeze(2), outputs[:, None, part], value=-1)
            moments[:, :, copy, part] = jacobian[copy].transpose(1, 2) @ each
    return _row_sums(moments.flatten(2).flatten(0, 1), kernel.transpose(1, 2).flatten(0, 1)).view(tokens, width)


def _pulled_to_keys(heads: Heads, kernel: Tensor, counted: Tensor, jacobian: Tensor) -> Tensor:
    """``sum_{t, j} |sum_g P[g, t, t'] W_gj (v[t'] - o[t]) sum_e q[g, t, e] J[g, t', e, m]|``, (T', m)."""
    queries, _, values, weights, _ = heads
    projected = values @ kernel.transpose(1, 2)  # (g, T', k)
    at_outputs = weights @ projected
    copies, tokens, _, width = jacobian.shape
    if copies == 1:
        distances = _distances(at_outputs, projected) * counted.abs()
    total = jacobian.new_empty(tokens, width)
    rows = 1 if copies == 1 else kernel.shape[1]
    step = max(1, block_size(values) // (queries.shape[1] * width * rows))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        pulled = queries.unsqueeze(1) @ jacobian[:, part]  # (g, t', T, m)
        if copies == 1:
            total[part] = (distances[0, :, part].T.unsqueeze(1) @ pulled[0].abs_()).squeeze(1)
            continue
        slopes = (projected[:, part].unsqueeze(2) - at_outputs.unsqueeze(1)) * counted[:, :, part].mT.unsqueeze(3)
        total[part] = (slopes.permute(1, 2, 3, 0) @ pulled.permute(1, 2, 0, 3)).abs_().sum((1, 2))
    return total


def _pulled_to_values(heads: Heads, kernel: Tensor, counted: Tensor, jacobian: Tensor) -> Tensor:
    """``sum_{t, j} |sum_g P[g, t, t'] sum_d W[g, j, d] J[g, t', d, m]|``, (T', m)."""
    copies, tokens, _, width = jacobian.shape
    total = jacobian.new_empty(tokens, width)
    step = max(1, block_size(kernel) // (kernel.shape[1] * width * (1 if copies == 1 else counted.shape[1])))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        pulled = kernel.unsqueeze(1) @ jacobian[:, part]  # (g, t', k, m)
        if copies == 1:
            total[part] = pulled[0].abs_().sum(1) * counted[0, :, part].abs().sum(0).unsqueeze(1)
            continue
        sums = counted[:, :, part].permute(2, 1, 0) @ pulled.permute(1, 0, 2, 3).flatten(2)
        total[part] = sums.abs_().sum(1).view(-1, kernel.shape[1], width).sum(1)
    return total


def _of_queries(keys: Tensor, weights: Tensor, values: Tensor, outputs: Tensor, kernel: Tensor | None = None) -> Tensor:
    """``sum_j |sum_d M[t, e, d] W[j, d]|``, ``(w, T, E)``, of one head of w windows, with ``kernel`` ``W^T`` (D, k).

    Without a kernel, values and outputs are projected already.
    """
    means, width = weights @ keys, values.shape[2]
    total = torch.empty_like(means)
    step = max(1, block_size(values) // (2 * keys[:, :, 0].numel() * width))  # features of the queries at a time
    for start in range(0, keys.shape[2], step):
        part = slice(start, start + step)
        products = (keys[:, :, part].unsqueeze(3) * values.unsqueeze(2)).flatten(2)
        moments = (weights @ products).view(*means[:, :, part].shape, width)
        moments.addcmul_(means[:, :, part].unsqueeze(3), outputs.unsqueeze(2), value=-1)
        rows = moments.flatten(0, 2)
        sums = rows.abs_().sum(1) if kernel is None else _row_sums(rows, kernel)
        total[:, :, part] = sums.view(*moments.shape[:3])
    return total


def _row_sums(left: Tensor, right: Tensor) -> Tensor:
    """``sum over columns of |left @ right|``, for ``left`` (m, d) and ``right`` (d, k).

    Summed over the first dimension, which takes half the time of the last one on a CPU.
    """
    parts, rows = left.split(max(1, block_size(left) // (2 * right.shape[1]))), right.T.contiguous()
    return torch.cat([(rows @ part.T).abs_().sum(0) for part in parts])


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """L1 distances of rows, ``(w, T, T')``."""
    wide = torch.promote_types(first.dtype, torch.float32)  # there are none of shorter numbers
    return torch.cdist(first.to(wide), second.to(wide), p=1).to(first.dtype)
