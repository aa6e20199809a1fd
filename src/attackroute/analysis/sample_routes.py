"""Routes of samples by the paper's rule and by simple ones, from one reading of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attackroute.analysis.channel_means import Measure, activations, gradients
from attackroute.analysis.passes import PassCount
from attackroute.analysis.rankings import ROUTE
from attackroute.core.batches import BatchStream, Data
from attackroute.core.model_state import frozen
from attackroute.robustness.attack import Attack, attacked
from attackroute.routes.instance_routes import InstanceRoutes, InstanceRoutesBuilder
from attackroute.routes.masks import top_k
from attackroute.routes.provenance import Provenance
from attackroute.tracing.noise import NOISE, UNIT
from attackroute.tracing.sketches import Sketches
from attackroute.tracing.trace import Progress, RouteTracer

SAMPLE_RIVALS: Mapping[str, Measure] = {"activation": activations, "gradient": gradients}
"""Criteria that rank the channels for one sample."""


def sample_routes(
    model: nn.Module,
    data: Data,
    width: float = 0.2,
    *,
    attack: Attack | None = None,
    rivals: Sequence[str] = tuple(SAMPLE_RIVALS),
    noise_of: Attack | None = None,
    linear: bool = False,
    sketches: Sketches = None,
    batch_size: int = 128,
    passes: PassCount | None = None,
    progress: Progress | None = None,
) -> dict[str, InstanceRoutes]:
    """The routes of samples by several criteria, the paper's under ``"route"``.

    Args:
        model: The network; runs in eval mode and comes back as it was.
        data: Images, with labels or without; then the model's own predictions take their place.
        width: Share of each layer's channels on a sample's route.
        attack: Trace what this makes of the images.
        rivals: Of :data:`SAMPLE_RIVALS`; each costs one more forward pass.
        noise_of: The attack whose noise the routes follow; None for the paper's routes of the images themselves.
        linear: Whether linear maps are route layers too.
        sketches: As :func:`attackroute.trace_routes` takes them: approximate.
        batch_size: Rows per forward pass when ``data`` is tensors.
        passes: Counts the model's forward passes.
        progress: Called after every batch with the samples done.

    Returns:
        Instance routes by criterion, all of the same samples in the same order.
    """
    parts: list[dict[str, InstanceRoutes]] = []
    done = 0
    with frozen(model), torch.inference_mode(False):
        stream = BatchStream(model, data, batch_size)
        router = SampleRouter.probe(
            model, stream.first[0], width, rivals=rivals, noise_of=noise_of, linear=linear, sketches=sketches
        )

        def once(images: Tensor, labels: Tensor | None) -> dict[str, InstanceRoutes]:
            return router.routes(*((images, labels) if attack is None else attacked(model, attack, images, labels)))

        for part in (passes or PassCount()).map(stream, once):
            parts.append(part)
            done += len(part[ROUTE])
            if progress is not None:
                progress(done, stream.total)
    return joined_routes(parts)


@dataclass(frozen=True)
class SampleRouter:
    """Routes of one batch after another, by several criteria; see :func:`sample_routes`. The model is held frozen."""

    model: nn.Module
    tracer: RouteTracer
    width: float
    rivals: Sequence[str]
    linear: bool

    @classmethod
    def probe(
        cls,
        model: nn.Module,
        images: Tensor,
        width: float,
        *,
        rivals: Sequence[str] = tuple(SAMPLE_RIVALS),
        noise_of: Attack | None = None,
        linear: bool = False,
        sketches: Sketches = None,
    ) -> SampleRouter:
        """Learn the model's layers from some images."""
        carrier = UNIT if noise_of is None else NOISE
        tracer = RouteTracer.probe(
            model, images, width, attack=noise_of, carrier=carrier, linear=linear, sketches=sketches
        )
        return cls(model, tracer, width, rivals, linear)

    def routes(self, images: Tensor, labels: Tensor | None) -> dict[str, InstanceRoutes]:
        """Instance routes by criterion, on the CPU."""
        found = {ROUTE: self.tracer.trace(images, labels)}
        for by in self.rivals:
            measured = SAMPLE_RIVALS[by](self.model, images, labels, linear=self.linear).values
            sizes = {layer: values.shape[1] for layer, values in measured.items()}
            builder = InstanceRoutesBuilder(list(sizes), sizes, self.width)
            builder.add({layer: top_k(values, self.width) for layer, values in measured.items()}, labels, None)
            found[by] = builder.build({}, Provenance(len(images), self.width, criterion=by))
        return found


def joined_routes(parts: Sequence[Mapping[str, InstanceRoutes]]) -> dict[str, InstanceRoutes]:
    """The samples of several batches, one after another."""
    return {by: InstanceRoutes.concatenate([part[by] for part in parts]) for by in parts[0]}
