"""Time and memory of hardening's training steps against a plain step, and how far the approximate gradient is off."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from attackroute.analysis.criteria import rank_channels
from attackroute.benchmark.cases import adapt_batch_norms, seeded
from attackroute.benchmark.memory import Peaks, measured, memory_repeats
from attackroute.benchmark.plan import HARDENING, Plan
from attackroute.benchmark.timing import Runs, Spread, Stopclock, interleaved
from attackroute.core.model_state import spared_buffers
from attackroute.hardening.gradient_penalty import GradientPenalty
from attackroute.hardening.settings import APPROXIMATE, EXACT
from attackroute.hardening.stabilisation_penalty import StabilisationPenalty
from attackroute.hardening.weight_penalty import WeightPenalty
from attackroute.robustness.gradient_attacks import PGD
from attackroute.routes.route import Route
from attackroute.zoo.registry import build_model

MODEL, WIDTH, IMAGE_SIZE, CLASSES = "vgg16", 0.25, 32, 10
BATCH_SIZE = 128
STEPS = 10

PLAIN, GRADIENT, QUOTIENT, WEIGHT = "plain", "gradient, exact", "gradient, approximation", "weight"
PAT, PAT_GRADIENT, PAT_WEIGHT, PAT_STABLE = "PAT", "PAT, gradient, exact", "PAT, weight", "PAT, stabilisation"
_STEP_NAMES = (PLAIN, GRADIENT, QUOTIENT, WEIGHT, PAT, PAT_GRADIENT, PAT_WEIGHT, PAT_STABLE)
LIMITS = {GRADIENT: 3.2, QUOTIENT: 2.2, WEIGHT: 1.05}
"""Ratios to a plain step's time that are to be kept."""

_EPS = (1e-2, 1e-3, 1e-4, 1e-5)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_LAM = 0.01
_PROBE = "attackroute.benchmark.step_probe"

Probe = Callable[[str, Mapping[str, object], str], tuple[int, int]]
"""See :func:`attackroute.benchmark.memory.measured`."""


@dataclass(frozen=True)
class Deviation:
    """How far the approximate gradient is from the exact one, in double precision, of the same weights.

    Attributes:
        cosine: Between the two.
        relative_norm: Norm of the approximate one / of the exact one.
        relative_error: Norm of the difference / of the exact one.
    """

    cosine: float
    relative_norm: float
    relative_error: float

    @classmethod
    def between(cls, near: Tensor, exact: Tensor) -> Deviation:
        """Compare two gradients, flattened."""
        size = exact.norm()
        cosine = functional.cosine_similarity(near, exact, dim=0)
        return cls(float(cosine), float(near.norm() / size), float((near - exact).norm() / size))


@dataclass(frozen=True)
class HardeningSpeed:
    """Steps (attack, forward, backward, SGD) on a quarter-width VGG-16 at 32x32, penalties on a random route.

    Attributes:
        batch_size: Images in the step.
        runs: By the names in this module.
        deviations: Of the gradient penalty's approximate gradient, for each type of number and each step eps.
        peaks: Memory of two such steps, each kind in processes of its own.
    """

    batch_size: int
    runs: Mapping[str, Runs]
    deviations: Mapping[str, Mapping[float, Deviation]]
    peaks: Mapping[str, Peaks]

    def ratio(self, name: str) -> Spread:
        """A step's time / that of the plain step, or of plain adversarial training, in the same turn."""
        return Spread.of_ratios(self.runs[name].totals, self.runs[_base(name)].totals)

    def memory_ratio(self, name: str) -> Spread:
        """A step's peak memory / that of the plain step, or of plain adversarial training."""
        return Spread.of_ratios(self.peaks[name].peak, self.peaks[_base(name)].peak)

    def to_json(self) -> dict[str, Any]:
        """All that was measured."""
        return {
            "model": MODEL,
            "width": WIDTH,
            "image_size": IMAGE_SIZE,
            "batch_size": self.batch_size,
            "pgd_steps": STEPS,
            "limits": LIMITS,
            "ratios": {name: self.ratio(name).to_json() for name in self.runs if name not in (PLAIN, PAT)},
            "deviations": {
                dtype: [{"eps": eps, **asdict(deviation)} for eps, deviation in found.items()]
                for dtype, found in self.deviations.items()
            },
            "memory_ratios": {
                name: self.memory_ratio(name).to_json() for name in self.peaks if name not in (PLAIN, PAT)
            },
            "bytes": {name: asdict(peaks) for name, peaks in self.peaks.items()},
            "seconds": {name: list(run.totals) for name, run in self.runs.items()},
        }


