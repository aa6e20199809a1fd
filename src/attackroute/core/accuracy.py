"""How many samples a model classifies correctly, with a confidence interval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from attackroute.core.batches import count_samples, in_order, load
from attackroute.core.checks import check_logits, checked_batch
from attackroute.core.distributed import current
from attackroute.core.errors import UserError
from attackroute.core.model_state import kept_modes, placement
from attackroute.core.statistics import Accuracy

_WHAT = "data set"


class BrokenLogits(UserError):
    """A model's logits are NaN."""


def count_correct(
    model: nn.Module,
    data: Dataset[Any],
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    workers: int = 0,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
) -> Accuracy:
    """Classify every sample of a data set in eval mode, without gradients.

    Args:
        model: Maps images (N, C, H, W) to logits (N, classes). Its ``training`` flags come back as they were.
        data: Gives pairs of a float image (C, H, W) and an integer label.
        batch_size: Images in one forward pass.
        device: Where the images are sent; by default to the model's device. The model is not moved.
        workers: Processes that read the data; 0 reads in this one.
        attack: Classify what this makes of the images, as :mod:`attackroute.robustness` has them.

    Returns:
        The counts.

    Raises:
        UserError: Empty or malformed data, or a label outside the logits.
        BrokenLogits: The logits are NaN for some image.
    """
    samples = count_samples(data, _WHAT)
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    place, dtype = placement(model)
    place = torch.device(device) if device is not None else place
    team = current()
    batches = in_order(samples, batch_size)[team.rank :: team.count]

    def count() -> int:
        correct = torch.zeros((), dtype=torch.int64, device=place)
        broken = torch.zeros((), dtype=torch.bool, device=place)
        for batch in load(data, batches, generator=torch.Generator(), workers=workers, pin_memory=place.type == "cuda"):
            images, labels = checked_batch(batch, _WHAT)
            images = images.to(place, dtype, non_blocking=True)
            if attack is not None:
                images = attack(model, images, labels.to(place))
            logits = model(images)
            check_logits(logits, labels, _WHAT)
            correct += (logits.argmax(1) == labels.to(place, non_blocking=True)).sum()
            broken |= logits.isnan().any()
        if broken:
            raise BrokenLogits("the model's logits are NaN for some images; check the images and the weights")
        return int(correct)

    with kept_modes(model), torch.no_grad():
        model.eval()
        return Accuracy(sum(team.all(count())), samples)
