"""The time of the hardness metric against one forward and one backward pass.

from attackroute.benchmark.hardness_speed import measure_hardness
print(measure_hardness(SPEED_CASES[0], Plan(repeats=15, threads=1)).ratio.median)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from attackroute.analysis.hardness import hardness
from attackroute.benchmark.cases import Case, Workload, workload
from attackroute.benchmark.plan import Plan
from attackroute.benchmark.timing import Runs, Spread, Stopclock, in_threads, interleaved
from attackroute.core.model_state import frozen
from attackroute.tracing.trace import trace_routes

LIMIT = 1.15
"""Ratio of the metric's time to that of the two passes which is to be kept."""


@dataclass(frozen=True)
class HardnessSpeed:
    """One case.

    Attributes:
        case: What was measured.
        batch_size: Images a batch.
        passes: A forward pass and the cross entropy's gradient at the images, of every batch; no gradient is taken at
            the parameters.
        hardness: :func:`attackroute.hardness` of the same images, ranks included.
    """

    case: Case
    batch_size: int
    passes: Runs
    hardness: Runs

    @property
    def ratio(self) -> Spread:
        """Hardness / both passes, in the same turn."""
        return Spread.of_ratios(self.hardness.totals, self.passes.totals)


def measure_hardness(case: Case, plan: Plan) -> HardnessSpeed:
    """Measure one case.

    Args:
        case: The network and its images.
        plan: Repeats, sizes, threads, device, seed.
    """
    batch_size = plan.batch_size or case.batch_size
    load = workload(case, batch_size, plan.batches, seed=plan.seed, device=plan.device)
    route = trace_routes(load.model, load.batches[:1]).aggregate(0.3)
    clock = Stopclock.of(plan.device)
    with in_threads(plan.threads):
        runs = interleaved(
            {
                "passes": clock.whole(lambda: _both_passes(load)),
                "hardness": clock.whole(lambda: hardness(load.model, route, load.batches)),
            },
            plan.turns,
        )
    return HardnessSpeed(case, batch_size, **runs)


def _both_passes(load: Workload) -> None:
    with frozen(load.model):
        for images, labels in load.batches:
            leaf = images.detach().requires_grad_()
            loss = nn.functional.cross_entropy(load.model(leaf), labels, reduction="sum")
            torch.autograd.grad(loss, leaf)
