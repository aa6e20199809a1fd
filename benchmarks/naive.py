"""The time of a trace against Eqs. (1)-(5) the naive way, of which only a random part is run; for chains.

The score of Eq. (5) is a sum over the critical neurons of the next layer, their positions z included, of
``sum_s |dZ'[z] / dZ[s]|``. Both ways here take such a derivative for each z, one by one or a batch at a time; given
some of the elements z they give that part of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from attackroute.tracing.trace import trace_routes
from attackroute.zoo.networks import ChainNet
from benchmarks.cases import NAIVE, SPEED_CASES, Plan, seeded, workload
from benchmarks.timing import SECONDS, Measurement, Spread, Stopclock, interleaved

AIM = 1000.0
"""How many times faster than the naive way a trace is to be, at least."""

PAPER_HOURS = 7.4
PAPER_IMAGES = 10_000
"""Li et al. (2021), section 3.5: VGG-16 on CIFAR-10, on one GTX 1080."""

_PRODUCTS = 16  # of autograd.grad, in each layer and turn
_QUICK_PRODUCTS = 4
_ROWS = 256  # most rows of a Jacobian at a time
_ELEMENTS = 1 << 22  # and most elements


@dataclass(frozen=True, eq=False)
class Segment:
    """Two adjacent layers of a chain at one sample, and what lies between them.

    Attributes:
        source: Name of the earlier layer.
        target: Name of the later layer.
        run: From ``Z`` of the source to ``Z'`` of the target.
        start: ``Z``, (1, C, H, W), a leaf of the graph.
        end: ``Z'``, (1, C', H', W'), with the graph to ``start``.
    """

    source: str
    target: str
    run: nn.Module
    start: Tensor
    end: Tensor

    def elements(self, critical: Tensor) -> Tensor:
        """Flat indices in ``end`` of all positions of critical neurons, bool (C',)."""
        return critical.view(-1, 1).expand(-1, self.end[0, 0].numel()).flatten().nonzero().flatten()


def chain_segments(model: ChainNet, image: Tensor) -> list[Segment]:
    """Cut a chain at its convolutions.

    Args:
        model: In eval mode; its ``features`` are a sequence of modules, no two convolutions without an operation that
            is out of place between them.
        image: (1, C, H, W).
    """
    features = model.features
    assert isinstance(features, nn.Sequential)
    cuts = [index for index, module in enumerate(features) if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        value = features[: cuts[0] + 1](model.normalise(image))
    segments = []
    for before, after in pairwise(cuts):
        run = features[before + 1 : after + 1]
        start = value.detach().requires_grad_()
        end = run(start)
        segments.append(Segment(source=f"features.{before}", target=f"features.{after}", run=run, start=start, end=end))
        value = end
    return segments


def by_autograd(segment: Segment, elements: Tensor) -> Tensor:
    """Part of Eq. (5) from these elements, by one call of ``torch.autograd.grad`` each: (C,)."""
    total = segment.start.new_zeros(segment.start.shape[1])
    flat = segment.end.flatten()
    for element in elements.tolist():
        (gradient,) = torch.autograd.grad(flat[element], segment.start, retain_graph=True)
        total += gradient.abs().sum((0, 2, 3))
    return total


def by_jacrev(segment: Segment, elements: Tensor) -> Tensor:
    """Part of Eq. (5) from these elements, by ``torch.func.jacrev``, which batches them with ``vmap``: (C,)."""
    total = segment.start.new_zeros(segment.start.shape[1])
    for rows in elements.split(chunk_rows(segment)):
        jacobian = torch.func.jacrev(_rows_of(segment.run, rows))(segment.start.detach())
        total += jacobian.abs().sum((0, 1, 3, 4))
    return total


def chunk_rows(segment: Segment) -> int:
    """Rows of the Jacobian that :func:`by_jacrev` computes at a time."""
    return max(1, min(_ROWS, _ELEMENTS // segment.start.numel()))


def _rows_of(run: nn.Module, rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda start: run(start).flatten()[rows]


NaiveWay = Callable[[Segment, Tensor], Tensor]


def measure_naive(plan: Plan, advance: Callable[[], None] = lambda: None) -> list[Measurement]:
    """Measure a trace, and a random part of the naive way on the first image's critical neurons.

    The naive way's forward pass and ranking are left out, to its advantage.

    Args:
        plan: Repeats, sizes, device, seed.
        advance: Called after every turn.
    """
    case = SPEED_CASES[0]
    load = workload(case, plan.batch_size or case.batch_size, plan.batches, seed=plan.seed, device=plan.device)
    assert isinstance(load.model, ChainNet)
    image = load.batches[0][0][:1]
    masks = trace_routes(load.model, image).masks
    segments = chain_segments(load.model, image)
    critical = {segment.target: segment.elements(masks[segment.target][0]).to(plan.device) for segment in segments}
    most = _QUICK_PRODUCTS if plan.quick else _PRODUCTS
    ways: dict[str, tuple[NaiveWay, list[int]]] = {
        "autograd": (by_autograd, [min(most, len(critical[segment.target])) for segment in segments]),
        "jacrev": (by_jacrev, [min(chunk_rows(segment), len(critical[segment.target])) for segment in segments]),
    }
    clock = Stopclock.of(plan.device)
    measurements: dict[str, Callable[[], float]] = {
        "trace": lambda: clock.seconds(lambda: trace_routes(load.model, load.batches)) / load.images,
        **{
            name: sampled(segments, critical, sizes, way, clock) for name, (way, sizes) in ways.items()
        },
    }  # fmt: skip
    with seeded(plan.seed):
        runs = interleaved(measurements, plan.turns, advance)
    timed = {name: sum(sizes) for name, (_, sizes) in ways.items()}
    return naive_measurements(runs, timed, sum(map(len, critical.values())))


def naive_measurements(runs: Mapping[str, Spread], timed: Mapping[str, int], products: int) -> list[Measurement]:
    """Ratios, times, and the paper's job at this pace.

    Args:
        runs: Seconds for one image, of ``"trace"`` and of the naive ways.
        timed: Of each naive way, how many products each repeat was extrapolated from.
        products: Vector-Jacobian products for one image.
    """
    aim = f"at least {AIM:,.0f} is the aim"
    return [
        *(Measurement(NAIVE, f"{way} / trace", runs[way] / runs["trace"], bound=aim) for way in timed),
        Measurement(NAIVE, "trace, one image", runs["trace"], SECONDS),
        *(
            Measurement(NAIVE, f"{way}, one image, extrapolated from {count:,} of {products:,} products", runs[way],
                        SECONDS)
            for way, count in timed.items()
        ),
        Measurement(
            NAIVE, f"trace, {PAPER_IMAGES:,} images, extrapolated", runs["trace"].times(PAPER_IMAGES), SECONDS,
            bound=f"as published, GTX 1080: {PAPER_HOURS} hours",
        ),
    ]  # fmt: skip


def sampled(
    segments: Sequence[Segment], critical: Mapping[str, Tensor], sizes: Sequence[int], way: NaiveWay, clock: Stopclock
) -> Callable[[], float]:
    """A measurement of some products of each layer, drawn anew every time, extrapolated to all of them.

    Args:
        segments: The chain at one sample.
        critical: Target -> the elements whose derivatives are wanted.
        sizes: How many of them are drawn in each segment.
        way: Computes the derivatives of the elements that it is given.
        clock: Times them.

    Returns:
        Gives seconds for all the wanted elements, taking time to be proportional to their number in each layer.
    """

    def measure() -> float:
        total = 0.0
        for segment, size in zip(segments, sizes, strict=True):
            elements = critical[segment.target]
            chosen = elements[torch.randperm(len(elements))[:size].to(elements.device)]
            way(segment, chosen[:1])  # the layer's data come into the caches
            taken = clock.seconds(lambda segment=segment, chosen=chosen: way(segment, chosen))  # type: ignore[misc]
            total += taken / size * len(elements)
        return total

    return measure
