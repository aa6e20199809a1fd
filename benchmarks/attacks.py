"""The time of projected gradient descent against that of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from attackroute.core.model_state import frozen
from attackroute.robustness.gradient_attacks import PGD
from benchmarks.cases import ATTACK, Plan, small_vgg
from benchmarks.timing import SECONDS, Measurement, Stopclock, interleaved

BATCH_SIZE = 128
EPS, STEPS = 8 / 255, 10
STEP_SIZE = EPS / 10

Attack = Callable[[], object]
"""One run on the batch."""


def measure_attack(plan: Plan, advance: Callable[[], None] = lambda: None) -> list[Measurement]:
    """Measure PGD in the L-infinity ball with a random start, on a quarter-width VGG-16 at 32x32.

    Beside it whichever of the other libraries are installed, and as many bare forward and backward passes, without
    which there is no such attack.

    Args:
        plan: Repeats, batch size, device, seed.
        advance: Called after every turn.
    """
    clock = Stopclock.of(plan.device)
    installed = [name for name in PEERS if find_spec(name) is not None]
    with small_vgg(plan.batch_size or BATCH_SIZE, plan.device, plan.seed) as (model, images, labels):
        model.eval()
        ours = PGD(EPS, steps=STEPS, step_size=STEP_SIZE)
        attacks: dict[str, Attack] = {
            "ours": lambda: ours(model, images, labels),
            "bare passes": lambda: bare_passes(model, images, labels),
            **{f"{name} {version(name)}": PEERS[name](model, images, labels) for name in installed},
        }

        def measure(attack: Attack) -> float:
            seconds = clock.seconds(attack)
            model.zero_grad()  # some leave the weights' gradients
            return seconds

        measurements = {name: (lambda attack=attack: measure(attack)) for name, attack in attacks.items()}
        runs = interleaved(measurements, plan.turns, advance)
    case = f"{ATTACK}, {STEPS} steps, {len(images)} images"
    others = [name for name in runs if name not in ("ours", "bare passes")]
    return [
        Measurement(case, "ours / bare passes", runs["ours"] / runs["bare passes"]),
        *(Measurement(case, f"{name} / ours", runs[name] / runs["ours"]) for name in others),
        *(Measurement(case, name, seconds, SECONDS) for name, seconds in runs.items()),
    ]


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
