"""The time of a trace against the naive way, of which only a random part is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attackroute.benchmark.cases import SPEED_CASES, seeded, workload
from attackroute.benchmark.naive import Segment, by_autograd, by_jacrev, chain_segments, chunk_rows
from attackroute.benchmark.plan import Plan
from attackroute.benchmark.timing import Parts, Runs, Spread, Stopclock, interleaved
from attackroute.tracing.trace import trace_routes
from attackroute.zoo.chain import ChainNet

AIM = 1000.0
"""How many times faster than the naive way a trace is to be, at least."""

PAPER_HOURS = 7.4
PAPER_IMAGES = 10_000
"""Li et al. (2021), section 3.5: VGG-16 on CIFAR-10, on one GTX 1080."""

_PRODUCTS = 16  # of autograd.grad, in each layer and turn
_QUICK_PRODUCTS = 4

NaiveWay = Callable[[Segment, Tensor], Tensor]


@dataclass(frozen=True)
class LayerWork:
    """The vector-Jacobian products of one edge, for one sample.

    Attributes:
        source: Name of the earlier layer.
        target: Name of the later layer.
        products: How many there are: critical neurons of the later layer times positions.
        autograd: How many were timed in each turn, one by one.
        jacrev: How many were timed in each turn, as one batch.
    """

    source: str
    target: str
    products: int
    autograd: int
    jacrev: int


@dataclass(frozen=True)
class NaiveResult:
    """VGG-16 at 32x32: seconds for one image.

    Attributes:
        batch_size: Images a batch of the trace.
        layers: The work by layer.
        trace: Time of a trace, per image.
        autograd: Time of per-channel ``torch.autograd.grad``, extrapolated, by target layer.
        jacrev: Time of ``torch.func.jacrev``, extrapolated, by target layer.
    """

    batch_size: int
    layers: tuple[LayerWork, ...]
    trace: Runs
    autograd: Runs
    jacrev: Runs

    @property
    def products(self) -> int:
        """Vector-Jacobian products for one image."""
        return sum(layer.products for layer in self.layers)

    @property
    def ways(self) -> Mapping[str, tuple[Runs, int]]:
        """Each naive way: its runs, and from how many products, drawn anew, each of them is extrapolated."""
        return {
            "autograd": (self.autograd, sum(layer.autograd for layer in self.layers)),
            "jacrev": (self.jacrev, sum(layer.jacrev for layer in self.layers)),
        }

    def ratio(self, way: str) -> Spread:
        """Naive / trace, per image."""
        return Spread.of_ratios(self.ways[way][0].totals, self.trace.totals)

    def to_json(self) -> dict[str, Any]:
        """All that was measured."""
        return {
            "model": "vgg16",
            "image_size": 32,
            "batch_size": self.batch_size,
            "aim": AIM,
            "trace_seconds_per_image": Spread(self.trace.totals).to_json(),
            "products_per_image": self.products,
            "ways": {
                way: {
                    "seconds_per_image": Spread(runs.totals).to_json(),
                    "products_timed_per_repeat": timed,
                    "ratio_to_trace": self.ratio(way).to_json(),
                }
                for way, (runs, timed) in self.ways.items()
            },
            "layers": [
                {
                    "source": layer.source,
                    "target": layer.target,
                    "products": layer.products,
                    "timed_per_repeat": {"autograd": layer.autograd, "jacrev": layer.jacrev},
                    "seconds": {way: list(runs.of(layer.target)) for way, (runs, _) in self.ways.items()},
                }
                for layer in self.layers
            ],
            "images_of_the_paper": {
                "images": PAPER_IMAGES,
                "trace_seconds": Spread(tuple(PAPER_IMAGES * total for total in self.trace.totals)).to_json(),
                "paper_hours": PAPER_HOURS,
                "paper_device": "GTX 1080",
            },
        }


def measure_naive(plan: Plan, advance: Callable[[], None]) -> NaiveResult:
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
    one_by_one = _QUICK_PRODUCTS if plan.quick else _PRODUCTS
    work = tuple(
        LayerWork(
            segment.source,
            segment.target,
            len(critical[segment.target]),
            min(one_by_one, len(critical[segment.target])),
            min(chunk_rows(segment), len(critical[segment.target])),
        )
        for segment in segments
    )
    clock = Stopclock.of(plan.device)

    def trace() -> Parts:
        return {"all": clock.seconds(lambda: trace_routes(load.model, load.batches)) / load.images}

    with seeded(plan.seed):
        runs = interleaved(
            {
                "trace": trace,
                "autograd": sampled(segments, critical, [layer.autograd for layer in work], by_autograd, clock),
                "jacrev": sampled(segments, critical, [layer.jacrev for layer in work], by_jacrev, clock),
            },
            plan.turns,
            advance,
        )
    return NaiveResult(len(load.batches[0][0]), work, **runs)


def sampled(
    segments: Sequence[Segment],
    critical: Mapping[str, Tensor],
    sizes: Sequence[int],
    way: NaiveWay,
    clock: Stopclock,
) -> Callable[[], Parts]:
    """A measurement of some products of each layer, drawn anew every time, extrapolated to all of them.

    Args:
        segments: The chain at one sample.
        critical: Target -> the elements whose derivatives are wanted.
        sizes: How many of them are drawn in each segment.
        way: Computes the derivatives of the elements that it is given.
        clock: Times them.

    Returns:
        Gives seconds by target for all the wanted elements, taking time to be proportional to their number.
    """

    def measure() -> Parts:
        seconds = {}
        for segment, size in zip(segments, sizes, strict=True):
            wanted = critical[segment.target]
            chosen = wanted[torch.randperm(len(wanted))[:size].to(wanted.device)]
            way(segment, chosen[:1])  # the layer's data come into the caches
            taken = clock.seconds(lambda segment=segment, chosen=chosen: way(segment, chosen))  # type: ignore[misc]
            seconds[segment.target] = taken / size * len(wanted)
        return seconds

    return measure
