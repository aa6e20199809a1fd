"""Parts of a data set: some samples, or those of training that no network learns from, to choose epochs by."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from attackroute.core.batches import count_samples, derived_generator
from attackroute.core.errors import UserError


def drawn(data: Dataset[Any], count: int, seed: int) -> Subset[Any]:
    """At most so many samples, drawn without replacement, in the data's order."""
    samples = count_samples(data, "data")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    return Subset(data, order[:count].sort().values.tolist())


def held_out(data: Dataset[Any], share: float, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """Divide a data set at random.

    Args:
        data: Has a length.
        share: Of the samples to hold out, between 0 and 1.
        seed: Decides which.

    Returns:
        The samples to learn from and those that are held out, each in the data's order.

    Raises:
        UserError: One of the parts would be empty.
    """
    samples = count_samples(data, "training data")
    held = round(share * samples)
    if not 0 < held < samples:
        raise UserError(f"a share of {share:g} of {samples} training images to hold out leaves one part empty")
    order = torch.randperm(samples, generator=derived_generator(seed, "validation", 0))
    learnt, kept = (Subset(data, part.sort().values.tolist()) for part in (order[held:], order[:held]))
    return learnt, kept
