"""The time of a trace against a plain forward pass and a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.benchmark.breakdown import PHASES, REST, Stopwatch
from attackroute.benchmark.cases import Case, Workload, workload
from attackroute.benchmark.plan import Plan
from attackroute.benchmark.timing import Runs, Spread, Stopclock, interleaved
from attackroute.tracing.noise import NOISE
from attackroute.tracing.trace import trace_routes


@dataclass(frozen=True)
class SpeedResult:
    """One case in one memory format.

    Attributes:
        case: What was measured.
        memory_format: ``"contiguous"`` or ``"channels_last"``.
        batch_size: Images a batch.
        batches: Batches of which each run of ``forward``, ``trace``, ``noise`` and ``watched`` consists.
        forward: Plain inference.
        trace: :func:`attackroute.trace.trace_routes`, the probe of the structure included.
        training: One step (forward, backward, SGD) on one batch.
        noise: Traces that follow the noise of an attack, which costs next to nothing itself.
        watched: Traces again, by phase.
    """

    case: Case
    memory_format: str
    batch_size: int
    batches: int
    forward: Runs
    trace: Runs
    training: Runs
    noise: Runs
    watched: Runs

    @property
    def limit(self) -> float | None:
        """The ratio to be kept; None at another batch size than the one for which it was stated."""
        return self.case.limit if self.batch_size == self.case.batch_size else None

    @property
    def ratio(self) -> Spread:
        """Trace / plain forward."""
        return Spread.of_ratios(self.trace.totals, self.forward.totals)

    @property
    def noise_ratio(self) -> Spread:
        """Trace of the noise / two plain forward passes, one of the images and one of the attacked ones."""
        return Spread.of_ratios(self.noise.totals, [2 * total for total in self.forward.totals])

    @property
    def training_ratio(self) -> Spread:
        """Trace / training step, both of one batch."""
        return Spread.of_ratios([total / self.batches for total in self.trace.totals], self.training.totals)

    @property
    def shares(self) -> dict[str, Spread]:
        """Each phase of a trace as a share of the plain forward pass in the same turn."""
        return {
            phase: Spread.of_ratios(self.watched.of(phase), self.forward.totals)
            for phase in (*PHASES, REST)
            if any(self.watched.of(phase))
        }

    def to_json(self) -> dict[str, Any]:
        """All that was measured."""
        return {
            "case": self.case.name,
            "model": self.case.model,
            "image_size": self.case.image_size,
            "memory_format": self.memory_format,
            "batch_size": self.batch_size,
            "batches": self.batches,
            "limit": self.limit,
            "trace_to_forward": self.ratio.to_json(),
            "noise_trace_to_two_forwards": self.noise_ratio.to_json(),
            "trace_to_training_step": self.training_ratio.to_json(),
            "shares_of_forward": {phase: share.to_json() for phase, share in self.shares.items()},
            "seconds": {
                "forward": list(self.forward.totals),
                "trace": list(self.trace.totals),
                "noise_trace": list(self.noise.totals),
                "training_step": list(self.training.totals),
                "watched_trace": list(self.watched.totals),
            },
        }


def measure_speed(case: Case, plan: Plan, *, channels_last: bool, advance: Callable[[], None]) -> SpeedResult:
    """Measure one case in one memory format.

    Args:
        case: The network and its images.
        plan: Repeats, sizes, device, seed.
        channels_last: The memory format.
        advance: Called after every turn.
    """
    batch_size = plan.batch_size or case.batch_size
    load = workload(case, batch_size, plan.batches, seed=plan.seed, device=plan.device, channels_last=channels_last)
    clock = Stopclock.of(plan.device)

    def trace() -> None:
        trace_routes(load.model, load.batches)

    def noise() -> None:
        trace_routes(load.model, load.batches, attack=_brighter, carrier=NOISE)

    watch = Stopwatch(clock)
    runs = interleaved(
        {
            "forward": clock.whole(load.forward),
            "trace": clock.whole(trace),
            "training": clock.whole(training_step(load)),
            "noise": clock.whole(noise),
            "watched": lambda: watch.measure(trace),
        },
        plan.turns,
        advance,
    )
    memory_format = "channels_last" if channels_last else "contiguous"
    return SpeedResult(case, memory_format, batch_size, plan.batches, **runs)


def _brighter(_: nn.Module, images: Tensor, __: Tensor) -> Tensor:
    return images * 0.95 + 0.05


def training_step(load: Workload) -> Callable[[], None]:
    """A step of SGD on the first batch, of a copy of the network."""
    model = copy.deepcopy(load.model).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    images, labels = load.batches[0]

    def step() -> None:
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()

    return step