def measure_hardening(plan: Plan, advance: Callable[[], None], probe: Probe = measured) -> HardeningSpeed:
    """Measure the steps, their memory and the deviations.

    Args:
        plan: Repeats, batch size, device, seed.
        advance: Called after every turn, and after every process.
        probe: Measures a peak.

    Raises:
        UserError: A process failed, for want of memory or since the system does not tell a process's peak.
    """
    batch_size = plan.batch_size or BATCH_SIZE
    clock = Stopclock.of(plan.device)
    with seeded(plan.seed):
        model, images, labels, route = network_and_batch(batch_size, plan.device, plan.seed)
        deviations = {
            str(dtype).removeprefix("torch."): deviation(model, images, labels, route, dtype) for dtype in _DTYPES
        }
        steps = training_steps(model.train(), images, labels, route)
        runs = interleaved({name: clock.whole(step) for name, step in steps.items()}, plan.turns, advance)
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in steps}
    for _ in range(memory_repeats(plan)):
        for name in steps:
            job = {
                "step": name, "batch_size": batch_size, "threads": torch.get_num_threads(),
                "device": str(plan.device), "seed": plan.seed,
            }  # fmt: skip
            found[name].append(probe(_PROBE, job, HARDENING))
            advance()
    peaks = {name: Peaks(*(tuple(column) for column in zip(*rows, strict=True))) for name, rows in found.items()}
    return HardeningSpeed(batch_size, runs, deviations, peaks)


def step_processes(plan: Plan) -> int:
    """How many processes :func:`measure_hardening` starts."""
    return len(_STEP_NAMES) * memory_repeats(plan)


def network_and_batch(batch_size: int, device: torch.device, seed: int) -> tuple[nn.Module, Tensor, Tensor, Route]:
    """A network with random weights, images, labels and a random route."""
    with seeded(seed):
        model = build_model(MODEL, width=WIDTH, num_classes=CLASSES, image_size=IMAGE_SIZE).to(device)
        images = torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE).to(device)
        labels = torch.randint(CLASSES, (batch_size,)).to(device)
        adapt_batch_norms(model, images)
        return model, images, labels, rank_channels(model, images, "random", seed=seed)


def training_steps(model: nn.Module, images: Tensor, labels: Tensor, route: Route) -> dict[str, Callable[[], None]]:
    """One step of each kind, by name."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)
    exact, quotient = GradientPenalty(model, route), GradientPenalty(model, route, method=APPROXIMATE)
    weight, stabilisation = WeightPenalty(model, route, images), StabilisationPenalty(model, route)
    attack = PGD(steps=STEPS)

    def plain(x: Tensor) -> Tensor:
        return functional.cross_entropy(model(x), labels)

    def punished(penalty: GradientPenalty, x: Tensor) -> Tensor:
        with penalty.watch():
            logits = model(x)
        return penalty.with_task(logits, labels, _LAM)[0]

    def both(x: Tensor) -> Tensor:
        """Eq. (12)."""
        total = punished(exact, x)
        with spared_buffers(model), exact.watch():
            logits = model(images)
        return total + _LAM * exact(logits, labels)

    def steadied(x: Tensor) -> Tensor:
        with stabilisation.watch():
            task = plain(x)
        return task + _LAM * stabilisation(images)

    def step(loss: Callable[[Tensor], Tensor], *, attacked: bool = False) -> Callable[[], None]:
        def run() -> None:
            x = attack(model, images, labels) if attacked else images
            optimiser.zero_grad()
            loss(x).backward()  # type: ignore[no-untyped-call]
            optimiser.step()

        return run

    return {
        PLAIN: step(plain),
        GRADIENT: step(lambda x: punished(exact, x)),
        QUOTIENT: step(lambda x: punished(quotient, x)),
        WEIGHT: step(lambda x: plain(x) + _LAM * weight()),
        PAT: step(plain, attacked=True),
        PAT_GRADIENT: step(both, attacked=True),
        PAT_WEIGHT: step(lambda x: plain(x) + _LAM * weight(), attacked=True),
        PAT_STABLE: step(steadied, attacked=True),
    }


def deviation(
    model: nn.Module, images: Tensor, labels: Tensor, route: Route, dtype: torch.dtype
) -> dict[float, Deviation]:
    """How far the approximation in that type of number is from the exact gradient in training mode, by eps."""
    rounded = copy.deepcopy(model).train().to(dtype)

    def gradient(network: nn.Module, method: str, eps: float = _EPS[0]) -> Tensor:
        penalty = GradientPenalty(network, route, method=method, eps=eps)
        with penalty.watch():
            logits = network(images.to(next(network.parameters())))
        found = torch.autograd.grad(penalty(logits, labels), list(network.parameters()), allow_unused=True)
        return torch.cat([part.flatten().double() for part in found if part is not None])

    exact = gradient(copy.deepcopy(rounded).double(), EXACT)
    return {eps: Deviation.between(gradient(rounded, APPROXIMATE, eps), exact) for eps in _EPS}


def _base(name: str) -> str:
    return PAT if name.startswith(PAT) else PLAIN
