"""The network, the images and the settings of a trace, taken piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from attackroute.attacks import Perturbation
from attackroute.cli.comparison import Comparison, compare
from attackroute.cli.console import Progress
from attackroute.data import ImageData, check_images
from attackroute.instances import InstanceRoutes
from attackroute.noise import NOISE
from attackroute.sketches import Sketches
from attackroute.trace import trace_routes


@dataclass(frozen=True)
class Tracer:
    """The network, the images and how to trace them."""

    network: nn.Module
    data: ImageData
    width: float
    batch_size: int
    linear: bool
    keep_scores: bool
    sketches: Sketches
    seed: int
    freeze_gates: bool
    autocast: torch.dtype | None
    attack: Perturbation | None
    carrier: str

    def piece(self, start: int, stop: int, progress: Progress) -> InstanceRoutes:
        """Routes of some of the samples."""
        return trace_routes(
            self.network,
            self._batches(start, stop),
            self.width,
            attack=self.attack,
            carrier=self.carrier,
            linear=self.linear,
            keep_scores=self.keep_scores,
            sketches=self.sketches,
            seed=self.seed,
            freeze_gates=self.freeze_gates,
            autocast=self.autocast,
            progress=lambda done, _: progress(start + done, len(self.data)),
        )

    def compare(self, samples: int) -> Comparison:
        """The first samples, against the oracle."""
        batches = list(self._batches(0, min(samples, len(self.data))))
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        parameter = next(self.network.parameters())
        images, labels = images.to(parameter.device, parameter.dtype), labels.to(parameter.device)
        clean = images if self.carrier == NOISE else None
        if self.attack is not None:
            images = self.attack(self.network, images, labels)
        return compare(
            self.network,
            images,
            labels,
            self.width,
            clean=clean,
            linear=self.linear,
            autocast=self.autocast,
            sketches=self.sketches,
            seed=self.seed,
            freeze_gates=self.freeze_gates,
        )

    def _batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in DataLoader(Subset(self.data.dataset, range(start, stop)), self.batch_size):
            check_images(images)
            yield images, labels
