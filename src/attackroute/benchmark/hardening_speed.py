"""The time of hardening's training steps against a plain step, and what the approximate penalty gradient is off by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from attackroute.attacks import PGD
from attackroute.benchmark.cases import adapt_batch_norms, seeded
from attackroute.benchmark.plan import Plan
from attackroute.benchmark.timing import Runs, Spread, Stopclock, interleaved
from attackroute.models import build_model
from attackroute.penalties import APPROXIMATE, EXACT, GradientPenalty, WeightPenalty
from attackroute.penalties.passes import spared_buffers
from attackroute.rivals import rank_channels
from attackroute.routes import Route

MODEL, WIDTH, IMAGE_SIZE, CLASSES = "vgg16", 0.25, 32, 10
BATCH_SIZE = 128
STEPS = 10

PLAIN, GRADIENT, QUOTIENT, WEIGHT = "plain", "gradient, exact", "gradient, approximation", "weight"
PAT, PAT_GRADIENT, PAT_WEIGHT = "PAT", "PAT, gradient, exact", "PAT, weight"
LIMITS = {GRADIENT: 3.2, QUOTIENT: 2.2, WEIGHT: 1.05}
"""Ratios to a plain step's time that are to be kept."""

_EPS = (1e-2, 1e-3, 1e-4, 1e-5)
_LAM = 0.01


@dataclass(frozen=True)
class HardeningSpeed:
    """Steps (attack, forward, backward, SGD) on a quarter-width VGG-16 at 32x32, penalties on a random route.

    Attributes:
        batch_size: Images in the step.
        runs: By the names in this module.
        deviations: For each type of number and each step eps, the cosine between the approximate and the exact
            gradient of the gradient penalty, and the norm of their difference over that of the exact one.
    """

    batch_size: int
    runs: Mapping[str, Runs]
    deviations: Mapping[str, Mapping[float, tuple[float, float]]]

    def ratio(self, name: str) -> Spread:
        """A step's time / that of the plain step, or of plain adversarial training, in the same turn."""
        base = PAT if name.startswith(PAT) else PLAIN
        return Spread.of_ratios(self.runs[name].totals, self.runs[base].totals)

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
                dtype: [
                    {"eps": eps, "cosine": cosine, "relative_error": error} for eps, (cosine, error) in found.items()
                ]
                for dtype, found in self.deviations.items()
            },
            "seconds": {name: list(run.totals) for name, run in self.runs.items()},
        }


def measure_hardening(plan: Plan, advance: Callable[[], None]) -> HardeningSpeed:
    """Measure the steps and the deviations.

    Args:
        plan: Repeats, batch size, device, seed.
        advance: Called after every turn.
    """
    batch_size = plan.batch_size or BATCH_SIZE
    clock = Stopclock.of(plan.device)
    with seeded(plan.seed):
        model = build_model(MODEL, width=WIDTH, num_classes=CLASSES, image_size=IMAGE_SIZE).to(plan.device)
        images = torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE).to(plan.device)
        labels = torch.randint(CLASSES, (batch_size,)).to(plan.device)
        adapt_batch_norms(model, images)
        route = rank_channels(model, images, "random", seed=plan.seed)
        deviations = {
            str(dtype).removeprefix("torch."): deviation(
                copy.deepcopy(model).to(dtype), images.to(dtype), labels, route
            )
            for dtype in (torch.float32, torch.float64)
        }
        steps = training_steps(model.train(), images, labels, route)
        runs = interleaved({name: clock.whole(step) for name, step in steps.items()}, plan.turns, advance)
    return HardeningSpeed(batch_size, runs, deviations)


def training_steps(model: nn.Module, images: Tensor, labels: Tensor, route: Route) -> dict[str, Callable[[], None]]:
    """One step of each kind, by name."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)
    exact, quotient = GradientPenalty(model, route), GradientPenalty(model, route, method=APPROXIMATE)
    weight = WeightPenalty(model, route, images)
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
    }


def deviation(model: nn.Module, images: Tensor, labels: Tensor, route: Route) -> dict[float, tuple[float, float]]:
    """How far the approximation is from the exact gradient in training mode, by eps: cosine and relative error."""
    model.train()

    def gradient(penalty: GradientPenalty) -> Tensor:
        with penalty.watch():
            logits = model(images)
        found = torch.autograd.grad(penalty(logits, labels), list(model.parameters()), allow_unused=True)
        return torch.cat([part.flatten().double() for part in found if part is not None])

    exact = gradient(GradientPenalty(model, route, method=EXACT))
    found = {}
    for eps in _EPS:
        near = gradient(GradientPenalty(model, route, method=APPROXIMATE, eps=eps))
        cosine = functional.cosine_similarity(near, exact, dim=0)
        found[eps] = float(cosine), float((near - exact).norm() / exact.norm())
    return found
