"""The time of projected gradient descent against that of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.benchmark.cases import adapt_batch_norms, seeded
from attackroute.benchmark.plan import Plan
from attackroute.benchmark.timing import Parts, Runs, Spread, Stopclock, interleaved
from attackroute.core.model_state import frozen
from attackroute.robustness.gradient_attacks import PGD
from attackroute.zoo.registry import build_model

MODEL, WIDTH, IMAGE_SIZE, CLASSES = "vgg16", 0.25, 32, 10
BATCH_SIZE = 128
EPS, STEPS = 8 / 255, 10
STEP_SIZE = EPS / 10

Attack = Callable[[], object]
"""One run on the batch."""


@dataclass(frozen=True)
class AttackSpeed:
    """PGD in the L-infinity ball with a random start, on a quarter-width VGG-16 at 32x32.

    Attributes:
        batch_size: Images, all in one batch.
        ours: :class:`attackroute.attacks.PGD`.
        passes: As many bare forward and backward passes, without which there is no such attack.
        others: The same attack by other libraries.
        versions: Of these libraries.
        left_out: Libraries that are not installed.
    """

    batch_size: int
    ours: Runs
    passes: Runs
    others: dict[str, Runs]
    versions: dict[str, str]
    left_out: tuple[str, ...]

    @property
    def overhead(self) -> Spread:
        """Ours / the bare passes."""
        return Spread.of_ratios(self.ours.totals, self.passes.totals)

    def ratio(self, library: str) -> Spread:
        """Another library's time / ours, in the same turn."""
        return Spread.of_ratios(self.others[library].totals, self.ours.totals)

    def to_json(self) -> dict[str, Any]:
        """All that was measured."""
        runs = {"ours": self.ours, "passes": self.passes, **self.others}
        return {
            "attack": {"name": PGD.name, "eps": EPS, "steps": STEPS, "step_size": STEP_SIZE},
            "model": MODEL,
            "width": WIDTH,
            "image_size": IMAGE_SIZE,
            "batch_size": self.batch_size,
            "ours_to_passes": self.overhead.to_json(),
            "others_to_ours": {name: self.ratio(name).to_json() for name in self.others},
            "versions": self.versions,
            "left_out": list(self.left_out),
            "seconds": {name: list(run.totals) for name, run in runs.items()},
        }


def measure_attack(plan: Plan, advance: Callable[[], None]) -> AttackSpeed:
    """Measure PGD and whichever of the other libraries are installed.

    Args:
        plan: Repeats, batch size, device, seed.
        advance: Called after every turn.
    """
    batch_size = plan.batch_size or BATCH_SIZE
    clock = Stopclock.of(plan.device)
    installed = [name for name in PEERS if find_spec(name) is not None]
    with seeded(plan.seed):
        model = build_model(MODEL, width=WIDTH, num_classes=CLASSES, image_size=IMAGE_SIZE).to(plan.device)
        images = torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE).to(plan.device)
        labels = torch.randint(CLASSES, (batch_size,)).to(plan.device)
        adapt_batch_norms(model, images)
        model.eval()
        ours = PGD(EPS, steps=STEPS, step_size=STEP_SIZE)
        attacks: dict[str, Attack] = {
            "ours": lambda: ours(model, images, labels),
            "passes": lambda: bare_passes(model, images, labels),
            **{name: PEERS[name](model, images, labels) for name in installed},
        }

        def measure(attack: Attack) -> Parts:
            seconds = clock.seconds(attack)
            model.zero_grad()  # some leave the weights' gradients
            return {"all": seconds}

        measurements = {name: (lambda attack=attack: measure(attack)) for name, attack in attacks.items()}
        runs = interleaved(measurements, plan.turns, advance)
    return AttackSpeed(
        batch_size,
        ours=runs.pop("ours"),
        passes=runs.pop("passes"),
        others=runs,
        versions={name: version(name) for name in installed},
        left_out=tuple(name for name in PEERS if name not in installed),
    )


def bare_passes(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """The forward and backward passes of the attack, and nothing else."""
    with frozen(model):
        for _ in range(STEPS):
            leaf = images.detach().requires_grad_()
            torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels), leaf)


def _torchattack(model: nn.Module, images: Tensor, labels: Tensor) -> Attack:
    import torchattack

    attack = torchattack.PGD(model, device=images.device, eps=EPS, steps=STEPS, alpha=STEP_SIZE, random_start=True)
    return lambda: attack(images, labels)


def _torchattacks(model: nn.Module, images: Tensor, labels: Tensor) -> Attack:
    import torchattacks

    attack = torchattacks.PGD(model, eps=EPS, steps=STEPS, alpha=STEP_SIZE, random_start=True)
    return lambda: attack(images, labels)


def _foolbox(model: nn.Module, images: Tensor, labels: Tensor) -> Attack:
    from foolbox.attacks import LinfPGD
    from foolbox.models.pytorch import PyTorchModel

    wrapped = PyTorchModel(model, bounds=(0, 1), device=images.device)
    attack = LinfPGD(abs_stepsize=STEP_SIZE, steps=STEPS, random_start=True)
    return lambda: attack.run(wrapped, images, labels, epsilon=EPS)


PEERS: dict[str, Callable[[nn.Module, Tensor, Tensor], Attack]] = {
    "torchattack": _torchattack,
    "torchattacks": _torchattacks,
    "foolbox": _foolbox,
}
"""The other libraries, by the name of their packages."""
