"""What a trace costs on well-known architectures, how it is computed there, and how near it is to the oracle.

Times are of the full networks with random weights. The oracle takes hours on those, so it is compared on networks of
the same blocks with few channels and small images (:mod:`benchmarks.small_networks`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torchvision import models

from attackroute.core.model_state import frozen
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.masks import kept, top_k
from attackroute.tracing import oracle
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.segments import Segments
from attackroute.tracing.structure import CLOSED_FORM, Structure
from attackroute.tracing.trace import trace_routes
from attackroute.zoo.networks import build_model
from benchmarks import small_networks as small
from benchmarks.cases import ARCHITECTURES as CASE
from benchmarks.cases import Plan, adapt_batch_norms, seeded
from benchmarks.timing import SECONDS, Measurement, Spread, Stopclock

LIMIT = 40.0
"""Ratio of a trace's time to a plain forward pass's that ViT-B/16 and EfficientNet-B0 are to keep."""

BATCH_SIZE = 2
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
        reduced: Gives the reduced network, with 5 logits.
        image_size: Height and width of the full network's images.
        reduced_size: Of the reduced one's.
        linear: Whether linear maps are route layers.
        limit: Ratio to a forward pass that is to be kept, if one was set.
        needs: A package that has to be installed.
    """

    name: str
    build: Callable[[], nn.Module]
    reduced: Callable[[], nn.Module]
    image_size: int = 224
    reduced_size: int = 16
    linear: bool = False
    limit: float | None = None
    needs: str | None = None


def _from(name: str, size: int = 224) -> Callable[[], nn.Module]:
    return lambda: build_model(name, num_classes=_CLASSES, image_size=size)


ARCHITECTURES = (
    Architecture("EfficientNet-B0", _from("torchvision:efficientnet_b0"), small.efficientnet, limit=LIMIT),
    Architecture("MobileNetV3-L", _from("torchvision:mobilenet_v3_large"), small.mobilenet_v3),
    Architecture("RegNetY-400MF", _from("torchvision:regnet_y_400mf"), small.regnet),
    Architecture("DenseNet-121", _from("torchvision:densenet121"), small.densenet),
    Architecture("GoogLeNet", _from("torchvision:googlenet"), small.googlenet, reduced_size=12),
    Architecture(
        "Inception-v3", _from("torchvision:inception_v3", 299), small.inception, image_size=299, reduced_size=10
    ),
    Architecture(
        "ResNet-50, GroupNorm", lambda: models.resnet50(norm_layer=partial(nn.GroupNorm, 32)), small.resnet_group_norm
    ),
    Architecture("ConvNeXt-T", _from("torchvision:convnext_tiny"), small.convnext),
    Architecture("ConvNeXt-T, linear", _from("torchvision:convnext_tiny"), small.convnext, linear=True),
    Architecture("Swin-T, linear", _from("torchvision:swin_t"), small.swin, linear=True),
    Architecture("ViT-B/16, linear", _from("torchvision:vit_b_16"), small.vit, linear=True, limit=LIMIT),
    Architecture("DeiT-S/16, linear", _from("timm:deit_small_patch16_224"), small.deit, linear=True, needs="timm"),
)


_SKETCHES = 32
HEADER = [
    "network",
    "route layers",
    "edges",
    "closed form",
    "trace / forward",
    "exact / forward",
    "deviation",
    "routes found",
]
NOTE = (
    f"trace / forward: with {_SKETCHES} sketches where an edge has no closed form (approximate), the look at the "
    "structure included. exact / forward: by vector-Jacobian products instead, extrapolated from some of them. "
    "deviation: largest relative distance of the exact scores from the oracle's, at reduced size, float64. routes "
    f"found: share of the oracle's critical channels that a trace with {_SKETCHES} sketches finds, likewise."
)


@dataclass(frozen=True)
class ReducedComparison:
    """A reduced network beside the oracle.

    Attributes:
        deviation: Of the exact trace's scores from the oracle's in double precision, the largest, each relative to the
            largest of its layer.
        agreement: Share of the oracle's critical channels that the trace with 32 sketches finds.
    """

    deviation: float
    agreement: float


