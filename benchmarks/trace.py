"""The time of a trace against a plain forward pass and a training step, and of hardness against two passes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from attackroute.analysis.hardness import hardness
from attackroute.core.model_state import frozen
from attackroute.tracing.config import NOISE, TraceConfig
from attackroute.tracing.trace import trace_routes
from benchmarks.cases import HARDNESS, Case, Plan, Workload, workload
from benchmarks.timing import SECONDS, Measurement, Spread, Stopclock

HARDNESS_LIMIT = 1.15
"""Ratio of the hardness metric's time to that of a forward and a backward pass which is to be kept."""


FORMATS = {"contiguous": False, "channels_last": True}
"""Memory formats, and whether each is channels_last."""


def measure_speed(case: Case, plan: Plan, advance: Callable[[], None] = lambda: None) -> list[Measurement]:
    """Measure one case: traces in both memory formats, the probe of the structure included, and plain inference.

    Ratios are to the faster of the two plain passes of the same turn. A trace that follows noise runs two passes; the
    attack whose noise it is costs next to nothing.

    Args:
        case: The network and its images.
        plan: Repeats, sizes, device, seed.
        advance: Called after every turn.
    """
    batch_size = plan.batch_size or case.batch_size
    loads = {
        name: workload(case, batch_size, plan.batches, seed=plan.seed, device=plan.device, channels_last=form)
        for name, form in FORMATS.items()
    }
    load = loads["contiguous"]
    actions: dict[str, Callable[[], object]] = {
        **{f"forward, {name}": each.forward for name, each in loads.items()},
        **{
            f"trace, {name}": lambda each=each: trace_routes(each.model, each.batches)  # type: ignore[misc]
            for name, each in loads.items()
        },
        "training step": training_step(load),
        "noise trace": lambda: trace_routes(
            load.model, load.batches, attack=_brighter, config=TraceConfig(carrier=NOISE)
        ),
    }
    runs = Stopclock.of(plan.device).interleaved(actions, plan.turns, advance)
    limit = case.limit if batch_size == case.batch_size else None  # it was stated for this size of batches
    return speed_measurements(f"{case.name}, {plan.batches} x {batch_size}", runs, plan.batches, limit)


def speed_measurements(
    name: str, runs: Mapping[str, Spread], batches: int, limit: float | None = None
) -> list[Measurement]:
    """Ratios and times.

    Args:
        name: Of the case.
        runs: Seconds by what ran: for each format ``"forward, FORMAT"`` and ``"trace, FORMAT"`` of all batches, beside
            them ``"noise trace"`` of all batches and ``"training step"`` of one.
        batches: How many there are.
        limit: On the ratio of a trace to a forward pass.
    """
    bound = "" if limit is None else f"at most {limit:.2f}"
    plain = [runs[f"forward, {form}"].values for form in FORMATS]
    forward = Spread(tuple(map(min, zip(*plain, strict=True))))
    contiguous = runs["trace, contiguous"]
    return [
        *(
            Measurement(name, f"trace, {form} / forward", runs[f"trace, {form}"] / forward, bound=bound)
            for form in FORMATS
        ),
        Measurement(name, "trace, contiguous / training step", contiguous.times(1 / batches) / runs["training step"]),
        Measurement(name, "noise trace / two forwards", runs["noise trace"] / runs["forward, contiguous"].times(2)),
        *(Measurement(name, run, seconds, SECONDS) for run, seconds in runs.items()),
    ]


def _brighter(_: nn.Module, images: Tensor, __: Tensor) -> Tensor:
    return images * 0.95 + 0.05


def training_step(load: Workload) -> Callable[[], None]:
    """A step (forward, backward, SGD) on the first batch, of a copy of the network."""
    model = copy.deepcopy(load.model).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    images, labels = load.batches[0]

    def step() -> None:
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()

    return step


def measure_hardness(case: Case, plan: Plan, advance: Callable[[], None] = lambda: None) -> list[Measurement]:
    """Measure :func:`attackroute.hardness`, ranks included, against a forward pass and the gradient at the images."""
    load = workload(case, plan.batch_size or case.batch_size, plan.batches, seed=plan.seed, device=plan.device)
    route = trace_routes(load.model, load.batches[:1]).aggregate(0.3)

    def both_passes() -> None:
        with frozen(load.model):
            for images, labels in load.batches:
                leaf = images.detach().requires_grad_()
                loss = nn.functional.cross_entropy(load.model(leaf), labels, reduction="sum")
                torch.autograd.grad(loss, leaf)

    runs = Stopclock.of(plan.device).interleaved(
        {"both passes": both_passes, "hardness": lambda: hardness(load.model, route, load.batches)}, plan.turns, advance
    )
    name = f"{HARDNESS}, {case.name}"
    bound = f"at most {HARDNESS_LIMIT:.2f}"
    return [
        Measurement(name, "hardness / both passes", runs["hardness"] / runs["both passes"], bound=bound),
        *(Measurement(name, run, seconds, SECONDS) for run, seconds in runs.items()),
    ]
