"""Time and memory of hardening's training steps against a plain step.

The peak of one step is measured in a process of its own: ``python -m benchmarks.hardening JSON``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from attackroute.analysis.criteria import rank_channels
from attackroute.core.model_state import spared_buffers
from attackroute.hardening.gradient_penalty import GradientPenalty
from attackroute.hardening.stabilisation_penalty import StabilisationPenalty
from attackroute.hardening.weight_penalty import WeightPenalty
from attackroute.robustness.gradient_attacks import PGD
from attackroute.routes.route import Route
from benchmarks.cases import HARDENING, Plan, small_vgg
from benchmarks.memory import Peaks, measured, memory_now, memory_peak
from benchmarks.timing import BYTES, SECONDS, Measurement, Spread, Stopclock

BATCH_SIZE = 128
STEPS = 10

PLAIN, GRADIENT, WEIGHT = "plain", "gradient", "weight"
PAT, PAT_GRADIENT, PAT_WEIGHT, PAT_STABLE = "PAT", "PAT, gradient", "PAT, weight", "PAT, stabilisation"
STEP_NAMES = (PLAIN, GRADIENT, WEIGHT, PAT, PAT_GRADIENT, PAT_WEIGHT, PAT_STABLE)
LIMITS = {GRADIENT: 3.2, WEIGHT: 1.05}
"""Ratios to a plain step's time that are to be kept."""

_LAM = 0.01
_MEASURED_STEPS = 2  # the first one makes the momentum and other things that stay

Probe = Callable[[str, Mapping[str, object], str], tuple[int, int]]
"""See :func:`benchmarks.memory.measured`."""


@dataclass(frozen=True)
class Job:
    """What a process does: two steps.

    Attributes:
        step: One of :data:`STEP_NAMES`.
        batch_size: Images in it.
        threads: Number of PyTorch's threads.
        device: Where the network runs.
        seed: For weights, images and route.
    """

    step: str
    batch_size: int
    threads: int
    device: str
    seed: int


def measure_hardening(
    plan: Plan, advance: Callable[[], None] = lambda: None, probe: Probe = measured
) -> list[Measurement]:
    """Measure steps (attack, forward, backward, SGD) of a quarter-width VGG-16 at 32x32, its largest kernels punished.

    Args:
        plan: Repeats, batch size, device, seed.
        advance: Called after every turn, and after every process.
        probe: Measures a peak.

    Raises:
        UserError: A process failed, for want of memory or since the system does not tell a process's peak.
    """
    batch_size = plan.batch_size or BATCH_SIZE
    with small_vgg(batch_size, plan.device, plan.seed) as (model, images, labels):
        route = rank_channels(model, images, "kernel")
        steps = training_steps(model.train(), images, labels, route)
        runs = Stopclock.of(plan.device).interleaved(steps, plan.turns, advance)
    memory: dict[str, list[tuple[int, int]]] = {name: [] for name in steps}
    for _ in range(plan.memory_repeats):
        for name in steps:
            job = Job(name, batch_size, torch.get_num_threads(), str(plan.device), seed=plan.seed)
            memory[name].append(probe("benchmarks.hardening", asdict(job), HARDENING))
            advance()
    return step_measurements(f"{HARDENING}, {batch_size} images", runs, memory)


def step_measurements(
    case: str, runs: Mapping[str, Spread], memory: Mapping[str, list[tuple[int, int]]]
) -> list[Measurement]:
    """Ratios to the plain step, or to plain adversarial training, and what they are ratios of.

    Args:
        case: Its name.
        runs: Seconds by step.
        memory: Bytes before and at the peak of two steps, by step.
    """
    peaks = {name: Peaks.of(pairs) for name, pairs in memory.items()}
    bases = {name: PAT if name.startswith(PAT) else PLAIN for name in runs}
    ratios = {name: base for name, base in bases.items() if name != base}
    return [
        *(
            Measurement(
                case, f"time: {name} / {base}", runs[name] / runs[base],
                bound=f"at most {LIMITS[name]:.2f}" if name in LIMITS else "",
            )
            for name, base in ratios.items()
        ),
        *(
            Measurement(case, f"memory: {name} / {base}", peaks[name].peak / peaks[base].peak)
            for name, base in ratios.items()
        ),
        *(Measurement(case, name, seconds, SECONDS) for name, seconds in runs.items()),
        *(Measurement(case, f"{name}, peak", each.peak, BYTES) for name, each in peaks.items()),
        *(Measurement(case, f"{name}, beyond libraries and weights", each.own, BYTES) for name, each in peaks.items()),
    ]  # fmt: skip


def training_steps(model: nn.Module, images: Tensor, labels: Tensor, route: Route) -> dict[str, Callable[[], None]]:
    """One step of each kind, by name."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)
    gradient, weight = GradientPenalty(model, route), WeightPenalty(model, route, images)
    stabilisation = StabilisationPenalty(model, route)
    attack = PGD(steps=STEPS)

    def plain(x: Tensor) -> Tensor:
        return functional.cross_entropy(model(x), labels)

    def punished(x: Tensor) -> Tensor:
        with gradient.watch():
            logits = model(x)
        return functional.cross_entropy(logits, labels) + _LAM * gradient(logits, labels)

    def both(x: Tensor) -> Tensor:
        """Eq. (12)."""
        total = punished(x)
        with spared_buffers(model), gradient.watch():
            logits = model(images)
        return total + _LAM * gradient(logits, labels)

    def steadied(x: Tensor) -> Tensor:
        with stabilisation.watch():
            task = plain(x)
        return task + _LAM * stabilisation(images)

    def step(loss: Callable[[Tensor], Tensor], *, attacked: bool = False) -> Callable[[], None]:
        def run_step() -> None:
            x = attack(model, images, labels) if attacked else images
            optimiser.zero_grad()
            loss(x).backward()  # type: ignore[no-untyped-call]
            optimiser.step()

        return run_step

    return {
        PLAIN: step(plain),
        GRADIENT: step(punished),
        WEIGHT: step(lambda x: plain(x) + _LAM * weight()),
        PAT: step(plain, attacked=True),
        PAT_GRADIENT: step(both, attacked=True),
        PAT_WEIGHT: step(lambda x: plain(x) + _LAM * weight(), attacked=True),
        PAT_STABLE: step(steadied, attacked=True),
    }


def run(job: Job) -> tuple[int, int]:
    """Do the job: bytes in use before the first step, and at the highest."""
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    with small_vgg(job.batch_size, device, job.seed) as (model, images, labels):
        route = rank_channels(model, images, "kernel")
    step = training_steps(model.train(), images, labels, route)[job.step]
    before = memory_now(device)
    for _ in range(_MEASURED_STEPS):
        step()
    return before, memory_peak(device)


if __name__ == "__main__":
    print(json.dumps(run(Job(**json.loads(sys.argv[1])))))