@dataclass(frozen=True)
class ArchitectureResult:
    """What was measured of one architecture.

    Attributes:
        name: Of the architecture.
        layers: Number of route layers.
        closed: For each edge, whether it has a closed form.
        forward: Seconds of plain inference.
        trace: Of a trace with 32 sketches where an edge has no closed form, the look at the structure included.
        exact: Seconds of the exact products of one batch, extrapolated from some at each target; 0 where all is closed.
        reduced: At reduced size.
        limit: Ratio to a forward pass that is to be kept, if one was set.
    """

    name: str
    layers: int
    closed: tuple[bool, ...]
    forward: Spread
    trace: Spread
    exact: float
    reduced: ReducedComparison
    limit: float | None = None

    @property
    def exact_ratio(self) -> float:
        """Exact trace / plain forward pass, extrapolated; where all is closed, that of the trace."""
        return self.exact / self.forward.median if self.exact else (self.trace / self.forward).median

    def measurements(self) -> list[Measurement]:
        """All that was measured."""
        name, bound = f"{CASE}, {self.name}", "" if self.limit is None else f"at most {self.limit:g}"
        numbers = {
            "exact / forward, extrapolated": self.exact_ratio,
            "route layers": self.layers,
            "edges": len(self.closed),
            "edges in closed form": sum(self.closed),
            "largest deviation from the oracle": self.reduced.deviation,
            "share of the oracle's routes found": self.reduced.agreement,
        }
        return [
            Measurement(name, "trace / forward", self.trace / self.forward, bound=bound),
            Measurement(name, "forward", self.forward, SECONDS),
            Measurement(name, "trace", self.trace, SECONDS),
            *(Measurement(name, what, Spread((value,))) for what, value in numbers.items()),
        ]

    def cells(self) -> list[str]:
        """A row under :data:`HEADER`."""
        ratio = self.trace / self.forward
        return [
            self.name,
            str(self.layers),
            str(len(self.closed)),
            f"{sum(self.closed) / len(self.closed):.0%}",
            f"{ratio.median:.1f} ({ratio.low:.1f}-{ratio.high:.1f})",
            f"{self.exact_ratio:,.0f}" if self.exact else "the same",
            f"{self.reduced.deviation:.0e}",
            "all, exact" if all(self.closed) else f"{self.reduced.agreement:.0%}",
        ]


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
    with seeded(plan.seed):
        model = architecture.build().to(plan.device)
        size = (plan.batch_size or BATCH_SIZE, 3, architecture.image_size, architecture.image_size)
        images = torch.rand(size).to(plan.device)
        adapt_batch_norms(model, images)
    model.eval()
    clock = Stopclock.of(plan.device)
    config = TraceConfig(linear=architecture.linear, sketches=_SKETCHES)

    def forward() -> None:
        with torch.no_grad():
            model(images)

    runs = clock.interleaved(
        {"forward": forward, "trace": lambda: trace_routes(model, images, _WIDTH, config=config)}, plan.turns, advance
    )
    with frozen(model):
        structure, _ = Structure.probe(model, images, linear=architecture.linear)
        exact = _exact_seconds(model, images, structure, architecture.linear, clock)
    closed = tuple(method == CLOSED_FORM for method in structure.methods.values())
    return ArchitectureResult(
        architecture.name, len(structure.names), closed, exact=exact, **runs,
        reduced=compare_reduced(architecture, plan.seed), limit=architecture.limit,
    )  # fmt: skip


def compare_reduced(architecture: Architecture, seed: int = 0) -> ReducedComparison:
    """Compare the exact trace and sketches with the oracle, at reduced size."""
    size = architecture.reduced_size
    with seeded(seed):
        model = architecture.reduced().double()
        images = torch.rand(_SMALL_SAMPLES, 3, size, size, dtype=torch.float64)
        adapt_batch_norms(model, images)
    model.eval()
    expected = oracle.trace(model, images, width=_WIDTH, linear=architecture.linear)

    def traced(config: TraceConfig) -> InstanceRoutes:
        return trace_routes(model, images, _WIDTH, config=config, keep_scores=True)

    exact = TraceConfig(linear=architecture.linear)
    scores = traced(exact).scores
    deviation = max(
        float((scores[layer] - true).abs().max() / true.max().clamp_min(1e-300))
        for layer, true in expected.scores.items()
    )

    def agreement(routes: InstanceRoutes) -> float:
        shared = sum(int((mask & expected.masks[layer]).sum()) for layer, mask in routes.masks.items())
        return shared / sum(int(mask.sum()) for mask in expected.masks.values())

    return ReducedComparison(deviation, agreement(traced(replace(exact, sketches=_SKETCHES, seed=seed))))


def markdown_table(results: Sequence[ArchitectureResult], environment: str) -> str:
    """The table as Markdown, and below it on what it was measured."""
    lines = [HEADER, ["---"] * len(HEADER), *(result.cells() for result in results)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{environment}\n\n{NOTE}\n"


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
