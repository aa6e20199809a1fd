"""Random crops and flips of whole batches, every sample on its own, from an explicit generator."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Augment = Literal["none", "crop", "crop-flip"]
CROP_PADDING = 4


def augment(images: Tensor, kind: Augment, generator: torch.Generator) -> Tensor:
    """Draw a random view of every image ``(N, C, H, W)``; a state of the CPU generator gives the same on every device.

    ``"none"`` returns the images themselves; ``"crop"`` shifts each by up to 4 pixels in both directions (black moves
    in); ``"crop-flip"`` mirrors half of them as well.
    """
    if kind == "none":
        return images
    samples = len(images)
    top, left = torch.randint(0, 2 * CROP_PADDING + 1, (2, samples), generator=generator).to(images.device)
    height, width = images.shape[-2:]
    padded = functional.pad(images, (CROP_PADDING,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, 2p + 1, 2p + 1, H, W)
    views = windows[torch.arange(len(images), device=images.device), :, top, left]
    if kind == "crop":
        return views
    mirrored = torch.randint(0, 2, (samples,), generator=generator).bool().to(images.device)
    return torch.where(mirrored[:, None, None, None], views.flip(3), views)
