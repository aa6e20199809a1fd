"""Routes of samples by the paper's rule and by simple ones, from one reading of the images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from attackroute.attacks.application import Attack
from attackroute.builder import InstanceRoutesBuilder
from attackroute.channel_means import Measure, activations, gradients
from attackroute.experiments.rankings import ROUTE
from attackroute.instances import InstanceRoutes
from attackroute.layers import frozen
from attackroute.noise import NOISE, UNIT
from attackroute.provenance import Provenance
from attackroute.selection import top_k
from attackroute.sketches import Sketches
from attackroute.streams import batches
from attackroute.trace import Progress, trace_routes

SAMPLE_RIVALS: Mapping[str, Measure] = {"activation": activations, "gradient": gradients}
"""Criteria that rank the channels for one sample."""


def sample_routes(
    model: nn.Module,
    data: Iterable[tuple[Tensor, Tensor | None]],
    width: float = 0.2,
    *,
    rivals: Sequence[str] = tuple(SAMPLE_RIVALS),
    noise_of: Attack | None = None,
    linear: bool = False,
    sketches: Sketches = None,
    progress: Progress | None = None,
) -> dict[str, InstanceRoutes]:
    """The routes of a stream of samples by several criteria, the paper's under ``"route"``.

    Args:
        model: The network; runs in eval mode and comes back as it was.
        data: Batches of ``(images, labels)``; labels None for the model's own predictions.
        width: Share of each layer's channels on a sample's route.
        rivals: Of :data:`SAMPLE_RIVALS`; each costs one more forward pass.
        noise_of: The attack whose noise the routes follow; None for the paper's routes of the images themselves.
        linear: Whether linear maps are route layers too.
        sketches: As :func:`attackroute.trace_routes` takes them: approximate.
        progress: Called after every batch with the samples done.

    Returns:
        Instance routes by criterion, all of the same samples in the same order.
    """
    builders: dict[str, InstanceRoutesBuilder] = {}

    def stream() -> Iterator[tuple[Tensor, Tensor] | Tensor]:
        for images, labels in batches(model, data, 1):
            for by in rivals:
                measured = SAMPLE_RIVALS[by](model, images, labels, linear=linear).values
                if by not in builders:
                    sizes = {layer: values.shape[1] for layer, values in measured.items()}
                    builders[by] = InstanceRoutesBuilder(list(sizes), sizes, width)
                masks = {layer: top_k(values, width) for layer, values in measured.items()}
                builders[by].add(masks, labels, None)
            yield images if labels is None else (images, labels)

    with frozen(model), torch.inference_mode(False):
        routes = trace_routes(
            model, stream(), width, attack=noise_of, carrier=UNIT if noise_of is None else NOISE,
            linear=linear, sketches=sketches, progress=progress,
        )  # fmt: skip
    found = {ROUTE: routes}
    for by in rivals:
        found[by] = builders[by].build({}, Provenance(len(found[ROUTE]), width, criterion=by))
    return found
