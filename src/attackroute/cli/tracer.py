"""The network, the images and the settings of a trace, taken batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from attackroute.cli.comparison import Comparison, compare
from attackroute.cli.console import Progress
from attackroute.core.batches import BatchStream
from attackroute.core.model_state import autocast_of, frozen, placement
from attackroute.robustness.attack import Perturbation
from attackroute.routes.folder import Missing
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.trace import RouteTracer
from attackroute.zoo.data import ImageBatches, ImageData


@dataclass(frozen=True)
class Tracer:
    """The network, the images and how to trace them; ``origin`` is what routes call the network and the images."""

    network: nn.Module
    data: ImageData
    width: float
    batch_size: int
    keep_scores: bool
    config: TraceConfig
    autocast: torch.dtype | None
    attack: Perturbation | None
    origin: tuple[str, str]

    def trace(self, missing: Sequence[Missing], workers: int, progress: Progress) -> Iterator[InstanceRoutes]:
        """Routes of the samples that are missing, batch by batch; processes take turns at them."""
        chosen = [
            range(start, min(start + self.batch_size, part.stop))
            for part in missing
            for start in range(part.start, part.stop, self.batch_size)
        ]
        data = ImageBatches(self.data, self.batch_size, batches=chosen, workers=workers)
        done = len(self.data) - len(data.sampler)
        config = self.config
        with frozen(self.network), autocast_of(self.network, self.autocast):
            # the same images whatever is missing, so that nothing depends on it
            probe, _ = BatchStream(self.network, ImageBatches(self.data, self.batch_size), self.batch_size).first
            tracer = RouteTracer.probe(
                self.network, probe, self.width, attack=self.attack, carrier=config.carrier, linear=config.linear,
                keep_scores=self.keep_scores, sketches=config.sketches, seed=config.seed,
                freeze_gates=config.freeze_gates,
            )  # fmt: skip
            for part in BatchStream(self.network, data, self.batch_size).map(tracer.trace):
                origin = replace(part.provenance, model=self.origin[0], data=self.origin[1], seed=config.seed)
                yield replace(part, provenance=origin)
                done += len(part)
                progress(done, len(self.data), data.reading)

    def compare(self, samples: int) -> Comparison:
        """The first samples, against the oracle."""
        chosen = [[row] for row in range(min(samples, len(self.data)))]
        batches = list(ImageBatches(self.data, 1, batches=chosen))
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        device, dtype = placement(self.network)
        images, labels = images.to(device, dtype), labels.to(device)
        clean = images if self.config.follows_noise else None
        if self.attack is not None:
            images = self.attack(self.network, images, labels)
        return compare(
            self.network,
            images,
            labels,
            self.width,
            clean=clean,
            linear=self.config.linear,
            autocast=self.autocast,
            sketches=self.config.sketches,
            seed=self.config.seed,
            freeze_gates=self.config.freeze_gates,
        )
