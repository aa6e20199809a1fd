"""Votes of samples by the ranks of their gradients (Eqs. (17)-(18)): the lower the gradient, the more votes."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor


def rank_votes(log_gradients: Tensor) -> Tensor:
    """Votes of each sample in each layer among the samples themselves, Eq. (17).

    Args:
        log_gradients: ``(N, L)`` float64 without NaN; ``-inf`` is a gradient of zero.

    Returns:
        ``(N, L)`` float64: 1 for the layer's largest gradient, N for its smallest; equal gradients share the mean.
    """
    return torch.from_numpy(rankdata(-log_gradients.numpy(), axis=0))


def votes_among(reference: Tensor, log_gradients: Tensor) -> Tensor:
    """Votes of samples by their place among those of a reference, without ranking that anew.

    A sample whose gradient is in the reference gets that one's votes, exactly as :func:`rank_votes` gave them; one
    between two samples of the reference gets the mean of theirs.

    Args:
        reference: ``(M, L)`` float64, each column in ascending order.
        log_gradients: ``(N, L)`` float64.

    Returns:
        ``(N, L)`` float64, from 1/2 to ``M + 1/2``.
    """
    places = np.empty(log_gradients.shape)
    for layer, (known, values) in enumerate(zip(reference.numpy().T, log_gradients.numpy().T, strict=True)):
        # with b of the reference below and e equal: M - b - e above, and the mean of e ranks from there on
        places[:, layer] = np.searchsorted(known, values, "left") + np.searchsorted(known, values, "right")
    return torch.from_numpy(len(reference) + 0.5 - places / 2)
