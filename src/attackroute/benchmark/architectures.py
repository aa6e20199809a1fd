"""What a trace costs on well-known architectures, how it is computed there, and how near it is to the oracle.

Times are of the full networks with random weights. The oracle takes hours on those, so it is compared on networks of
the same blocks with few channels and small images (:mod:`attackroute.benchmark.small_networks`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models

from attackroute.benchmark import small_networks
from attackroute.benchmark.cases import adapt_batch_norms, seeded
from attackroute.benchmark.plan import Plan
from attackroute.benchmark.timing import Runs, Spread, Stopclock, interleaved
from attackroute.core.model_state import frozen
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.masks import kept, top_k
from attackroute.tracing import oracle
from attackroute.tracing.frozen_gates import FrozenGates
from attackroute.tracing.segments import Segments
from attackroute.tracing.sketches import FIRST_SKETCHES
from attackroute.tracing.structure import CLOSED_FORM, Structure
from attackroute.tracing.trace import trace_routes
from attackroute.zoo.registry import build_model

LIMIT = 40.0
"""Ratio of a trace's time to a plain forward pass's that ViT-B/16 and EfficientNet-B0 are to keep."""

_WIDTH = 0.2
_CLASSES = 1000
_PRODUCTS = 8  # of the exact way, timed at each target
_SMALL_SAMPLES = 2


@dataclass(frozen=True)
class Architecture:
    """A network at full and at reduced size.

    Attributes:
        name: As in the table.
        build: Gives the full network.
        image_size: Height and width of its images.
        linear: Whether linear maps are route layers.
        reduced: Gives the reduced network, with 5 logits.
        reduced_size: Height and width of its images.
        limit: Ratio to a forward pass that is to be kept, if one was set.
        needs: A package that has to be installed.
    """

    name: str
    build: Callable[[], nn.Module]
    image_size: int
    linear: bool
    reduced: Callable[[], nn.Module]
    reduced_size: int
    limit: float | None = None
    needs: str | None = None


def _from(name: str, size: int = 224) -> Callable[[], nn.Module]:
    return lambda: build_model(name, num_classes=_CLASSES, image_size=size)


ARCHITECTURES = (
    Architecture(
        "EfficientNet-B0",
        _from("torchvision:efficientnet_b0"),
        224,
        False,
        small_networks.efficientnet,
        16,
        limit=LIMIT,
    ),
    Architecture("MobileNetV3-L", _from("torchvision:mobilenet_v3_large"), 224, False, small_networks.mobilenet_v3, 16),
    Architecture("RegNetY-400MF", _from("torchvision:regnet_y_400mf"), 224, False, small_networks.regnet, 16),
    Architecture("DenseNet-121", _from("torchvision:densenet121"), 224, False, small_networks.densenet, 16),
    Architecture("GoogLeNet", _from("torchvision:googlenet"), 224, False, small_networks.googlenet, 12),
    Architecture("Inception-v3", _from("torchvision:inception_v3", 299), 299, False, small_networks.inception, 10),
    Architecture(
        "ResNet-50, GroupNorm",
        lambda: models.resnet50(norm_layer=partial(nn.GroupNorm, 32)),
        224,
        False,
        small_networks.resnet_group_norm,
        16,
    ),
    Architecture("ConvNeXt-T", _from("torchvision:convnext_tiny"), 224, False, small_networks.convnext, 16),
    Architecture("ConvNeXt-T, linear", _from("torchvision:convnext_tiny"), 224, True, small_networks.convnext, 16),
    Architecture("Swin-T, linear", _from("torchvision:swin_t"), 224, True, small_networks.swin, 16),
    Architecture("ViT-B/16, linear", _from("torchvision:vit_b_16"), 224, True, small_networks.vit, 16, limit=LIMIT),
    Architecture(
        "DeiT-S/16, linear", _from("timm:deit_small_patch16_224"), 224, True, small_networks.deit, 16, needs="timm"
    ),
)


@dataclass(frozen=True)
class ArchitectureResult:
    """What was measured of one architecture.

    Attributes:
        architecture: What was measured.
        batch_size: Images in the batch.
        layers: Number of route layers.
        edges: Number of edges.
        closed: Number of edges in closed form.
        forward: Plain inference.
        trace: A trace with 32 sketches where an edge has no closed form, the look at the structure included.
        exact: Seconds of the exact products of one batch, extrapolated from some at each target; 0 where all is closed.
        deviation: Of the exact trace's scores from the oracle's at reduced size in double precision, the largest, each
            relative to the largest of its layer.
        agreement: At reduced size, share of the oracle's critical channels that the trace with 32 sketches finds.
        frozen_edges: Number of edges with frozen gates.
        frozen_closed: Number of them in closed form.
        frozen_agreement: As ``agreement``, for an exact trace with frozen gates.
    """

    architecture: Architecture
    batch_size: int
    layers: int
    edges: int
    closed: int
    forward: Runs
    trace: Runs
    exact: float
    deviation: float
    agreement: float
    frozen_edges: int
    frozen_closed: int
    frozen_agreement: float

    @property
    def ratio(self) -> Spread:
        """Trace / plain forward pass."""
        return Spread.of_ratios(self.trace.totals, self.forward.totals)

    @property
    def exact_ratio(self) -> float:
        """Exact trace / plain forward pass, extrapolated; where all is closed, that of the trace."""
        return self.exact / Spread(self.forward.totals).median if self.exact else self.ratio.median

    def to_json(self) -> dict[str, Any]:
        """All that was measured."""
        return {
            "architecture": self.architecture.name,
            "image_size": self.architecture.image_size,
            "linear": self.architecture.linear,
            "batch_size": self.batch_size,
            "route_layers": self.layers,
            "edges": self.edges,
            "closed_form_edges": self.closed,
            "sketches": FIRST_SKETCHES if self.closed < self.edges else None,
            "trace_to_forward": self.ratio.to_json(),
            "limit": self.architecture.limit,
            "exact_to_forward_extrapolated": self.exact_ratio,
            "largest_deviation_from_oracle": self.deviation,
            "share_of_oracle_routes_found": self.agreement,
            "frozen_gates": {
                "edges": self.frozen_edges,
                "closed_form_edges": self.frozen_closed,
                "share_of_oracle_routes_found": self.frozen_agreement,
            },
            "seconds": {"forward": list(self.forward.totals), "trace": list(self.trace.totals)},
        }


def available(plan: Plan) -> tuple[Architecture, ...]:
    """The architectures that can be built here; of a quick plan only those with a limit."""
    return tuple(
        architecture
        for architecture in ARCHITECTURES
        if (architecture.needs is None or importlib.util.find_spec(architecture.needs) is not None)
        and (architecture.limit is not None or not plan.quick)
    )


def measure_architecture(
    architecture: Architecture, plan: Plan, advance: Callable[[], None] = lambda: None
) -> ArchitectureResult:
    """Measure one architecture, its exact way in part.

    Args:
        architecture: What to measure.
        plan: Repeats, sizes, device, seed.
        advance: Called after every turn.
    """
    samples = plan.batch_size or 2
    with seeded(plan.seed):
        model = architecture.build().to(plan.device)
        images = torch.rand(samples, 3, architecture.image_size, architecture.image_size).to(plan.device)
        adapt_batch_norms(model, images)
    model.eval()
    clock = Stopclock.of(plan.device)

    def forward() -> None:
        with torch.no_grad():
            model(images)

    runs = interleaved(
        {
            "forward": clock.whole(forward),
            "trace": clock.whole(
                lambda: trace_routes(model, images, _WIDTH, linear=architecture.linear, sketches=FIRST_SKETCHES)
            ),
        },
        plan.turns,
        advance,
    )
    with frozen(model):
        structure, _ = Structure.probe(model, images, linear=architecture.linear)
        exact = _exact_seconds(model, images, structure, architecture.linear, clock)
        with FrozenGates():
            frozen_structure, _ = Structure.probe(model, images, linear=architecture.linear)
    ways, frozen_ways = list(structure.methods.values()), list(frozen_structure.methods.values())
    reduced = compare_reduced(architecture, plan.seed)
    return ArchitectureResult(
        architecture,
        samples,
        len(structure.names),
        len(ways),
        ways.count(CLOSED_FORM),
        runs["forward"],
        runs["trace"],
        exact,
        reduced.deviation,
        reduced.agreement,
        len(frozen_ways),
        frozen_ways.count(CLOSED_FORM),
        reduced.frozen_agreement,
    )


@dataclass(frozen=True)
class ReducedComparison:
    """A reduced network beside the oracle; attributes as of :class:`ArchitectureResult`."""

    deviation: float
    agreement: float
    frozen_agreement: float


def compare_reduced(architecture: Architecture, seed: int = 0) -> ReducedComparison:
    """Compare the exact trace, sketches and frozen gates with the oracle, at reduced size."""
    size = architecture.reduced_size
    with seeded(seed):
        model = architecture.reduced().double()
        images = torch.rand(_SMALL_SAMPLES, 3, size, size, dtype=torch.float64)
        adapt_batch_norms(model, images)
    model.eval()
    trace = partial(trace_routes, model, images, _WIDTH, linear=architecture.linear)
    expected = oracle.trace(model, images, width=_WIDTH, linear=architecture.linear)
    found = trace(keep_scores=True)
    deviation = max(
        float((found.scores[layer] - scores).abs().max() / scores.max().clamp_min(1e-300))
        for layer, scores in expected.scores.items()
    )

    def agreement(routes: InstanceRoutes) -> float:
        shared = sum(int((routes.masks[layer] & mask).sum()) for layer, mask in expected.masks.items())
        return shared / sum(int(mask.sum()) for mask in expected.masks.values())

    return ReducedComparison(
        deviation, agreement(trace(sketches=FIRST_SKETCHES, seed=seed)), agreement(trace(freeze_gates=True))
    )


def _exact_seconds(
    model: nn.Module, images: torch.Tensor, structure: Structure, linear: bool, clock: Stopclock
) -> float:
    """Time of all products of the exact way for one batch, from a few of them at each target."""
    edges = structure.jacobian_edges
    if not edges:
        return 0.0
    segments = Segments(model, images, edges, linear=linear)
    total = 0.0
    for target in edges:
        channels = structure.channels[target]
        critical = top_k(torch.rand(len(images), channels, device=images.device), _WIDTH)
        number = kept(_WIDTH, channels) * segments.positions(target)
        part = min(_PRODUCTS, number)
        taken = clock.seconds(partial(segments.scores, target, critical, most=part))
        total += taken / part * number
    return total
