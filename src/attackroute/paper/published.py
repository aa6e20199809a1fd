"""Numbers that the paper reports: Tables 1 to 4, for runs in its own setting, and what its text says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attackroute.hardening.settings import GRADIENT, WEIGHT
from attackroute.robustness.contract import Perturbation
from attackroute.robustness.gradient_attacks import PGD

_EPS = 8 / 255


_STEPS = 10


# Clean, FGSM, MI-FGSM (Vanilla) or PGD (PAT), Gaussian noise; in percent.
_TABLES: Mapping[str, Mapping[str, tuple[float, float, float, float]]] = {
    "cifar10": {
        "Vanilla": (89.19, 4.88, 3.10, 25.49),
        "Vanilla_g": (92.60, 9.26, 7.48, 28.54),
        "Vanilla_w": (91.94, 10.01, 5.52, 26.08),
        "PAT": (84.95, 47.88, 46.71, 76.63),
        "PAT_g": (84.93, 49.16, 48.39, 77.16),
        "PAT_w": (85.06, 49.61, 48.20, 78.18),
    },
    "svhn": {
        "Vanilla": (94.42, 28.10, 1.86, 38.76),
        "Vanilla_g": (95.38, 56.97, 14.95, 45.47),
        "Vanilla_w": (95.48, 55.38, 14.29, 43.12),
        "PAT": (92.23, 55.25, 46.21, 78.34),
        "PAT_g": (93.56, 57.07, 52.50, 83.15),
        "PAT_w": (95.40, 57.80, 48.74, 80.23),
    },
}


OCCURRENCES: Mapping[str, Mapping[str, float]] = {
    "alexnet": {"conv1": 97, "conv2": 97, "conv3": 97, "conv4": 94, "conv5": 45},
    "vgg16": {"conv1": 70, "conv4": 48, "conv7": 60, "conv10": 67, "conv13": 38},
}
"""Table 1, in percent, by network and layer."""


GRADIENTS: Mapping[str, tuple[float, float]] = {
    "conv1": (0.0046, 4.5565),
    "conv4": (0.0014, 1.1183),
    "conv7": (0.0005, 2.1692),
    "conv10": (0.0001, 0.4096),
}
"""Table 4: gradients of hard and of weak samples, by layer; the paper does not say of which network."""


SHARED_BY_A_TENTH = 0.946
"""Section 5.1.3: how much the route of a tenth of the samples shares with that of all."""


TRANSPLANTED_FIRST, TRANSPLANTED_RANDOM = 0.5368, 0.0463
"""Section 4.2.2: accuracy with 30 % of the first layer's route neurons transplanted, and with random ones, at most."""


_LETTERS = {GRADIENT: "_g", WEIGHT: "_w"}


def reported(data: str, variant: str) -> dict[str, float]:
    """Accuracies in [0, 1] of Table 2 or 3 by attack; none for what the paper does not have.

    Args:
        data: ``"cifar10"`` or ``"svhn"``.
        variant: As the paper has it, such as ``"PAT_g"``.
    """
    numbers = _TABLES.get(data, {}).get(variant)
    if numbers is None:
        return {}
    names = ("clean", "fgsm", "mi-fgsm" if variant.startswith("Vanilla") else "pgd", "gaussian-noise")
    return {name: round(value / 100, 4) for name, value in zip(names, numbers, strict=True)}


@dataclass(frozen=True)
class PaperSetting:
    """What a run has to share with the paper's to be put beside its numbers.

    Attributes:
        model: Name of the network.
        width: Factor on its channels.
        data: Name of the data set.
        image_size: Height and width.
        attack: What it was trained against.
        penalties: What was punished.
        on_route: Whether that was the route's neurons, by the exact gradient, on kernels as they are.
    """

    model: str
    width: float
    data: str
    image_size: int
    attack: Perturbation | None
    penalties: tuple[str, ...]
    on_route: bool

    def rows(self) -> dict[str, dict[str, float]]:
        """The paper's accuracies in [0, 1] of the network before and after, by attack; none in another setting."""
        if (self.model, self.width, self.image_size) != ("vgg16", 1.0, 32):
            return {}
        if len(self.penalties) > 1 or not (self.on_route or not self.penalties):
            return {}
        base = self._base()
        if base is None or not reported(self.data, base):
            return {}
        after = base + "".join(_LETTERS[name] for name in self.penalties)
        return {when: reported(self.data, name) for when, name in (("before", base), ("after", after))}

    def _base(self) -> str | None:
        if self.attack is None:
            return "Vanilla"
        attack = self.attack
        if type(attack) is not PGD or not (abs(attack.eps - _EPS) < 1e-9 and attack.steps == _STEPS):
            return None
        in_tenths = attack.step_size is None or abs(attack.step_size - _EPS / 10) < 1e-9
        return "PAT" if in_tenths and attack.restarts == 1 else None


def is_paper_attack(attack: Perturbation | None) -> bool:
    """Whether an attack has the paper's parameters; the paper does not state the spread of its Gaussian noise."""
    if attack is None or attack.name == "gaussian-noise":
        return True
    plain = attack.to_json()
    return (
        plain["name"] in ("fgsm", "mi-fgsm", "pgd")
        and abs(plain["eps"] - _EPS) < 1e-9
        and plain.get("steps", _STEPS) == _STEPS
        and plain.get("step_size") is None
    )
