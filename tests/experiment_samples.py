"""A small network, images and routes for the tests of experiments, and slow ways to the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from architectures import chain, randomised
from attackroute.analysis.controls import Comparison
from attackroute.analysis.criteria import ChannelScores, channel_scores
from attackroute.analysis.gradcam import layer_evidence
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.route import Route
from attackroute.tracing.trace import trace_routes


@dataclass(frozen=True, eq=False)
class Case:
    """A network with a route from some samples, and others to measure on."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    reference: tuple[Tensor, Tensor]
    routes: InstanceRoutes
    route: Route
    weight: ChannelScores

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.images, self.labels

    def compared(self, **options: Any) -> Comparison:
        """The route beside random channels alone, unless options name baselines."""
        return Comparison(**{"model": self.model, "data": self.data, "route": self.route, **options})

    def right(self) -> Tensor:
        """Indices of the samples that the network gets right, one at a time."""
        with torch.no_grad():
            return torch.tensor([i for i in range(len(self.images)) if self.predict(self.images[i]) == self.labels[i]])

    def predict(self, image: Tensor) -> int:
        with torch.no_grad():
            return int(self.model(image[None]).argmax())


def make_case(samples: int = 30, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    model = randomised(chain()).eval()
    images = torch.rand(2 * samples, 3, 13, 13)
    with torch.no_grad():
        logits = model(images)
        logits -= logits.mean(0)
        model[12].fc.bias -= model(images).mean(0)  # so that every class is seen
        labels = model(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 5  # some samples that the network gets wrong
    reference = images[samples:], labels[samples:]
    routes = trace_routes(model, reference)
    weight = channel_scores(model, reference, "weight")
    return Case(model, images[:samples], labels[:samples], reference, routes, routes.aggregate(0.3), weight)


def shifted(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """An attack that no batch can change: one signed gradient step, a sample at a time."""
    rows = []
    for image, label in zip(x, y, strict=True):
        leaf = image[None].clone().requires_grad_()
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(model(leaf), label[None])
            (gradient,) = torch.autograd.grad(loss, leaf)
        rows.append((image + 0.3 * gradient[0].sign()).clamp(0, 1))
    return torch.stack(rows)


def grad_cam(
    model: nn.Module, images: Tensor, layer: str, channels: Sequence[int] | Tensor | None = None, **options: Any
) -> Tensor:
    """Grad-CAM of some channels of a layer, or of all, ``(N, H, W)``."""
    evidence = layer_evidence(model, images, layer, **options)
    mask = torch.zeros(1, evidence.maps.shape[1], dtype=torch.bool)
    mask[:, slice(None) if channels is None else list(map(int, channels))] = True
    return evidence.cams(mask)[0]


@contextmanager
def counting(model: nn.Module) -> Iterator[list[int]]:
    """Sizes of the batches that run forward."""
    sizes: list[int] = []
    handle = model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    try:
        yield sizes
    finally:
        handle.remove()
